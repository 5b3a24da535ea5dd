"""Input ranges of a trained model from sample data, without training: post-training calibration."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import triton_analog.ops as ops
from triton_analog.config import ConfigError, IOParameters, TorchInferenceRPUConfig
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.range_statistics import (
    LargestOfBatches,
    MeanOfBatches,
    RandomRows,
    RangeStatistic,
    each_group,
    slice_maxima,
    slice_quantiles,
)

Layers = dict[str, AnalogMatrixLayer]
Statistics = dict[str, RangeStatistic]


class InputRangeCalibrationType(Enum):
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
) -> None:
    """Set the stored input ranges of every analog layer of ``model`` from the inputs that the layers see.

    Runs ``model`` on all of ``dataloader``, without gradients. Meanwhile all input ranges are off, and with them the
    converters and the output noise, so that no layer sees what the unfinished range of an earlier one has clipped (in
    AIHWKIT-Lightning's ``MOVING_*`` it does); clip and quantization of the weights act as in any evaluation. Compiled
    models run uncompiled. Rows that are all zero, such as padding, are left out. Each forward of a layer is a batch of its
    own: a layer that a model runs twice per batch takes both.

    Afterwards ``pre_post.input_range.enable`` is True, ``input_range`` is a parameter (the same one, if there was one) that
    is trained if ``learn_input_range`` says so, and its start-up from training data is over. An optimizer that exists
    already does not know parameters added here. Set ``forward.inp_res`` and the like in each ``layer.rpu_config`` then.
    An error leaves every layer as it was.

    Args:
        model: A model in eval mode, with analog layers whose DAC is off and whose range is off or stored.
        calibration_type: How to find the ranges.
        dataloader: Yields ``(args, kwargs)``, a tuple or list and a dict, for ``model(*args, **kwargs)``; or a tensor, alone
            or as the only one in a tuple or list, for ``model(tensor)``; or a dict for ``model(**dict)``. Several tensors
            are refused, as one of them may be the labels. Tensors must be where the model wants them. In a process group
            the ranks do not share what they see: give all of them the same data.
        quantile: For the ``*_QUANTILE`` kinds, in ``0 < quantile <= 1``.
        max_samples: Rows that ``CACHE_QUANTILE`` keeps per layer, ``>= 1``: all rows, or so many drawn with torch's
            generator of their device.
        std_alpha: For ``MOVING_STD``: standard deviations, ``> 0``; None takes ``init_std_alpha`` of each layer's config.
        verbose: Show a progress bar, if the package ``tqdm`` is installed (``pip install triton-analog[calibration]``).
        signed: Take quantiles of ``x`` instead of ``|x|``, as AIHWKIT does: too small where inputs are negative.

    Warns:
        UserWarning: experts that no data reached, while it did others beside them, keep their ranges, with the start-up still
            to come where it was; a slice whose range came out as 0 keeps the range it had (``init_value`` if none), as range
            0 would let nothing through.

    Raises:
        ConfigError: a layer has its DAC on or a dynamic range, or ``calibration_type`` is NONE.
        TypeError: ``model``, ``calibration_type`` or what ``dataloader`` yields is something else.
        ValueError: no analog layer, a module in training mode, a number outside the above, a layer that no data but zeros
            reached, inputs that are inf or NaN, or a range that the dtype of a layer cannot hold.
    """
    _check_arguments(calibration_type, quantile, max_samples, std_alpha)
    layers = _analog_layers(model)
    configs = {name: _ranged_config(name, layer.rpu_config) for name, layer in layers.items()}
    statistics = {
        name: _statistic(layer, calibration_type, quantile, max_samples, std_alpha, signed)
        for name, layer in layers.items()
    }
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _observed(layers, statistics):
        for batch in _with_progress(dataloader) if verbose else dataloader:
            args, kwargs = _arguments(batch)
            model(*args, **kwargs)
    ranges = _found_ranges(layers, statistics)
    for name, layer in layers.items():
        layer.reconfigure(configs[name])
        if name in ranges:
            layer.set_input_range(ranges[name])


# ---- Checks -------------------------------------------------------------------------------------------------------------


def _check_arguments(kind: Any, quantile: float, max_samples: int, std_alpha: float | None) -> None:
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


def _analog_layers(model: Any) -> Layers:
    """The analog layers of ``model`` by name, each once, all of them ready to be calibrated."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; a torch.nn.Module with analog layers is needed")
    modules = {name or type(module).__name__: module for name, module in model.named_modules()}
    layers = {name: module for name, module in modules.items() if isinstance(module, AnalogMatrixLayer)}
    if not layers:
        raise ValueError("model: it has no analog layer; convert it with convert_to_analog first")
    for name, module in modules.items():
        if module.training:
            raise ValueError(f"model: {name} is in training mode; call model.eval() first")
    return layers


