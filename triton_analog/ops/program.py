"""Weights as the devices of a chip hold them: programmed, and drifted for a time (SEMANTICS 10).

Everything that is random of a device is drawn from its place in the weight, so that nothing of a chip is stored but its seed:
each time is made anew from the weight that was wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite

import torch
import triton
import triton.language as tl
from torch import Tensor

import triton_analog.reference as reference
from triton_analog.lang import TINY, cast, clamp, normal_tile, slice_of
from triton_analog.launch import block, cdiv, launch
from triton_analog.ops import _checks as check
from triton_analog.ops._operator import Operator
from triton_analog.reference.program import CELLS
from triton_analog.reference.program import DEVICE_STREAM as FIRST_STREAM
from triton_analog.reference.program import LARGEST as reference_largest

DEVICE_STREAM = tl.constexpr(FIRST_STREAM)
LARGEST = tl.constexpr(reference_largest)
BLOCK_N, BLOCK_K, WARPS = 16, 64, 4


@triton.jit
def curve(curves_ptr, COLUMN: tl.constexpr, KNOTS: tl.constexpr):
    """The knots of curve ``COLUMN`` of ``curves [KNOTS, 4]``, as a power of two of them."""
    BLOCK: tl.constexpr = triton.next_power_of_2(KNOTS)
    return tl.load(curves_ptr + tl.minimum(tl.arange(0, BLOCK), KNOTS - 1) * 4 + COLUMN)


@triton.jit
def place_on_curves(r, KNOTS: tl.constexpr):
    """The knot below ``r``, and how far it is to the next; the knots are at ``LARGEST * (i / (KNOTS - 1))**2``."""
    inside = tl.minimum(tl.maximum(tl.where(r == r, r, 0.0), 0.0), LARGEST)
    position = tl.sqrt(inside * (1 / LARGEST)) * (KNOTS - 1)
    i = tl.minimum(position.to(tl.int32), KNOTS - 2)
    return i, position - i.to(tl.float32)


@triton.jit
def curve_at(knots, i, fraction, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A curve at a place for each element. The knots are looked up in shared memory: to a cache a warp's lookups are as many
    lines."""
    i = i.reshape(ROWS * COLUMNS)
    first = tl.gather(knots, i, 0).reshape(ROWS, COLUMNS)
    return first + fraction * (tl.gather(knots, i + 1, 0).reshape(ROWS, COLUMNS) - first)


@triton.jit
def curve_at_one(curves_ptr, i, fraction, COLUMN: tl.constexpr):
    """Curve ``COLUMN`` at one place for all."""
    first = tl.load(curves_ptr + i * 4 + COLUMN)
    return first + fraction * (tl.load(curves_ptr + i * 4 + (4 + COLUMN)) - first)


