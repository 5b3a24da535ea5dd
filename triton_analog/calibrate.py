"""Input ranges of a trained model from sample data, without training: post-training calibration."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import triton_analog.ops as ops
from triton_analog.calls import Numbers
from triton_analog.config import ConfigError, IOParameters, TorchInferenceRPUConfig
from triton_analog.config.enums import SpelledEnum
from triton_analog.hints import names_of
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.programmed import refuse_chips
from triton_analog.nn.settings import settings
from triton_analog.range_statistics import (
    LargestOfBatches,
    MeanOfBatches,
    RandomRows,
    RangeStatistic,
    each_group,
    slice_maxima,
    slice_quantiles,
)
from triton_analog.samples import (
    Layers,
    analog_layers,
    check_forward,
    evaluating,
    products_as,
    run_batch,
    with_progress,
)

Statistics = dict[str, RangeStatistic]


class InputRangeCalibrationType(SpelledEnum):
    """How :func:`calibrate_input_ranges` finds the range of a slice from the inputs ``x`` that it sees."""

    NONE = "None"
    """No calibration; only AIHWKIT's placeholder, and refused."""
    MOVING_STD = "MovingStd"
    """Mean over the batches of ``std_alpha`` standard deviations of ``x``."""
    MOVING_QUANTILE = "MovingQuantile"
    """Mean over the batches of the quantile of ``|x|``."""
    CACHE_QUANTILE = "CacheQuantile"
    """Quantile of ``|x|`` over rows that are drawn at random from all batches."""
    MAX = "Max"
    """Largest ``|x|``."""


def calibrate_input_ranges(
    model: nn.Module,
    calibration_type: InputRangeCalibrationType,
    dataloader: Iterable[Any],
    quantile: float = 0.99995,
    max_samples: int = 1000,
    std_alpha: float | None = None,
    verbose: bool = True,
    signed: bool = False,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> None:
    """Set the stored input ranges of every analog layer of ``model`` from the inputs that the layers see.

    Runs ``model`` on all of ``dataloader`` in evaluation mode, without gradients. Meanwhile all input ranges are off, and with
    them the converters and the noise, so that no layer sees what the unfinished range of an earlier one has clipped (in
    AIHWKIT-Lightning's ``MOVING_*`` it does): inputs are seen as they are before any DAC. Clip and quantization of the weights
    act as in any evaluation. Compiled models run uncompiled. Rows that are all zero, such as padding, are left out. Each
    forward of a layer is a batch of its own: a layer that a model runs twice per batch takes both.

    Afterwards every module is in the mode that it was in, and converters and noise are what the configs say.
    ``pre_post.input_range.enable`` is True, ``input_range`` is a parameter (the same one, if there was one) that is trained if
    ``learn_input_range`` says so, and its start-up from training data is over. An optimizer that exists already does not know
    parameters added here. Layers with a dynamic range, and layers that no data reached, stay as they were. An error leaves
    every layer as it was.

    Args:
        model: A model with analog layers, calibrated before or not, in any mode.
        calibration_type: How to find the ranges.
        dataloader: What a ``DataLoader`` yields: a tensor ``x``, alone or as the first in a tuple or list whose rest (labels)
            is left out, for ``model(x)``; a mapping, alone or as the first, for ``model(**mapping)``; or the pair
            ``(args, kwargs)``, a tuple or list and a mapping, for ``model(*args, **kwargs)``. With ``forward`` anything.
            Tensors must be where the model wants them. In a process group every rank has its own and must call this: the
            ranges come from what all of them see, in MOVING_* kinds as if one process saw the ranks' batches in turn
            (``layer.process_group``: by default every rank,
            :func:`triton_analog.distributed.set_parallel` chooses others), so that they end alike.
        quantile: For the ``*_QUANTILE`` kinds, in ``0 < quantile <= 1``.
        max_samples: Rows that ``CACHE_QUANTILE`` keeps per layer, ``>= 1``: all rows, or so many drawn with torch's
            generator of their device.
        std_alpha: For ``MOVING_STD``: standard deviations, ``> 0``; None takes ``init_std_alpha`` of each layer's config.
        verbose: Show a progress bar, if the package ``tqdm`` is installed (``pip install triton-analog[calibration]``).
        signed: Take quantiles of ``x`` instead of ``|x|``, as AIHWKIT does: too small where inputs are negative.
        forward: ``forward(model, batch)`` runs the model on a batch, instead of the above.

    Warns:
        UserWarning: a slice whose range came out as 0 keeps the range it had (``init_value`` if none), as range 0 would let
            nothing through; layers with a dynamic range; layers that no data but zeros reached.

    Raises:
        ConfigError: every layer has a dynamic range, a config is not valid, ``calibration_type`` is NONE, or a layer stores no
            range yet and what shards or wraps the model could not know one.
        TypeError: ``model``, ``calibration_type``, ``forward`` or what ``dataloader`` yields is something else.
        ValueError: no analog layer, a number outside the above, no data but zeros for any layer, inputs that are inf or NaN,
            or a range that the dtype of a layer cannot hold.
    """
    _check_arguments(calibration_type, quantile, max_samples, std_alpha, forward)
    every_layer = analog_layers(model)
    refuse_chips(model, "calibration")
    layers = {name: layer for name, layer in every_layer.items() if not layer.rpu_config.pre_post.input_range.dynamic}
    _check_any_static(every_layer, layers)
    configs = {name: _ranged_config(name, layer.rpu_config) for name, layer in layers.items()}
    _check_parameters(model, layers, configs)
    statistics = {
        name: _statistic(layer, calibration_type, quantile, max_samples, std_alpha, signed)
        for name, layer in layers.items()
    }
    run = partial(run_batch, argument="dataloader") if forward is None else forward
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        evaluating(model),
        _observed(every_layer, statistics),
    ):
        for batch in with_progress(dataloader, "calibrating input ranges") if verbose else dataloader:
            run(model, batch)
    for name, layer in layers.items():
        group = layer._statistics_group()
        if group is not None:
            statistics[name].merge(group, layer.weight.device)
    ranges = _found_ranges(layers, statistics)
    _warn_of_others(every_layer, layers, ranges)
    for name, found in ranges.items():
        layers[name].reconfigure(configs[name])
        layers[name].set_input_range(found)