def _ranged_config(name: str, config: TorchInferenceRPUConfig) -> TorchInferenceRPUConfig:
    """A copy of ``config`` with the input range on, once that is known to be valid."""
    if config.forward.inp_res > 0:
        raise ConfigError(
            f"forward.inp_res: got {config.forward.inp_res} in layer {name}; the DAC must be off while its range is not yet "
            "known: set it to -1, and back once the model is calibrated"
        )
    if config.pre_post.input_range.dynamic:
        raise ConfigError(
            f"pre_post.input_range.dynamic: got True in layer {name}, whose range then comes from each row and needs no "
            "calibration; set it to False"
        )
    config = copy.deepcopy(config)
    config.pre_post.input_range.enable = True
    config.validate()
    return config


# ---- Running the model ----------------------------------------------------------------------------------------------------


def _statistic(
    layer: AnalogMatrixLayer,
    kind: InputRangeCalibrationType,
    quantile: float,
    max_samples: int,
    std_alpha: float | None,
    signed: bool,
) -> RangeStatistic:
    K, S = layer.tile_shape[1], layer.slices
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
    """While it lasts, the layers hand what they multiply to their statistic, and run without range and converters.

    Every kind of layer multiplies in ``analog_matmul``, which recurrent ones call several times per forward. So that method
    is hidden by an attribute of the same name; the hooks of the user are left alone.
    """
    before = {name: (layer.rpu_config, layer.input_range) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.rpu_config = _without_range(layer.rpu_config)
            layer.input_range = None
            layer.__dict__["analog_matmul"] = partial(_observe, name, layer, statistics[name])
        yield
    finally:
        for name, layer in layers.items():
            layer.__dict__.pop("analog_matmul", None)
            layer.rpu_config, layer.input_range = before[name]


def _without_range(config: TorchInferenceRPUConfig) -> TorchInferenceRPUConfig:
    config = copy.deepcopy(config)
    config.forward = IOParameters()
    config.pre_post.input_range.enable = False
    return config


def _observe(name: str, layer: AnalogMatrixLayer, statistic: RangeStatistic, x: Tensor, *shared: Any) -> Tensor:
    y = type(layer).analog_matmul(layer, x, *shared)  # which also refuses an x that does not fit
    rows = layer.tile_rows(x.detach())
    largest = ops.absmax(rows, 1)[0]
    if not largest.isfinite().all():
        raise ValueError(
            f"dataloader: layer {name} got inputs that are inf or NaN; no range fits them, so look for what made them"
        )
    used = largest > 0
    if used.any():
        statistic.add(rows if used.all() else rows[used])
    return y


def _with_progress(dataloader: Iterable[Any]) -> Iterable[Any]:
    """``dataloader`` with a progress bar, or as it is where there is none to show."""
    try:
        from tqdm import tqdm
    except ImportError:
        return dataloader
    return tqdm(dataloader, desc="calibrating input ranges", unit="batch")


def _arguments(batch: Any) -> tuple[Iterable[Any], dict[str, Any]]:
    """Positional and keyword arguments of the model."""
    match batch:
        case Tensor() as x:
            return (x,), {}
        case [Tensor() as x]:
            return (x,), {}
        case Mapping() as kwargs:
            return (), dict(kwargs)
        case [tuple() | list() as args, Mapping() as kwargs]:
            return args, dict(kwargs)
    given = type(batch).__name__
    if isinstance(batch, tuple | list):
        given += f" of {', '.join(type(part).__name__ for part in batch)}"
    raise TypeError(
        f"dataloader: got a batch that is a {given}; allowed are (args, kwargs), such as ((x,), {{}}), which also says what "
        "is no input, a single tensor, and a dict of keyword arguments"
    )


# ---- Storing the ranges ---------------------------------------------------------------------------------------------------


def _found_ranges(layers: Layers, statistics: Statistics) -> dict[str, Tensor]:
    """The ranges ``[S]`` to store in every layer, in the dtype that it stores; nothing is changed yet. Experts that were sent
    nothing, others of the same stack having been, have none."""
    unseen, found = [], {}
    for name, layer in layers.items():
        ranges = statistics[name].ranges()
        if ranges is None:
            unseen.append(name)
        else:
            found[name] = _storable(name, layer, ranges)
    stacks = {id(layers[name].weight_source) for name in found}
    idle = [
        name for name in unseen if id(layers[name].weight_source) in stacks and layers[name].weight_index is not None
    ]
    unseen = [name for name in unseen if name not in idle]
    if idle and not unseen:
        warnings.warn(
            f"No data but zeros reached {len(idle)} matrices of experts, such as {idle[0]}; their input ranges stay what they "
            "were. Give more data to calibrate them too.",
            stacklevel=3,
        )
    if unseen:
        raise ValueError(
            f"dataloader: no data but zeros reached the analog layers {', '.join(unseen)}; give data that does, or leave them "
            "digital with exclude_modules of convert_to_analog. No layer was changed"
        )
    return found


def _storable(name: str, layer: AnalogMatrixLayer, ranges: Tensor) -> Tensor:
    """``ranges [S]`` in the dtype that ``layer`` stores, finite, and those that are 0 replaced by what they were."""
    if layer.input_range is None:
        old = layer.weight.new_full(ranges.shape, layer.rpu_config.pre_post.input_range.init_value)
    else:
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
