"""Running a model on batches of data while its layers are counted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from triton_analog.analysis.counts import LayerCounts
from triton_analog.analysis.results import Analysis, LayerAnalysis, SliceAnalysis
from triton_analog.hints import names_of
from triton_analog.samples import (
    analog_layers,
    check_batches,
    check_forward,
    products_as,
    run_batch,
    undisturbed,
    with_progress,
)


def analyze(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    verbose: bool = True,
) -> Analysis:
    """What every analog layer of ``model`` does on its tiles while the model runs on ``batches``.

    The model runs in evaluation mode, without gradients and uncompiled, and computes as it always does then: with DAC and ADC,
    clip and quantization of the weights, on a simulated chip with what its devices hold; without the noise of training. Each
    layer is looked at with the inputs ``x`` that it gets there, which earlier layers have disturbed. Afterwards the model is
    what it was, torch's random numbers included, whatever happens in between.

    Let ``x_s`` be the inputs of slice ``s``, ``W_s`` its part of the stored weight, ``r_s`` its range, ``y_s`` what its tile
    gives, behind the ADC. Sums are over all input vectors (rows, patches, time steps) of all batches:

    - ``clipped``: the share of the numbers in ``x_s`` with ``|x| > r_s``,
    - ``saturated``: the share of the numbers in ``y_s`` at which the ADC's bound acts,
    - ``snr_db = 10 log10(sum (x_s W_s^T)^2 / sum (y_s - x_s W_s^T)^2)``; for a layer the same of ``sum_s x_s W_s^T`` and of its
      output without the (digital) bias. Both are computed in the dtype of the layer, whose own rounding is part of the
      noise: in bf16 nothing beyond some 55 dB is seen,
    - ``kurtosis = mean (w - mean w)^4 / (mean (w - mean w)^2)^2`` of the weights of a slice, or of a layer: 3 for a normal
      distribution, 1.8 for a uniform one. Of a chip it is that of what the devices hold, else that of the stored weight,
    - ``range_ratio = r_s / max |x_s|``.

    It takes two more products for each of the model's own, one digital, and the memory of a few outputs of one layer at a
    time; what is counted stays on the device until the end.

    Args:
        model: A model with analog layers, calibrated, trained or on a chip (:func:`triton_analog.inference.program`).
        batches: What a ``DataLoader`` yields, in the forms that :func:`triton_analog.calibrate_input_ranges` takes; with
            ``forward`` anything. Tensors must be where the model wants them. A few batches are enough.
        forward: ``forward(model, batch)`` runs the model on a batch, instead of the above.
        verbose: Show a progress bar, if the package ``tqdm`` is installed.

    Warns:
        UserWarning: no batch reached some layers; what is known of these is the kurtosis. Or what some layers computed was
            infinite or no number, which says nothing about tiles.

    Raises:
        TypeError: ``model``, ``batches``, ``forward`` or a batch is something else.
        ValueError: no analog layer, or no batch.
    """
    check_forward(forward)
    layers = analog_layers(model)
    check_batches(batches)
    for name, layer in layers.items():
        if layer.split is not None:
            raise ValueError(
                f"model: tensor parallelism has split {name}, of which no rank has all; take the whole state dict, and analyze "
                "restore_analog(digital_model, state_dict)"
            )
        layer._numbers()  # says what is wrong with a config that was changed by hand
    counts = {name: LayerCounts(layer) for name, layer in layers.items()}
    run = partial(run_batch, argument="batches") if forward is None else forward
    seen = 0
    with undisturbed(model), products_as((layers[name], found.matmul) for name, found in counts.items()):
        for batch in with_progress(batches, "analyzing") if verbose else batches:
            try:
                run(model, batch)
            except Exception as error:
                _explain(error, seen, batch)
                raise
            seen += 1
        if seen == 0:
            raise ValueError("batches: none given; at least one is needed, such as [x]")
        collected = _to_host([found.collected() for found in counts.values()])
    unseen = [name for name, found in counts.items() if found.vectors == 0]
    if unseen:
        warnings.warn(
            f"analyze: no batch reached {len(unseen)} analog layer(s): {names_of(unseen)}. If their parents read the weights "
            "instead of calling them, leave them digital with exclude_modules.",
            stacklevel=2,
        )
    infinite = [
        name for name, own in zip(counts, collected, strict=True) if name not in unseen and not math.isfinite(own[-2])
    ]
    if infinite:
        warnings.warn(
            f"analyze: {len(infinite)} analog layer(s) computed infinite numbers or NaN: {names_of(infinite)}; their shares and "
            "ratios say nothing. Look for the first of them, and at the batches.",
            stacklevel=2,
        )
    found = zip(counts.items(), collected, strict=True)
    return Analysis(seen, tuple(_result(name, own, numbers) for (name, own), numbers in found))


def _explain(error: Exception, number: int, batch: Any) -> None:
    """Add to ``error`` where it comes from, where Python can (3.11)."""
    if hasattr(error, "add_note"):
        error.add_note(
            f"batches: this was number {number}, a {type(batch).__name__}. A tuple or list gives its first to the model, as what "
            "follows may be labels; ((a, b), {}) is for several inputs, and forward=lambda model, batch: ... for anything else"
        )


def _to_host(found: list[Tensor]) -> list[list[float]]:
    """All numbers, in one copy for each device."""
    devices: dict[torch.device, list[int]] = {}
    for i, numbers in enumerate(found):
        devices.setdefault(numbers.device, []).append(i)
    values: list[list[float]] = [[] for _ in found]
    for own in devices.values():
        flat = iter(torch.cat([found[i] for i in own]).tolist())
        for i in own:
            values[i] = [next(flat) for _ in range(len(found[i]))]
    return values


# ---- Numbers of a layer -------------------------------------------------------------------------------------------------


def _result(name: str, counts: LayerCounts, values: list[float]) -> LayerAnalysis:
    layer, numbers, size = counts.layer, counts.numbers, LayerCounts.PER_ROW
    widths = layer.get_split_sizes() * layer.groups
    rows = [values[i * size : (i + 1) * size] for i in range(len(widths))]
    outputs = layer.tile_shape[0]
    is_ranged = numbers.dynamic_input_range or layer.input_range is not None
    slices = []
    for width, (clipped, saturated, signal, noise, largest, range_, *moments) in zip(widths, rows, strict=True):
        share = clipped / (counts.vectors * width) if counts.vectors and is_ranged else None
        products = counts.vectors * (outputs // layer.groups)
        slices.append(
            SliceAnalysis(
                inputs=width,
                clipped=share,
                saturated=saturated / products if counts.vectors and numbers.out_bound > 0 else None,
                snr_db=_decibels(signal, noise) if counts.vectors else None,
                kurtosis=_kurtosis([moments]),
                input_range=_known(range_),
                largest_input=largest if counts.vectors else None,
            )
        )
    return LayerAnalysis(
        name=name,
        kind=type(layer).__name__,
        outputs=outputs,
        groups=layer.groups,
        vectors=counts.vectors,
        snr_db=_decibels(*values[-2:]) if counts.vectors else None,
        kurtosis=_kurtosis([row[-5:] for row in rows]),
        slices=tuple(slices),
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _decibels(signal: float, noise: float) -> float | None:
    """None where there is neither; NaN for inputs that were."""
    if signal == noise == 0:
        return None
    if noise == 0 or signal == 0:
        return math.inf if noise == 0 else -math.inf
    return 10 * math.log10(signal / noise) if math.isfinite(signal + noise) else math.nan


def _kurtosis(parts: list[list[float]]) -> float | None:
    """Of all numbers in ``parts``, each given by count, mean, and the sums of the second to fourth powers of deviations.

    None where it is not known, or no number deviates.
    """
    total = sum(count for count, *_ in parts)
    mean = sum(count * own for count, own, *_ in parts) / total
    second = fourth = 0.0
    for count, own, two, three, four in parts:
        shift = own - mean
        second += two + count * shift**2
        fourth += four + 4 * shift * three + 6 * shift**2 * two + count * shift**4
    return _known(total * fourth / second**2) if second > 0 else None