@triton.jit
def within(v, lowest, highest):
    """``v`` in ``lowest .. highest``; NaN stays NaN."""
    return tl.clamp(v, tl.zeros_like(v) + lowest, tl.zeros_like(v) + highest, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def normals(
    seed, n, k, plane, is_second, KIND: tl.constexpr, NUMBER: tl.constexpr, PAIR: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of device ``NUMBER``; of a ``PAIR``, which begins with it, those of the device that is in use and of the other one."""
    first = normal_tile(seed, n, k, plane, DEVICE_STREAM + 8 * NUMBER + KIND, ROWS, COLUMNS)
    if PAIR:
        second = normal_tile(seed, n, k, plane, DEVICE_STREAM + 8 * NUMBER + 8 + KIND, ROWS, COLUMNS)
        return tl.where(is_second, second, first), tl.where(is_second, first, second)
    else:
        return first, first


@triton.jit
def programmed(g, deviation, z, lowest):
    return within(g + deviation * z, tl.minimum(lowest, 0.0), float("inf"))


@triton.jit
def devices(
    g, is_second, seed, read_seed, n, k, curves_ptr, g_min, g_max, log2_time, read, shift, spread, lowest, highest, stuck_low,
    stuck_high, moment,
    NUMBER: tl.constexpr, PAIR: tl.constexpr, DRIFTS: tl.constexpr, SHIFTS: tl.constexpr, SPREADS: tl.constexpr,
    READS: tl.constexpr, STICKS: tl.constexpr, KNOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What device ``NUMBER`` of each cell conducts at a time when it should conduct ``g``. Of a ``PAIR``: what that one of the
    two conducts which should, and the other one, which should conduct ``g_min``."""
    relative = 1.0 / g_max
    i, fraction = place_on_curves(g * relative, KNOTS)
    rest, rest_fraction = place_on_curves(g_min * relative, KNOTS)
    z, other_z = normals(seed, n, k, 0, is_second, 0, NUMBER, PAIR, ROWS, COLUMNS)
    held = programmed(g, curve_at(curve(curves_ptr, 0, KNOTS), i, fraction, ROWS, COLUMNS), z, lowest)
    other_held = programmed(g_min, curve_at_one(curves_ptr, rest, rest_fraction, 0), other_z, lowest)
    now, other = held, other_held
    if DRIFTS:
        z, other_z = normals(seed, n, k, 0, is_second, 1, NUMBER, PAIR, ROWS, COLUMNS)
        mean = curve_at(curve(curves_ptr, 1, KNOTS), i, fraction, ROWS, COLUMNS)
        deviation = curve_at(curve(curves_ptr, 2, KNOTS), i, fraction, ROWS, COLUMNS)
        now *= tl.exp2(-log2_time * tl.abs(mean + deviation * z))
        mean = curve_at_one(curves_ptr, rest, rest_fraction, 1)
        deviation = curve_at_one(curves_ptr, rest, rest_fraction, 2)
        other *= tl.exp2(-log2_time * tl.abs(mean + deviation * other_z))
    if SHIFTS:
        now += shift
        other += shift
    if SPREADS:
        z, other_z = normals(seed, n, k, 0, is_second, 2, NUMBER, PAIR, ROWS, COLUMNS)
        now += spread * z
        other += spread * other_z
    if READS:
        z, other_z = normals(read_seed, n, k, moment, is_second, 3, NUMBER, PAIR, ROWS, COLUMNS)
        factors = curve(curves_ptr, 3, KNOTS)
        i, fraction = place_on_curves(held * relative, KNOTS)
        now += tl.abs(now) * curve_at(factors, i, fraction, ROWS, COLUMNS) * read * z
        if PAIR:
            i, fraction = place_on_curves(other_held * relative, KNOTS)
            other += tl.abs(other) * curve_at(factors, i, fraction, ROWS, COLUMNS) * read * other_z
    now, other = within(now, lowest, highest), within(other, lowest, highest)
    if STICKS:
        z, other_z = normals(seed, n, k, 0, is_second, 4, NUMBER, PAIR, ROWS, COLUMNS)
        now = tl.where(z < stuck_low, g_min, tl.where(z > stuck_high, g_max, now))
        other = tl.where(other_z < stuck_low, g_min, tl.where(other_z > stuck_high, g_max, other))
    return now, other


@triton.jit(do_not_specialize=["N", "moment"])
def program_kernel(
    w_ptr, wmax_ptr, seed_ptr, read_seed_ptr, curves_ptr, gain_ptr, out_ptr, N, K, S, stride_n, stride_k, stride_ws,
    stride_wn, stride_gs, stride_gn, g_min, g_max, log2_time, read, shift, spread, lowest, highest, stuck_low, stuck_high, moment,
    CELL: tl.constexpr, SIGNIFICANCES: tl.constexpr, PAIRS: tl.constexpr, DRIFTS: tl.constexpr, SHIFTS: tl.constexpr,
    SPREADS: tl.constexpr, READS: tl.constexpr, STICKS: tl.constexpr, GAINS: tl.constexpr, KNOTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first_n = tl.program_id(0).to(tl.int64) * ROWS
    first_k = tl.program_id(1).to(tl.int64) * COLUMNS
    n = first_n + tl.arange(0, ROWS)[:, None]
    k = first_k + tl.arange(0, COLUMNS)[None, :]
    inside = (n < N) & (k < K)
    w = tl.load(w_ptr + n * stride_n + k * stride_k, mask=inside, other=0.0).to(tl.float32)
    s = slice_of(k.to(tl.int32), K, S)
    scale = tl.load(wmax_ptr + s * stride_ws + n * stride_wn, mask=inside, other=1.0).to(tl.float32)
    seed = tl.load(seed_ptr)
    read_seed = tl.load(read_seed_ptr)
    span = g_max - g_min
    full = 0.0
    for p in tl.static_range(PAIRS):
        full += SIGNIFICANCES[p] * span
    is_zero = scale < TINY
    v = clamp(tl.where(is_zero, 0.0, w / tl.where(is_zero, 1.0, scale)), 1.0) * full
    is_second = v < 0
    if CELL == "pair":
        total = tl.zeros_like(v)
        below = 0.0
        for p in tl.static_range(PAIRS):
            g = within((tl.abs(v) - below) * (1 / SIGNIFICANCES[p]), 0.0, span) + g_min
            g, other = devices(
                g, is_second, seed, read_seed, first_n, first_k, curves_ptr, g_min, g_max, log2_time, read, shift, spread, lowest,
                highest, stuck_low, stuck_high, moment, 2 * p, True, DRIFTS, SHIFTS, SPREADS, READS, STICKS, KNOTS, ROWS, COLUMNS,
            )  # fmt: skip
            total += SIGNIFICANCES[p] * tl.where(is_second, other - g, g - other)
            below += SIGNIFICANCES[p] * span
    else:
        SINGLE: tl.constexpr = CELL == "single"
        g = (v + full) / 2 + g_min if SINGLE else tl.abs(v)
        g, _ = devices(
            g, is_second, seed, read_seed, first_n, first_k, curves_ptr, g_min, g_max, log2_time, read, shift, spread, lowest,
            highest, stuck_low, stuck_high, moment, 0, False, DRIFTS, SHIFTS, SPREADS, READS, STICKS, KNOTS, ROWS, COLUMNS,
        )  # fmt: skip
        total = 2 * (g - g_min) - full if SINGLE else tl.where(is_second, -g, g)
    total *= scale / full
    if GAINS:
        total *= tl.load(gain_ptr + s * stride_gs + n * stride_gn, mask=inside, other=1.0).to(tl.float32)
    out = cast(total, out_ptr.dtype.element_ty)
    tl.store(out_ptr + n * K + k, out, mask=inside)


def launch_program(
    weight: Tensor,
    wmax: Tensor,
    seed: Tensor,
    curves: Tensor,
    read_seed: Tensor | None,
    gain: Tensor | None,
    cell: str,
    significances: Sequence[float],
    g_min: float,
    g_max: float,
    log2_time: float,
    read: float,
    shift: float,
    spread: float,
    lowest: float,
    highest: float,
    stuck_low: float,
    stuck_high: float,
    moment: int,
) -> Tensor:
    N, K = weight.shape
    out = torch.empty(N, K, dtype=weight.dtype, device=weight.device)
    rows, columns = block(N, BLOCK_N), block(K, BLOCK_K)
    launch(
        program_kernel, (cdiv(N, rows), cdiv(K, columns)), weight.device, weight, wmax, seed,
        seed if read_seed is None else read_seed, curves, gain, out, N, K, len(wmax), *weight.stride(),
        *_strides(wmax, N), *_strides(gain, N), g_min, g_max, log2_time, read, shift, spread, lowest, highest, stuck_low,
        stuck_high, moment, CELL=cell, SIGNIFICANCES=tuple(significances), PAIRS=len(significances), DRIFTS=log2_time > 0,
        SHIFTS=shift != 0, SPREADS=spread > 0, READS=read > 0, STICKS=stuck_low > -inf or stuck_high < inf,
        GAINS=gain is not None, KNOTS=len(curves), ROWS=rows, COLUMNS=columns, num_warps=WARPS,
    )  # fmt: skip
    return out


def _strides(scale: Tensor | None, n: int) -> tuple[int, int]:
    """Of ``[S, N]``, or of ``[S, 1]`` as if it were expanded to it."""
    return (0, 0) if scale is None else (scale.stride(0), scale.stride(1) if scale.shape[1] == n else 0)


def _fake(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


_program = Operator("program", launch_program, reference.program, _fake)


def program(
    weight: Tensor,
    wmax: Tensor,
    seed: Tensor,
    curves: Tensor,
    *,
    read_seed: Tensor | None = None,
    gain: Tensor | None = None,
    cell: str = "pair",
    significances: Sequence[float] = (1.0,),
    g_min: float = 0.0,
    g_max: float = 25.0,
    log2_time: float = 0.0,
    read: float = 0.0,
    shift: float = 0.0,
    spread: float = 0.0,
    lowest: float = 0.0,
    highest: float = inf,
    stuck_low: float = -inf,
    stuck_high: float = inf,
    moment: int = 0,
) -> Tensor:
    """What the devices that were programmed to ``weight`` hold after a time: a weight ``[N, K]`` again, in its dtype.

    One read and one write of the weight; each device's own numbers are drawn from ``seed`` and its place. Conductances are
    in microsiemens. Not differentiable.

    Args:
        weight: The weight that is wanted, ``[N, K]``; clamped to ``wmax``.
        wmax: The weight that a cell's largest conductance stands for, ``[S, N]``, or ``[S, 1]`` for one per slice.
        seed: int64 tensor with one element: the chip.
        curves: fp32 ``[knots, 4]``, at least two knots: of a device of relative conductance ``r = g / g_max``, at the knots
            ``r = 1.5 * (i / (knots - 1))**2``, the deviation of programming (microsiemens), the mean and the deviation of the
            drift's exponent, and the factor of the read noise.
        read_seed: As ``seed``, of the read noise alone; None: that of the chip.
        gain: What the result is multiplied by, in the shapes of ``wmax``; None: 1.
        cell: ``"pair"``: two devices, one for each sign; ``"single"``: one device, whose range stands for both;
            ``"signed"``: one number with its sign, to whose magnitude ``curves`` apply.
        significances: Of the pairs of a cell, in the order in which they are used; one for other cells.
        g_min: Conductance of a weight of 0 (``"single"``: of the smallest weight).
        g_max: Largest conductance.
        log2_time: ``log2((t + t_0) / t_0)``; 0: no drift.
        read: ``sqrt(ln((t + t_0 + t_read) / (2 t_read)))``, times any scale; 0: no read noise.
        shift: Added to each conductance after the drift.
        spread: Deviation of what is added beside it, once per device.
        lowest: Smallest conductance that is read (what is programmed may be smaller, but not below 0 unless ``lowest`` is).
        highest: Largest.
        stuck_low: Devices whose own normal is below it stay at ``g_min``.
        stuck_high: Devices whose own normal is above it stay at ``g_max``.
        moment: Number of the reading, in ``0 .. 2**31 - 1``; each has read noise of its own.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    significances = tuple(map(float, significances))
    check.matrix("weight", weight)
    check.tensors(wmax=wmax, curves=curves, gain=gain)
    check.require(
        wmax.ndim == 2 and 1 <= wmax.shape[0] <= weight.shape[1] and wmax.shape[1] in (1, weight.shape[0]),
        lambda: (
            f"wmax: got shape {check.shape_of(wmax)}; allowed are (slices, {weight.shape[0]}) and (slices, 1), for 1 to "
            f"{weight.shape[1]} slices"
        ),
    )
    check.require(
        curves.ndim == 2 and curves.shape[0] >= 2 and curves.shape[1] == 4 and curves.dtype == torch.float32,
        lambda: f"curves: got {curves.dtype} of shape {check.shape_of(curves)}; float32 of shape (knots, 4) is needed",
    )
    check.require(
        gain is None or (gain.ndim == 2 and len(gain) == len(wmax) and gain.shape[1] in (1, weight.shape[0])),
        lambda: (
            f"gain: got shape {None if gain is None else check.shape_of(gain)}; allowed are ({len(wmax)}, "
            f"{weight.shape[0]}) and ({len(wmax)}, 1)"
        ),
    )
    check.seed_given(seed, True, "program", may_be_placed=False)
    check.seed_given(read_seed, False, "read noise", may_be_placed=False)
    check.together("weight", weight, wmax=wmax, seed=seed, read_seed=read_seed, curves=curves, gain=gain)
    check.require(cell in CELLS, lambda: f"cell: got {cell!r}; allowed are {', '.join(map(repr, CELLS))}")
    check.require(
        len(significances) >= 1
        and (cell == "pair" or len(significances) == 1)
        and all(isfinite(f) and f > 0 for f in significances),
        lambda: f"significances: got {significances}; numbers > 0 are needed, and one alone unless cell is 'pair'",
    )
    check.require(
        isfinite(g_max) and 0 <= g_min < g_max,
        lambda: f"g_min, g_max: got {g_min} and {g_max}; 0 <= g_min < g_max is needed, in microsiemens",
    )
    for name, value in (("log2_time", log2_time), ("read", read), ("spread", spread)):
        check.non_negative(name, value)
    check.require(isfinite(shift), lambda: f"shift: got {shift}; a finite number is needed")
    check.require(lowest <= highest, lambda: f"lowest: got {lowest}, above highest, {highest}")
    check.require(stuck_low <= stuck_high, lambda: f"stuck_low: got {stuck_low}, above stuck_high, {stuck_high}")
    check.require(0 <= moment < 2**31, lambda: f"moment: got {moment}; allowed are 0 to 2**31 - 1")
    return _program(
        weight, wmax, seed, curves.contiguous(), read_seed, gain, cell, significances, g_min, g_max, log2_time, read, shift,
        spread, lowest, highest, stuck_low, stuck_high, moment,
    )  # fmt: skip
