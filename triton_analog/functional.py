"""The analog layer as a function, with explicit autograd. Nothing waits for the device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import triton_analog.ops as ops
from triton_analog.calls import (
    Kind,
    Numbers,
    SaveInput,
    check_groups,
    check_input,
    draw_seed,
    input_dtype,
    joined,
    linear,
    parts_of,
    seeds_of,
)
from triton_analog.idle_arguments import remark
from triton_analog.ops import _checks as check
from triton_analog.reference import Patches, merge_moments, num_slices

__all__ = [
    "Kind",
    "Numbers",
    "Patches",
    "SaveInput",
    "analog_linear",
    "check_input",
    "draw_seed",
    "input_dtype",
    "modified_weight",
    "update_input_range",
]


def modified_weight(
    weight: Tensor,
    *,
    max_input_size: int = -1,
    weight_clip: Tensor | None = None,
    weight_quantization: Kind = "none",
    weight_res: float = 0.0,
    weight_noise: Kind = "none",
    weight_noise_std: float = 0.0,
    groups: int = 1,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The weight as the tiles hold it, ``[N, K]`` in ``dtype``, and its scale ``wmax [S, N]``; for ``tile_weight``.

    Several calls of :func:`analog_linear` can share it, one per micro-batch of a step: the noise is then drawn once, and no
    call makes a pass over the weight; it costs the memory of one more weight. Gradients reach ``weight`` (and the clip)
    through :func:`analog_linear`, not from here.

    Args:
        weight, max_input_size, weight_clip, weight_quantization, weight_res, weight_noise, weight_noise_std, groups: As in
            :func:`analog_linear`, with ``training=True``.
        seed: int64 ``[1]``, or of a part of the weight (:func:`triton_analog.seeds.placed`); None draws one.
        dtype: That of the inputs it will meet; default that of ``weight``.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    if seed is None and weight_noise != "none" and weight_noise_std > 0:
        seed = draw_seed(weight.device)
    check.matrix("weight", weight)
    check_groups(groups, weight.shape[0], "outputs of the weight")
    with torch.no_grad():
        made = [
            ops.weight(
                part,
                num_slices(weight.shape[1], max_input_size),
                clip=clip,
                quantization=weight_quantization,
                res=weight_res,
                noise_type=weight_noise,
                std_dev=weight_noise_std,
                seed=own_seed,
                dtype=dtype,
            )
            for part, clip, own_seed in zip(
                parts_of(weight, groups), parts_of(weight_clip, groups, 1), seeds_of(seed, groups), strict=True
            )
        ]
    kinds = Numbers(
        weight_quantization=weight_quantization, weight_res=weight_res, weight_noise=weight_noise,
        weight_noise_std=weight_noise_std,
    )  # fmt: skip
    remark(kinds, False)
    weights, scales = zip(*made, strict=True)
    return joined(weights, 0), joined(scales, 1)


def analog_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    input_range: Tensor | None = None,
    dynamic_input_range: bool = False,
    weight_clip: Tensor | None = None,
    max_input_size: int = -1,
    inp_res: float = -1.0,
    inp_noise: float = 0.0,
    inp_sto_round: bool = False,
    out_noise: float = 0.0,
    out_noise_per_channel: bool = False,
    out_bound: float = 0.0,
    out_bound_per_channel: bool = False,
    out_res: float = -1.0,
    weight_quantization: Kind = "none",
    weight_res: float = 0.0,
    weight_noise: Kind = "none",
    weight_noise_std: float = 0.0,
    range_decay: float = 0.0,
    input_min_percentage: float = 0.95,
    fast_mode: bool = False,
    training: bool = True,
    seed: Tensor | None = None,
    weight_seed: Tensor | None = None,
    tile_weight: tuple[Tensor, Tensor | None] | None = None,
    save_input: SaveInput = "full",
    groups: int = 1,
    patches: Patches | None = None,
) -> Tensor:
    """``torch.nn.functional.linear`` on analog tiles (SEMANTICS 3 to 6).

    Every default is the ideal device, so that the call then equals ``linear``. Under ``torch.autocast`` inputs and weight
    are cast as ``linear`` casts them; the weight's cast costs nothing extra where the weight is modified anyway.

    Args:
        x: Inputs ``[..., K]``; fp32, bf16, fp16 or fp64, any strides, empty batches too.
        weight: ``[N, K]``, of the dtype of ``x`` except under autocast. Never changed.
        bias: ``[N]`` or None; added digitally, in fp32.
        input_range: ``[S]``, a learned range per slice; its absolute value is used.
        dynamic_input_range: Use each row's largest magnitude per slice instead.
        weight_clip: ``[S, N]``, a learned clip per slice and channel; it replaces the weight's largest magnitude.
        max_input_size: Rows of a tile: ``S = ceil(K / max_input_size)`` slices of nearly equal width; ``<= 0``: one slice.
        inp_res: Input converter: number of steps over ``-r .. r`` (> 1) or its inverse; ``<= 0`` is off. Needs a range.
        inp_noise: Input noise behind the input converter, a fraction of ``r``; in evaluation too. Needs a range.
        inp_sto_round: The input converter rounds up with the probability of the fraction instead of to the nearest step; in
            evaluation too. Needs ``inp_res``.
        out_noise: Output noise, a fraction of ``r * max|w|``, over all slices together; training only. Needs a range.
        out_noise_per_channel: Scale the output noise by each channel's largest weight instead of the slice's.
        out_bound: Output converter's bound as a multiple of ``r * max|w|``; ``<= 0`` is off. Needs a range.
        out_bound_per_channel: Scale the bound by each channel's largest weight instead of the slice's.
        out_res: Output converter: number of steps or its inverse; ``<= 0`` does not round. Needs ``out_bound``.
        weight_quantization: ``"none"``, ``"per_tensor"`` (one scale per slice) or ``"per_channel"``.
        weight_res: Number of weight states or its inverse.
        weight_noise: ``"none"``, ``"per_tensor"`` or ``"per_channel"``; training only.
        weight_noise_std: Weight noise as a fraction of the largest weight.
        range_decay: Pull of a learned range towards 0 where almost nothing clips.
        input_min_percentage: Share of unclipped inputs above which ``range_decay`` acts.
        fast_mode: Give ``input_range`` the plain gradient of a clamp instead of the learned-range rule.
        training: Noise of weights and outputs is drawn only in training; converters with their input noise, bounds and
            quantization stay on.
        seed: int64 ``[1]`` on the device of ``x``; None draws one (:func:`draw_seed`). The same seed gives the same
            noise and the same rounding. Where ``x`` and ``weight`` are parts of larger ones, that of their part of the
            product (:func:`triton_analog.seeds.placed`).
        weight_seed: Seed of the weight noise alone, to keep one noise over several calls, or that of the part of a weight;
            default ``seed``, unless that is of a part.
        tile_weight: What :func:`modified_weight` gave for the same weight and settings, to use it in several calls.
        save_input: What the backward keeps of ``x``: ``"full"`` is ``x`` itself (no copy), ``"int8"`` the converter's integers
            and two flags per element, five eighths of the bytes of bf16 for one more read of ``x``; gradients are the same. It
            needs ``inp_res`` of at most 254 steps.
        groups: Cut inputs and outputs into so many equal parts and multiply each part of the inputs with its own part of the
            weight, ``[N / groups, K]``, on tiles of its own: ``x`` is ``[..., groups * K]``, ``input_range``
            ``[groups * S]`` group by group, and what is per slice elsewhere is per slice of a group. One product is launched
            after the other; a given ``seed`` is that of the first group, and each further one adds 1.
        patches: Multiply the patches of ``x [B, C, *size]`` instead, a convolution: its rows are those of
            :meth:`Patches.unfold`, and ``groups * K`` is ``C * prod(kernel_size)``. The backward keeps ``x`` and takes its
            patches again; with ``"int8"`` it keeps the integers of the patches where they take less memory than ``x``.

    Returns:
        ``[..., N]`` (with ``patches``: ``[B, *places, N]``) in the dtype of ``x`` (under autocast: of autocast). NaN in a row
        of ``x`` gives NaN in that row; NaN in the weight gives NaN in its channels (and, with per-tensor scales, in the
        slice's).

    Raises:
        ValueError: a shape, device, number or combination outside the above; the message names the argument and the remedy.
        TypeError: dtypes that do not fit.
    """
    if not isinstance(max_input_size, int):
        raise TypeError(f"max_input_size: got {max_input_size!r}; an int is needed")
    tile, tile_wmax = tile_weight or (None, None)
    numbers = Numbers(
        dynamic_input_range, max_input_size, inp_res, inp_noise, inp_sto_round, out_noise, out_noise_per_channel, out_bound,
        out_bound_per_channel, out_res, weight_quantization, weight_res, weight_noise, weight_noise_std, range_decay,
        input_min_percentage, fast_mode, training, save_input, True, groups, patches,
    )  # fmt: skip
    y = linear(x, weight, bias, input_range, weight_clip, seed, weight_seed, tile, tile_wmax, numbers)
    remark(numbers, input_range is not None)
    return y


def _gather(part: Tensor, process_group: Any) -> Tensor:
    """``part`` of every rank, ``[ranks, ...]``; compilers trace the call."""
    everyone = [torch.empty_like(part) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(everyone, part.contiguous(), group=process_group)
    return torch.stack(everyone)


def update_input_range(
    x: Tensor,
    input_range: Tensor,
    count: Tensor,
    *,
    max_input_size: int = -1,
    groups: int = 1,
    init_from_data: int = 100,
    init_std_alpha: float = 3.0,
    fast_mode: bool = False,
    x_min: Tensor | None = None,
    x_max: Tensor | None = None,
    act_range_momentum: float = 0.95,
    residual: Tensor | None = None,
    process_group: Any = None,
) -> None:
    """Learn ``input_range`` from the first ``init_from_data`` batches of data, in place (SEMANTICS 7).

    Call it in training before the range is used. Where several forwards come before one backward, give each of them a
    ``input_range.clone()``, as the next update changes the range that the last one's backward needs. All conditions stay on
    the device, and nothing is read once every slice's start-up is over. A forward recomputed in the backward (activation
    checkpointing) changes nothing.

    Args:
        x: Inputs ``[..., groups * K]``; an empty batch changes nothing.
        input_range: ``[groups * S]``, group by group, as are all of those below; changed in place.
        count: Integer ``[groups * S]``, batches seen so far, changed in place.
        max_input_size: Rows of a tile, as in :func:`analog_linear`.
        groups: Equal parts of the inputs with tiles of their own, as in :func:`analog_linear`.
        init_from_data: Number of batches to learn from.
        init_std_alpha: Standard deviations that the range spans on either side.
        fast_mode: Track running extreme values instead of standard deviations.
        x_min: ``[groups * S]``, running smallest value for ``fast_mode``, changed in place.
        x_max: ``[groups * S]``, running largest value for ``fast_mode``, changed in place.
        act_range_momentum: Weight of the old extreme values in ``fast_mode``; -1 keeps all-time extremes.
        residual: ``[groups * S]``, dtype of the range, changed in place: what rounding the range to a narrow dtype drops. Keep
            it from batch to batch where the range is bf16 or fp16, or late batches no longer move it.
        process_group: Ranks whose batches count as one; without it each process counts its own.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.batch("x", x)
    check_groups(groups, x.shape[-1], "input features")
    x = x.detach().reshape(-1, x.shape[-1])
    parts = parts_of(x, groups, 1)
    slices = num_slices(parts[0].shape[1], max_input_size)
    check.static_range(input_range, groups * slices)
    empty = x.shape[0] == 0  # nothing to learn from, but other ranks may be waiting for this one
    with torch.no_grad():
        if fast_mode:
            if x_min is None or x_max is None:
                raise ValueError("x_min, x_max: missing, but fast_mode tracks the extreme values there; pass both")
            if empty:
                extrema = x.new_tensor([[torch.inf], [-torch.inf]], dtype=check.wide_dtype(x)).expand(
                    2, groups * slices
                )
            else:
                extrema = joined([ops.extrema(part, slices) for part in parts], 1)
            if process_group is not None:
                low, high = _gather(extrema, process_group).unbind(1)
                extrema = torch.stack([low.amin(0), high.amax(0)])
            ops.input_range_update_fast(
                input_range, count, x_min, x_max, extrema, init_from_data=init_from_data, momentum=act_range_momentum
            )
        elif process_group is None and groups == 1:
            if not empty:
                ops.input_range_learn(
                    x,
                    input_range,
                    count,
                    residual,
                    slices,
                    init_from_data=init_from_data,
                    init_std_alpha=init_std_alpha,
                )
        else:
            if empty:
                moments = x.new_zeros(groups * slices, 3, dtype=check.wide_dtype(x))
            else:
                active = parts_of(count < init_from_data, groups)
                moments = joined([ops.moments(part, slices, on) for part, on in zip(parts, active, strict=True)], 0)
            if process_group is not None:
                moments = merge_moments(_gather(moments, process_group))
            residual = torch.zeros_like(input_range) if residual is None else residual
            ops.input_range_update(
                input_range, count, residual, moments, init_from_data=init_from_data, init_std_alpha=init_std_alpha
            )