# ---- Checks -------------------------------------------------------------------------------------------------------------


def _check_arguments(kind: Any, quantile: float, max_samples: int, std_alpha: float | None, forward: Any) -> None:
    allowed = ", ".join(str(member) for member in InputRangeCalibrationType if member.name != "NONE")
    if not isinstance(kind, InputRangeCalibrationType):
        raise TypeError(f"calibration_type: got {kind!r}; allowed are {allowed}")
    if kind is InputRangeCalibrationType.NONE:
        raise ConfigError(f"calibration_type: got {kind}, which finds no range; allowed are {allowed}")
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile: got {quantile}; a share in 0 < quantile <= 1 is needed, such as 0.99995")
    if max_samples < 1:
        raise ValueError(f"max_samples: got {max_samples}; at least 1 row is needed, such as 1000")
    if std_alpha is not None and not std_alpha > 0:
        raise ValueError(f"std_alpha: got {std_alpha}; must be > 0, or None for init_std_alpha of the config")
    check_forward(forward)


def _check_any_static(every_layer: Layers, layers: Layers) -> None:
    if not layers:
        raise ConfigError(
            f"pre_post.input_range.dynamic: got True in the analog layers {', '.join(every_layer)}, whose ranges then come from "
            "each row and need no calibration; set it to False to calibrate stored ones"
        )


def _ranged_config(name: str, config: TorchInferenceRPUConfig) -> TorchInferenceRPUConfig:
    """A copy of ``config`` with the input range on, once that is known to be valid."""
    config = copy.deepcopy(config)
    config.pre_post.input_range.enable = True
    try:
        config.validate()
    except ConfigError as error:
        raise ConfigError(f"layer {name}: {error}") from None
    return config


def _check_parameters(model: nn.Module, layers: Layers, configs: dict[str, TorchInferenceRPUConfig]) -> None:
    """No range must be added where something around the model has counted its parameters."""
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    for name, layer in layers.items():
        try:
            layer._refuse_other_parameters(configs[name], wrapped)
        except ConfigError as error:
            raise ConfigError(f"layer {name}: {error}") from None


# ---- Running the model ----------------------------------------------------------------------------------------------------


def _statistic(
    layer: AnalogMatrixLayer,
    kind: InputRangeCalibrationType,
    quantile: float,
    max_samples: int,
    std_alpha: float | None,
    signed: bool,
) -> RangeStatistic:
    split = layer.split
    K, S = (layer.tile_shape[1], layer.slices) if split is None else (split.features, split.slices)
    alpha = layer.rpu_config.pre_post.input_range.init_std_alpha if std_alpha is None else std_alpha
    maxima = each_group(partial(slice_maxima, slices=S), K)
    deviations = each_group(lambda rows: alpha * ops.std(rows, S), K)
    quantiles = each_group(partial(slice_quantiles, slices=S, q=quantile, signed=signed), K)
    if kind is InputRangeCalibrationType.MAX:
        return LargestOfBatches(maxima)
    if kind is InputRangeCalibrationType.MOVING_STD:
        return MeanOfBatches(deviations)
    if kind is InputRangeCalibrationType.MOVING_QUANTILE:
        return MeanOfBatches(quantiles)
    return RandomRows(max_samples, quantiles)


