"""The learned input range: its update from data and its gradient (SEMANTICS 6 and 7).

``dr = r * (sum over x >= |r| of min(g, 0) - sum over x <= -|r| of max(g, 0) + decay * [share of |x| < |r| > threshold])``

where ``g`` is the gradient of the clamped input. The stored range may be negative: its absolute value is the range, and
``dr`` above is already the gradient of the stored value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

import triton_analog.reference as reference
from triton_analog.lang import cast, slice_bounds
from triton_analog.launch import aligned, block, cdiv, launch
from triton_analog.launch.lookup import choose
from triton_analog.launch.space import POWERS, Problem, Space, tile_fits
from triton_analog.ops import _checks as check
from triton_analog.ops._columns import column_masks, slice_span
from triton_analog.ops._operator import Operator
from triton_analog.ops.std import MAX_PROGRAMS, StdConfig, launch_parts, merged_moments, unbiased_std


@dataclass(frozen=True)
class InputRangeConfig:
    BLOCK_M: int
    BLOCK_K: int
    num_warps: int = 4


def default_config(problem: Problem) -> InputRangeConfig:
    rows, width = problem.sizes
    return InputRangeConfig(BLOCK_M=block(rows, 32), BLOCK_K=block(width, 128))


def _fits(problem: Problem, config: InputRangeConfig) -> bool:
    return tile_fits(problem, config.BLOCK_M, config.BLOCK_K, least=512, most=8192, smallest=16)


SPACE = Space(
    "input_range_grad", InputRangeConfig, sizes=("rows", "width"), formula=default_config, fits=_fits,
    values={"BLOCK_M": POWERS[4:8], "BLOCK_K": POWERS[4:10], "num_warps": (4, 8)},
)  # fmt: skip


# ---- Gradient -------------------------------------------------------------------------------------------------------


@triton.jit
def range_grad_sums(grad, above, below, passes, FAST: tl.constexpr):
    """A tile's share of the two sums behind ``dr``: the gradient that would widen the range, and how many do not clip.

    ``above`` and ``below``: at or beyond the range; ``passes``: within the range or at it.
    """
    if FAST:
        widen = tl.where(above, grad, 0.0) - tl.where(below, grad, 0.0)
    else:
        widen = tl.where(above, tl.minimum(grad, 0.0), 0.0) - tl.where(below, tl.maximum(grad, 0.0), 0.0)
    return tl.sum(widen), tl.sum((passes & (above == 0) & (below == 0)).to(tl.float32))


@triton.jit(do_not_specialize=["P", "M"])
def range_grad_kernel(
    parts_ptr,
    range_ptr,
    out_ptr,
    P,
    M,
    K,
    S,
    decay,
    input_min_percentage,
    FAST: tl.constexpr,
    TALLY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Add the tiles' sums ``parts [S, P, 2]`` in a fixed order and finish ``dr``; or, without the decay, the rows of a tally."""
    s = tl.program_id(0)
    _, width = slice_bounds(s, K, S, ALIGNED)
    widen = tl.zeros((BLOCK_P,), tl.float32)
    unclipped = tl.zeros((BLOCK_P,), tl.float32)
    for first in range(0, P, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        address = (s.to(tl.int64) * P + p) * 2
        widen += tl.load(parts_ptr + address, mask=p < P, other=0.0)
        unclipped += tl.load(parts_ptr + address + 1, mask=p < P, other=0.0)
    r = tl.load(range_ptr + s).to(tl.float32)
    total = tl.sum(widen)
    if FAST:
        dr = tl.where(r < 0, -total, total)
    elif TALLY:
        dr = r * total
        tl.store(out_ptr + S + s, tl.sum(unclipped))
        tl.store(out_ptr + 2 * S + s, M * 1.0 * width)
    else:
        share = tl.sum(unclipped) / (M * 1.0 * width)
        dr = r * (total + tl.where(share > input_min_percentage, decay, 0.0))
    tl.store(out_ptr + s, cast(dr, out_ptr.dtype.element_ty))


def launch_range_grad(
    parts: Tensor,
    input_range: Tensor,
    rows: int,
    features: int,
    decay: float,
    threshold: float,
    fast_mode: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``dr [S]``; with a negative ``decay`` fp32 ``[3, S]``: ``dr`` without it, how many inputs do not clip, and how many there
    are. Who adds up the latter can decide about the decay of several batches together."""
    slices, count, _ = parts.shape
    tally = decay < 0 and not fast_mode
    shape, dtype = ((3, slices), torch.float32) if tally else ((slices,), dtype)
    out = torch.empty(shape, dtype=dtype, device=parts.device)
    launch(
        range_grad_kernel, (slices,), parts.device, parts, input_range, out, count, rows, features, slices,
        decay, threshold, FAST=fast_mode, TALLY=tally, ALIGNED=aligned(features, slices), BLOCK_P=block(count, 1024),
    )  # fmt: skip
    return out


def empty_range_grad(input_range: Tensor, decay: float) -> Tensor:
    """What :func:`launch_range_grad` gives, for operators' fakes."""
    if decay >= 0:
        return torch.empty_like(input_range)
    return input_range.new_empty(3, input_range.shape[0], dtype=check.wide_dtype(input_range))


@triton.jit(do_not_specialize=["M"])
def input_range_grad_kernel(
    grad_ptr, x_ptr, range_ptr, dx_ptr, parts_ptr, M, K, S, stride_gm, stride_gk, stride_xm, stride_xk,
    FAST: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(2)
    start, width = slice_bounds(s, K, S, ALIGNED)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    k = (start + column).to(tl.int64)
    inside = (m < M) & (column < width)
    r = tl.abs(tl.load(range_ptr + s).to(tl.float32))
    x = tl.load(x_ptr + m * stride_xm + k * stride_xk, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + m * stride_gm + k * stride_gk, mask=inside, other=0.0).to(tl.float32)
    passes = inside & (tl.abs(x) <= r)
    widen, unclipped = range_grad_sums(grad, inside & (x >= r), inside & (x <= -r), passes, FAST)
    part = (s * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(parts_ptr + part * 2, widen)
    tl.store(parts_ptr + part * 2 + 1, unclipped)
    dx = cast(tl.where(passes, grad, 0.0), dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + m * K + k, dx, mask=inside)


def launch_input_range_grad(
    grad: Tensor,
    x: Tensor,
    input_range: Tensor,
    slices: int,
    decay: float,
    input_min_percentage: float,
    fast_mode: bool,
    config: InputRangeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    width = cdiv(K, slices)
    config = config or choose(SPACE, x.device, x.dtype, (M, width))
    input_range = input_range.contiguous()
    grid = (cdiv(M, config.BLOCK_M), cdiv(width, config.BLOCK_K), slices)
    dx = torch.empty(M, K, dtype=grad.dtype, device=x.device)
    parts = torch.empty(slices, grid[0] * grid[1], 2, dtype=torch.float32, device=x.device)
    launch(
        input_range_grad_kernel, grid, x.device, grad, x, input_range, dx, parts, M, K, slices,
        *grad.stride(), *x.stride(), FAST=fast_mode, ALIGNED=aligned(K, slices), **vars(config),
    )  # fmt: skip
    return dx, launch_range_grad(parts, input_range, M, K, decay, input_min_percentage, fast_mode)


def _fake_grad(grad: Tensor, x: Tensor, slices: int, decay: float, fast_mode: bool) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(grad, memory_format=torch.contiguous_format)
    shape = (3, slices) if decay < 0 and not fast_mode else (slices,)
    return dx, x.new_empty(shape, dtype=check.wide_dtype(x))


_input_range_grad = Operator("input_range_grad", launch_input_range_grad, reference.input_range_grad, _fake_grad)


def input_range_grad(
    grad: Tensor,
    x: Tensor,
    input_range: Tensor,
    slices: int,
    *,
    decay: float = 0.0,
    input_min_percentage: float = 0.95,
    fast_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of the input clamp in its input ``[M, K]`` and in its range ``[S]`` (fp32).

    Args:
        grad: Gradient ``[M, K]`` of the clamped input.
        x: The input ``[M, K]`` before the clamp.
        input_range: ``[S]``, the stored ranges.
        slices: Number of slices of the columns.
        decay: Pull of the range towards 0 where almost nothing clips; 0 is off.
        input_min_percentage: Share of unclipped inputs above which ``decay`` acts.
        fast_mode: The plain gradient of a clamp instead of the learned-range rule.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.matrix("x", x)
    check.matrix("grad", grad, columns=x.shape[1])
    check.require(
        grad.shape == x.shape,
        lambda: f"grad: got shape {check.shape_of(grad)}; that of x, {check.shape_of(x)}, is needed",
    )
    check.slice_count(x.shape[1], slices)
    check.static_range(input_range, slices)
    check.together("x", x, grad=grad, input_range=input_range)
    check.range_rule(decay, input_min_percentage)
    return _input_range_grad(grad, x, input_range, slices, decay, input_min_percentage, fast_mode)


# ---- Update from data -----------------------------------------------------------------------------------------------


def recomputing() -> bool:
    """Inside a backward: a forward that runs there is activation checkpointing's, and its batch was counted already."""
    return torch._C._current_graph_task_id() != -1


@triton.jit
def update_range(range_ptr, count_ptr, residual_ptr, s, inside, std, init_from_data, init_std_alpha):
    """The update of slices ``s``, whose data have standard deviation ``std``."""
    r = tl.load(range_ptr + s, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        r += tl.load(residual_ptr + s, mask=inside, other=0.0).to(tl.float32)
    count = tl.load(count_ptr + s, mask=inside, other=0)
    due = (count < init_from_data) & (std > 0) & (std < float("inf"))
    estimate = tl.div_rn(r * count.to(tl.float32) + init_std_alpha * std, count.to(tl.float32) + 1)
    r = tl.abs(tl.where(due, estimate, r))
    stored = cast(r, range_ptr.dtype.element_ty)
    tl.store(range_ptr + s, stored, mask=inside)
    if residual_ptr is not None:
        tl.store(residual_ptr + s, cast(r - stored.to(tl.float32), residual_ptr.dtype.element_ty), mask=inside)
    tl.store(count_ptr + s, count + due.to(count.dtype), mask=inside)


@triton.jit(do_not_specialize=["init_from_data"])
def input_range_update_kernel(
    range_ptr, count_ptr, residual_ptr, moments_ptr, S, init_from_data, init_std_alpha, BLOCK_S: tl.constexpr
):
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    n = tl.load(moments_ptr + s * 3, mask=s < S, other=0.0)
    m2 = tl.load(moments_ptr + s * 3 + 2, mask=s < S, other=0.0)
    std = unbiased_std(n, m2)
    update_range(range_ptr, count_ptr, residual_ptr, s, s < S, std, init_from_data, init_std_alpha)


def launch_input_range_update(
    input_range: Tensor, count: Tensor, residual: Tensor, moments: Tensor, init_from_data: int, init_std_alpha: float
) -> None:
    slices = input_range.shape[0]
    block_s = block(slices, 1024)
    launch(
        input_range_update_kernel, (cdiv(slices, block_s),), input_range.device, input_range, count, residual,
        moments.contiguous(), slices, init_from_data, init_std_alpha, BLOCK_S=block_s,
    )  # fmt: skip


_input_range_update = Operator(
    "input_range_update", launch_input_range_update, reference.input_range_update,
    mutates=("input_range", "count", "residual"), unless=recomputing,
)  # fmt: skip


def _check_state(input_range: Tensor, count: Tensor, init_from_data: int, **others: Tensor) -> None:
    slices = input_range.numel()
    check.require(
        input_range.ndim == 1 and input_range.is_contiguous(),
        lambda: (
            f"input_range: got shape {check.shape_of(input_range)} with strides {input_range.stride()}; "
            "a contiguous vector with one range per slice is needed, it is updated in place"
        ),
    )
    if count.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"count: got {count.dtype}; int32 or int64 is needed, a float counter saturates in half precision"
        )
    for name, state in {"count": count, **others}.items():
        if check.shape_of(state) != (slices,) or not state.is_contiguous():
            raise ValueError(
                f"{name}: got shape {check.shape_of(state)} with strides {state.stride()}; a contiguous vector with one "
                f"entry per slice, ({slices},), is needed"
            )
    check.together("input_range", input_range, count=count, **others)
    check.require(
        init_from_data >= 0, lambda: f"init_from_data: got {init_from_data}; allowed is a number of batches >= 0"
    )


def input_range_update(
    input_range: Tensor, count: Tensor, residual: Tensor, moments: Tensor, *, init_from_data: int, init_std_alpha: float
) -> None:
    """Move ``input_range`` towards ``init_std_alpha`` standard deviations of the data, in place (SEMANTICS 7).

    ``r = (r * count + init_std_alpha * std) / (count + 1)`` for every slice with ``count < init_from_data`` and a finite
    ``std > 0``; its count goes up by one. Ranges become non-negative. All conditions stay on the device.

    Args:
        input_range: ``[S]``, changed in place; not differentiable, call under ``torch.no_grad()``.
        count: Integer ``[S]``, batches seen so far, changed in place.
        residual: ``[S]``, changed in place: what the range's dtype rounds off, so that a mean in bf16 does not freeze.
        moments: ``[S, 3]`` of :func:`triton_analog.ops.moments`; under data parallelism merged over all ranks.
        init_from_data: Number of batches to learn from.
        init_std_alpha: Standard deviations that the range spans on either side.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes outside the above.
    """
    _check_state(input_range, count, init_from_data, residual=residual)
    check.require(
        check.shape_of(moments) == (input_range.shape[0], 3),
        lambda: f"moments: got shape {check.shape_of(moments)}; ({input_range.shape[0]}, 3) is needed",
    )
    check.together("input_range", input_range, moments=moments)
    check.non_negative("init_std_alpha", init_std_alpha)
    _input_range_update(input_range, count, residual, moments, init_from_data, init_std_alpha)


# ---- Statistics and update at once --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["P", "init_from_data"])
def input_range_learn_kernel(
    range_ptr, count_ptr, residual_ptr, parts_ptr, P, init_from_data, init_std_alpha, BLOCK_P: tl.constexpr
):
    """Merge the parts of a slice's moments and update its range; a slice that was not read has count 0, so no deviation."""
    s = tl.program_id(0)
    n, _, m2 = merged_moments(parts_ptr, s, P, BLOCK_P)
    std = unbiased_std(n, m2)
    update_range(range_ptr, count_ptr, residual_ptr, s, s >= 0, std, init_from_data, init_std_alpha)


def launch_input_range_learn(
    x: Tensor,
    input_range: Tensor,
    count: Tensor,
    residual: Tensor | None,
    slices: int,
    init_from_data: int,
    init_std_alpha: float,
    config: StdConfig | None = None,
) -> None:
    parts = launch_parts(x, slices, count, init_from_data, config)
    P = parts.shape[2]
    launch(
        input_range_learn_kernel, (slices,), x.device, input_range, count, residual, parts, P, init_from_data,
        init_std_alpha, BLOCK_P=block(P, 2**20),
    )  # fmt: skip


_input_range_learn = Operator(
    "input_range_learn", launch_input_range_learn, reference.input_range_learn,
    mutates=("input_range", "count", "residual"), unless=recomputing,
)  # fmt: skip


def input_range_learn(
    x: Tensor,
    input_range: Tensor,
    count: Tensor,
    residual: Tensor | None,
    slices: int,
    *,
    init_from_data: int,
    init_std_alpha: float,
) -> None:
    """:func:`triton_analog.ops.moments` of ``x`` and :func:`input_range_update` with them, in place, in two launches.

    Slices whose start-up is over, ``count >= init_from_data``, are not read; their ranges become non-negative. All
    conditions stay on the device. A forward recomputed in the backward (activation checkpointing) changes nothing.

    Args:
        x: The batch ``[M, K]``, at least one row, any strides.
        input_range: ``[S]``, changed in place; not differentiable, call under ``torch.no_grad()``.
        count: Integer ``[S]``, batches seen so far, changed in place.
        residual: ``[S]``, changed in place: what the range's dtype rounds off; None drops it.
        slices: Number of slices of the columns.
        init_from_data: Number of batches to learn from.
        init_std_alpha: Standard deviations that the range spans on either side.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.matrix("x", x)
    check.require(
        x.shape[0] > 0, lambda: f"x: got shape {check.shape_of(x)}; nothing can be learned from an empty batch"
    )
    check.slice_count(x.shape[1], slices)
    check.static_range(input_range, slices)
    _check_state(input_range, count, init_from_data, **({} if residual is None else {"residual": residual}))
    check.together("x", x, input_range=input_range)
    check.non_negative("init_std_alpha", init_std_alpha)
    _input_range_learn(x.detach(), input_range, count, residual, slices, init_from_data, init_std_alpha)


# ---- Fast mode: running extreme values --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExtremaConfig:
    """``programs`` share the tiles of all slices."""

    BLOCK_M: int
    BLOCK_K: int
    programs: int = 2 * MAX_PROGRAMS
    num_warps: int = 4


def default_extrema_config(problem: Problem) -> ExtremaConfig:
    """Tiles of 8192 numbers: each of 128 threads then waits for eight 16-byte loads of bf16 at once.

    Rows that are no multiple of 16 numbers are loaded one number at a time, with an address for each: 2048 then.
    """
    (rows, width), (wide_loads,) = problem.sizes, problem.flags
    numbers = 8192 if wide_loads else 2048
    block_m = block(rows, numbers // block(width, 128), smallest=1)
    return ExtremaConfig(block_m, block(width, numbers // block_m))


def _extrema_fits(problem: Problem, config: ExtremaConfig) -> bool:
    return tile_fits(problem, config.BLOCK_M, config.BLOCK_K, least=2048, most=16384)


EXTREMA_SPACE = Space(
    "extrema", ExtremaConfig, sizes=("rows", "width"), flags=("wide_loads",), formula=default_extrema_config,
    fits=_extrema_fits,
    values={"BLOCK_M": POWERS[:10], "BLOCK_K": POWERS[4:14], "programs": (1024, 2048), "num_warps": (4, 8)},
)  # fmt: skip


@triton.jit
def ordered(bits):
    """The bits of an fp32 number as an integer in the order of the numbers, NaN at the ends; and back again."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["M"])
def extrema_kernel(
    x_ptr, parts_ptr, M, K, S, stride_m, stride_k, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Smallest and largest number of every part of a slice, as :func:`ordered` integers: ``parts [2, S, P]``."""
    s, P = tl.program_id(0), tl.num_programs(1)
    origin, start, end = slice_span(s, K, S, ALIGNED)
    # Numbers outside the slice are replaced by one of its own.
    first = tl.load(x_ptr + start.to(tl.int64) * stride_k).to(tl.float32)
    low = ordered(first.to(tl.int32, bitcast=True))
    high = low
    tiles_k = tl.cdiv(end - origin, BLOCK_K)
    for tile in range(tl.program_id(1), tl.cdiv(M, BLOCK_M) * tiles_k, P):
        m = tile // tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        k = origin + tile % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        loaded, inside = column_masks(k, start, end, K, ALIGNED)
        address = m.to(tl.int64) * stride_m + k.to(tl.int64) * stride_k
        x = tl.load(x_ptr + address, mask=(m < M) & loaded, other=0.0).to(tl.float32)
        order = ordered(tl.where((m < M) & inside, x, first).to(tl.int32, bitcast=True))
        low = tl.minimum(low, tl.min(order))
        high = tl.maximum(high, tl.max(order))
    part_ptr = parts_ptr + s.to(tl.int64) * P + tl.program_id(1)
    tl.store(part_ptr, low)
    tl.store(part_ptr + tl.num_programs(0).to(tl.int64) * P, high)


@triton.jit(do_not_specialize=["P"])
def merge_extrema_kernel(parts_ptr, out_ptr, P, BLOCK_P: tl.constexpr):
    """``out [2, S]`` from ``parts [2, S, P]``. NaN is above or below all others, by its sign, and takes both results."""
    s, S = tl.program_id(0), tl.num_programs(0)
    p = tl.arange(0, BLOCK_P)
    lows = tl.load(parts_ptr + s.to(tl.int64) * P + p, mask=p < P, other=0x7FFFFFFF)
    highs = tl.load(parts_ptr + (S + s).to(tl.int64) * P + p, mask=p < P, other=-0x80000000)
    low = ordered(tl.min(lows)).to(tl.float32, bitcast=True)
    high = ordered(tl.max(highs)).to(tl.float32, bitcast=True)
    tl.store(out_ptr + s, tl.where(high == high, low, high))
    tl.store(out_ptr + S + s, tl.where(low == low, high, low))


def launch_extrema(x: Tensor, slices: int, config: ExtremaConfig | None = None) -> Tensor:
    M, K = x.shape
    width = cdiv(K, slices)
    config = config or choose(EXTREMA_SPACE, x.device, x.dtype, (M, width), (K % 16 == 0,))
    tiles = cdiv(M, config.BLOCK_M) * cdiv(width, config.BLOCK_K)
    programs = max(1, min(tiles, config.programs // slices))
    parts = torch.empty(2, slices, programs, dtype=torch.int32, device=x.device)
    launch(
        extrema_kernel, (slices, programs), x.device, x, parts, M, K, slices, *x.stride(),
        ALIGNED=aligned(K, slices), BLOCK_M=config.BLOCK_M, BLOCK_K=config.BLOCK_K, num_warps=config.num_warps,
    )  # fmt: skip
    out = torch.empty(2, slices, dtype=torch.float32, device=x.device)
    launch(merge_extrema_kernel, (slices,), x.device, parts, out, programs, BLOCK_P=block(programs, 2**20))
    return out


def _fake_extrema(x: Tensor, slices: int) -> Tensor:
    return x.new_empty(2, slices, dtype=check.wide_dtype(x))


_extrema = Operator("extrema", launch_extrema, reference.extrema, _fake_extrema)


def extrema(x: Tensor, slices: int) -> Tensor:
    """Smallest and largest value of every slice of ``x [M, K]``: ``[2, S]``, fp32 (fp64 for fp64). NaN propagates.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: ``x`` is not a matrix or is empty, or ``slices`` is not in ``1 .. K``.
    """
    check.matrix("x", x)
    check.require(x.shape[0] > 0, lambda: f"x: got shape {check.shape_of(x)}; an empty tensor has no extreme values")
    check.slice_count(x.shape[1], slices)
    return _extrema(x.detach(), slices)


def launch_input_range_update_fast(
    input_range: Tensor,
    count: Tensor,
    x_min: Tensor,
    x_max: Tensor,
    extrema: Tensor,
    init_from_data: int,
    momentum: float,
) -> None:
    """A few numbers per slice: torch's own operations serve on every device."""
    reference.input_range_update_fast(
        input_range, count, x_min, x_max, extrema, init_from_data=init_from_data, momentum=momentum
    )


_input_range_update_fast = Operator(
    "input_range_update_fast", launch_input_range_update_fast, reference.input_range_update_fast,
    mutates=("input_range", "count", "x_min", "x_max"), unless=recomputing,
)  # fmt: skip


def input_range_update_fast(
    input_range: Tensor,
    count: Tensor,
    x_min: Tensor,
    x_max: Tensor,
    extrema: Tensor,
    *,
    init_from_data: int,
    momentum: float,
) -> None:
    """Set ``input_range`` to the running extreme magnitude of the data, in place (SEMANTICS 7, fast mode).

    Args:
        input_range: ``[S]``, changed in place; call under ``torch.no_grad()``.
        count: Integer ``[S]``, batches seen so far, changed in place; the first batch initialises.
        x_min: ``[S]``, running smallest value, changed in place.
        x_max: ``[S]``, running largest value, changed in place.
        extrema: ``[2, S]`` of :func:`extrema`; a slice with a value that is not finite is left as it was.
        init_from_data: Number of batches to learn from.
        momentum: Weight of the old value, in ``[0, 1)``; -1 keeps all-time extremes.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    _check_state(input_range, count, init_from_data, x_min=x_min, x_max=x_max)
    check.require(
        check.shape_of(extrema) == (2, input_range.shape[0]),
        lambda: f"extrema: got shape {check.shape_of(extrema)}; (2, {input_range.shape[0]}) is needed",
    )
    check.together("input_range", input_range, extrema=extrema)
    check.require(
        momentum == -1 or 0 <= momentum < 1,
        lambda: f"momentum: got {momentum}; allowed are [0, 1), and -1 for all-time extremes",
    )
    _input_range_update_fast(input_range, count, x_min, x_max, extrema, init_from_data, momentum)