@contextmanager
def _observed(layers: Layers, statistics: Statistics) -> Iterator[None]:
    """While it lasts, the layers hand what they multiply to their statistic (if any), and run without range and converters. The
    parameters are left alone, as a sharding library may manage them."""
    observers = [(layers[name], partial(_observe, name, layers[name], found)) for name, found in statistics.items()]
    try:
        for layer in layers.values():
            vars(layer)["_matmul"] = partial(layer.matmul_without_range, _without_range(layer))
        with products_as(observers):
            yield
    finally:
        for layer in layers.values():
            vars(layer).pop("_matmul", None)


def _without_range(layer: AnalogMatrixLayer) -> Numbers:
    """What ``layer`` computes in evaluation, but for range and converters."""
    layer._numbers()  # checks the config
    config = copy.deepcopy(layer.rpu_config)
    config.forward = IOParameters()
    config.pre_post.input_range.enable = False
    return Numbers(**settings(config), training=False, groups=layer.groups, patches=layer.patches)


def _observe(name: str, layer: AnalogMatrixLayer, statistic: RangeStatistic, x: Tensor, *shared: Any) -> Tensor:
    y = type(layer).analog_matmul(layer, x, *shared)  # which also refuses an x that does not fit
    rows = layer.tile_rows(x.detach() if layer.split is None else layer.split.inputs(x))
    largest = ops.absmax(rows, 1)[0]
    if not largest.isfinite().all():
        raise ValueError(
            f"dataloader: layer {name} got inputs that are inf or NaN; no range fits them, so look for what made them"
        )
    used = largest > 0
    if used.any():
        statistic.add(rows if used.all() else rows[used])
    return y


# ---- Storing the ranges ---------------------------------------------------------------------------------------------------


def _found_ranges(layers: Layers, statistics: Statistics) -> dict[str, Tensor]:
    """The ranges ``[S]`` to store in every layer that saw data, in the dtype that it stores; nothing is changed yet."""
    found = {}
    for name, layer in layers.items():
        ranges = statistics[name].ranges()
        if layer.split is not None:
            ranges = layer.split.whole_ranges(ranges)
        if ranges is not None:
            found[name] = _storable(name, layer, ranges)
    if not found:
        raise ValueError(
            f"dataloader: no data but zeros reached the analog layers {', '.join(layers)}; give batches that do. No layer was "
            "changed"
        )
    return found


def _warn_of_others(every_layer: Layers, layers: Layers, ranges: dict[str, Tensor]) -> None:
    """Name what is left as it was, each kind once."""
    unseen = [name for name in layers if name not in ranges]
    dynamic = [name for name in every_layer if name not in layers]
    for names, why in (
        (
            unseen,
            "no data but zeros reached these; give data that does. If their parents read the weights instead of calling them, "
            "leave them digital with exclude_modules",
        ),
        (dynamic, "pre_post.input_range.dynamic is True, so that their ranges come from each row"),
    ):
        if names:
            warnings.warn(
                f"calibrate_input_ranges left {len(names)} analog layer(s) as they were: {names_of(names)}. {why[0].upper()}"
                f"{why[1:]}.",
                stacklevel=3,
            )


def _storable(name: str, layer: AnalogMatrixLayer, ranges: Tensor) -> Tensor:
    """``ranges [S]`` in the dtype that ``layer`` stores, finite, and those that are 0 replaced by what they were."""
    if layer.input_range is None:
        old = layer.weight.new_full(ranges.shape, layer.rpu_config.pre_post.input_range.init_value)
    else:
        with layer.whole("input_range"):
            old = layer.input_range.detach()
    ranges = ranges.to(old)
    if not ranges.isfinite().all():
        raise ValueError(
            f"dataloader: the ranges of layer {name} exceed what its dtype {ranges.dtype} can hold; scale its inputs or "
            "choose another dtype. No layer was changed"
        )
    zero = ranges == 0
    if zero.any():
        warnings.warn(
            f"The input range of layer {name} came out as 0 in slices {zero.nonzero()[:, 0].tolist()}, which saw (nearly) "
            "only zeros; there the range stays what it was.",
            stacklevel=4,
        )
    return torch.where(zero, old, ranges)
