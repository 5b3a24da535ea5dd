"""Moments and standard deviation per slice, one read of the input (SEMANTICS 8).

Every lane of a program keeps count, mean and squared deviations of the numbers it has seen and waits for no other lane; the
lanes are merged once, at the end of the program, and the programs by a second kernel. All merge as Chan et al. (1979), in a
fixed order, so two runs give the same bits. What is merged are means as distances from the slice's first element: a
constant slice then has deviation 0 exactly, and a mean far from 0 costs no precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

import triton_analog.reference as reference
from triton_analog.launch import aligned, block, cdiv, launch
from triton_analog.launch.lookup import choose
from triton_analog.launch.space import POWERS, Problem, Space, tile_fits
from triton_analog.ops import _checks as check
from triton_analog.ops._columns import column_masks, slice_span
from triton_analog.ops._operator import Operator

MAX_PROGRAMS = 1024
"""Enough to fill a GPU twice over. More would cost time where all they find is that their slice need not be read."""

# Which slices are read: all, those with a flag, those whose counter is below a limit.
ALL = tl.constexpr(0)
FLAGGED = tl.constexpr(1)
COUNTED = tl.constexpr(2)


@dataclass(frozen=True)
class StdConfig:
    """A program takes ``steps_m`` by ``steps_k`` tiles; a tile has ``LOADS`` rows for each lane of ``BLOCK_M x BLOCK_K``."""

    LOADS: int
    BLOCK_M: int
    BLOCK_K: int
    programs: int = MAX_PROGRAMS
    num_warps: int = 4


def default_config(problem: Problem) -> StdConfig:
    """Each of 128 threads loads 16 bytes of eight rows at once."""
    rows, width = problem.sizes
    lanes = 128 * 16 // problem.dtype.itemsize
    loads = block(rows, 8, smallest=1)
    block_m = block(cdiv(rows, loads), lanes // block(width, 128), smallest=1)
    return StdConfig(LOADS=loads, BLOCK_M=block_m, BLOCK_K=block(width, lanes // block_m))


def _fits(problem: Problem, config: StdConfig) -> bool:
    lane_bytes = config.BLOCK_M * config.BLOCK_K * problem.dtype.itemsize / (32 * config.num_warps)
    return lane_bytes <= 16 and tile_fits(
        problem, config.LOADS * config.BLOCK_M, config.BLOCK_K, least=2048, most=2**16
    )


SPACE = Space(
    "std", StdConfig, sizes=("rows", "width"), formula=default_config, fits=_fits,
    values={
        "LOADS": POWERS[:5], "BLOCK_M": POWERS[:7], "BLOCK_K": POWERS[4:12], "programs": (512, 1024), "num_warps": (4, 8),
    },
)  # fmt: skip


@triton.jit
def merge(count, mean, m2, count_b, mean_b, m2_b):
    """Moments of the union of two samples, elementwise; an empty one changes nothing."""
    total = count + count_b
    share = count_b / tl.maximum(total, 1.0)
    delta = mean_b - mean
    return total, mean + delta * share, m2 + m2_b + delta * (delta * (count * share))


@triton.jit
def merge_all(total, count, mean, m2):
    """Mean and squared deviations of the union of all samples in a block, ``total`` numbers together."""
    merged = tl.sum(count * mean) / tl.maximum(total, 1.0)
    delta = mean - merged
    return merged, tl.sum(m2 + count * delta * delta)


@triton.jit
def unbiased_std(count, m2):
    """Standard deviation from count and squared deviations; 0 for fewer than two numbers."""
    return tl.where(count > 1, tl.sqrt_rn(tl.div_rn(m2, tl.maximum(count - 1, 1.0))), 0.0)


@triton.jit
def moments_of_rows(x_ptr, address, step, mask, shift, LOADS: tl.constexpr):
    """Mean and squared deviations, per lane, of ``LOADS`` rows whose addresses are ``step`` apart.

    The mean is needed before the deviations, so all loads are under way before the first number is used.
    """
    numbers = tl.tuple(())
    for i in tl.static_range(LOADS):
        x = tl.load(x_ptr + (address + i * step), mask=mask, other=0.0).to(tl.float32)
        numbers = numbers + (x - shift,)  # noqa: RUF005  a kernel cannot unpack
    total = numbers[0]
    for i in tl.static_range(1, LOADS):
        total += numbers[i]
    mean = total * (1.0 / LOADS)
    m2 = tl.zeros_like(mean)
    for i in tl.static_range(LOADS):
        m2 += (numbers[i] - mean) * (numbers[i] - mean)
    return mean, m2


@triton.jit
def moments_of_lanes(
    x_ptr, k, rows, stride_m, stride_k, mask, pivot, LOADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Count ``[BLOCK_M, 1]``, mean less ``pivot`` and squared deviations ``[BLOCK_M, BLOCK_K]`` of columns ``k``."""
    if x_ptr.dtype.element_ty == tl.float32:
        shift = pivot
    else:  # an fp32 mean of 16-bit numbers is exact enough as it is
        shift = 0.0
    count = tl.zeros((BLOCK_M, 1), tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    full = rows // (LOADS * BLOCK_M) * (LOADS * BLOCK_M)
    column = k.to(tl.int64) * stride_k
    for first in range(0, full, LOADS * BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)[:, None]
        step = tl.full((1, 1), BLOCK_M, tl.int64) * stride_m
        mean_b, m2_b = moments_of_rows(x_ptr, m.to(tl.int64) * stride_m + column, step, mask, shift, LOADS)
        count, mean, m2 = merge(count, mean, m2, LOADS, mean_b, m2_b)
    for first in range(full, rows, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)[:, None]
        x = tl.load(x_ptr + (m.to(tl.int64) * stride_m + column), mask=mask & (m < rows), other=0.0).to(tl.float32)
        count, mean, m2 = merge(count, mean, m2, (m < rows).to(tl.float32), x - shift, 0.0)
    return count, mean + (shift - pivot), m2


@triton.jit(do_not_specialize=["M", "steps_m", "steps_k", "limit"])
def moments_kernel(
    x_ptr, which_ptr, parts_ptr, M, K, S, stride_m, stride_k, steps_m, steps_k, limit,
    WHICH: tl.constexpr, ALIGNED: tl.constexpr, LOADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``parts [S, 4, P]``: count, mean and squared deviations of the distances from a pivot, and the pivot."""
    s, part_k, part_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    origin, start, end = slice_span(s, K, S, ALIGNED)
    if WHICH == FLAGGED:
        end = tl.where(tl.load(which_ptr + s) != 0, end, origin)
    if WHICH == COUNTED:
        end = tl.where(tl.load(which_ptr + s) < limit, end, origin)
    pivot = tl.load(x_ptr + start.to(tl.int64) * stride_k, mask=start < end, other=0.0).to(tl.float32)
    first_m = part_m * steps_m * (LOADS * BLOCK_M)
    rows = tl.minimum(steps_m * (LOADS * BLOCK_M), M - first_m)
    rows_ptr = x_ptr + first_m.to(tl.int64) * stride_m
    first_k = origin + part_k * steps_k * BLOCK_K
    count, mean, m2 = 0.0, 0.0, 0.0
    for tile in range(first_k, tl.minimum(first_k + steps_k * BLOCK_K, end), BLOCK_K):
        k = tile + tl.arange(0, BLOCK_K)[None, :]
        loaded, inside = column_masks(k, start, end, K, ALIGNED)
        lane_count, lane_mean, lane_m2 = moments_of_lanes(
            rows_ptr, k, rows, stride_m, stride_k, loaded, pivot, LOADS, BLOCK_M, BLOCK_K
        )
        columns = tl.maximum(tl.minimum(tile + BLOCK_K, end) - tl.maximum(tile, start), 0)
        tile_count = rows.to(tl.float32) * columns.to(tl.float32)
        tile_mean, tile_m2 = merge_all(
            tile_count,
            tl.where(inside, lane_count, 0.0),
            tl.where(inside, lane_mean, 0.0),
            tl.where(inside, lane_m2, 0.0),
        )
        count, mean, m2 = merge(count, mean, m2, tile_count, tile_mean, tile_m2)
    P = tl.num_programs(1) * tl.num_programs(2)
    part_ptr = parts_ptr + s.to(tl.int64) * 4 * P + part_k * tl.num_programs(2) + part_m
    tl.store(part_ptr, count)
    tl.store(part_ptr + P, mean)
    tl.store(part_ptr + 2 * P, m2)
    tl.store(part_ptr + 3 * P, pivot)


@triton.jit
def merged_moments(parts_ptr, s, P, BLOCK_P: tl.constexpr):
    """Count, mean and squared deviations of slice ``s`` from ``parts [S, 4, P]``."""
    p = tl.arange(0, BLOCK_P)
    base = parts_ptr + s.to(tl.int64) * 4 * P
    counts = tl.load(base + p, mask=p < P, other=0.0)
    means = tl.load(base + P + p, mask=p < P, other=0.0)
    m2s = tl.load(base + 2 * P + p, mask=p < P, other=0.0)
    count = tl.sum(counts)
    mean, m2 = merge_all(count, counts, means, m2s)
    return count, tl.load(base + 3 * P) + mean, m2


@triton.jit(do_not_specialize=["P"])
def merge_moments_kernel(parts_ptr, out_ptr, P, STD: tl.constexpr, BLOCK_P: tl.constexpr):
    """``out [S, 3]``: the moments; with ``STD`` ``out [S]``: the standard deviation."""
    s = tl.program_id(0)
    count, mean, m2 = merged_moments(parts_ptr, s, P, BLOCK_P)
    if STD:
        tl.store(out_ptr + s, unbiased_std(count, m2))
    else:
        tl.store(out_ptr + s * 3, count)
        tl.store(out_ptr + s * 3 + 1, mean)
        tl.store(out_ptr + s * 3 + 2, m2)


def launch_parts(
    x: Tensor, slices: int, which: Tensor | None, limit: int | None = None, config: StdConfig | None = None
) -> Tensor:
    """Moments ``[S, 4, P]`` of ``P`` parts of every slice; ``which [S]`` holds flags, or counters if there is a ``limit``."""
    M, K = x.shape
    width = cdiv(K, slices)
    config = config or choose(SPACE, x.device, x.dtype, (M, width))
    width += 0 if aligned(K, slices) else 15  # a slice's first tile may begin before it
    tiles_m, tiles_k = cdiv(M, config.LOADS * config.BLOCK_M), cdiv(width, config.BLOCK_K)
    programs = max(1, config.programs // slices)
    steps_k = cdiv(tiles_k, programs)
    steps_m = cdiv(tiles_m * cdiv(tiles_k, steps_k), programs)
    grid = slices, cdiv(tiles_k, steps_k), cdiv(tiles_m, steps_m)
    parts = torch.empty(slices, 4, grid[1] * grid[2], dtype=torch.float32, device=x.device)
    kind = COUNTED if limit is not None else ALL if which is None else FLAGGED
    launch(
        moments_kernel, grid, x.device, x, which, parts, M, K, slices, *x.stride(), steps_m, steps_k,
        limit or 0, WHICH=kind.value, ALIGNED=aligned(K, slices), BLOCK_M=config.BLOCK_M, BLOCK_K=config.BLOCK_K,
        LOADS=config.LOADS, num_warps=config.num_warps,
    )  # fmt: skip
    return parts


def _merge_parts(parts: Tensor, out: Tensor, std: bool) -> Tensor:
    slices, _, count = parts.shape
    launch(merge_moments_kernel, (slices,), parts.device, parts, out, count, STD=std, BLOCK_P=block(count, 2**20))
    return out


def launch_moments(x: Tensor, slices: int, active: Tensor | None, config: StdConfig | None = None) -> Tensor:
    out = torch.empty(slices, 3, dtype=torch.float32, device=x.device)
    return _merge_parts(launch_parts(x, slices, active, config=config), out, std=False)


def launch_std(x: Tensor, slices: int, config: StdConfig | None = None) -> Tensor:
    out = torch.empty(slices, dtype=torch.float32, device=x.device)
    return _merge_parts(launch_parts(x, slices, None, config=config), out, std=True)


def _fake_moments(x: Tensor, slices: int) -> Tensor:
    return x.new_empty(slices, 3, dtype=check.wide_dtype(x))


_moments = Operator("moments", launch_moments, reference.moments, _fake_moments)


def _check_sample(x: Tensor, slices: int) -> None:
    check.matrix("x", x)
    check.require(x.shape[0] > 0, lambda: f"x: got shape {check.shape_of(x)}; an empty tensor has no moments")
    check.slice_count(x.shape[1], slices)


def moments(x: Tensor, slices: int, active: Tensor | None = None) -> Tensor:
    """Count, mean and sum of squared deviations of every slice of ``x [M, K]``: ``[S, 3]``, fp32 (fp64 for fp64).

    Args:
        x: Matrix ``[M, K]`` with at least one row.
        slices: Number of slices of the columns.
        active: bool ``[S]``; slices that are not active are not read and give zeros. The condition stays on the device.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: ``x`` is not a matrix or is empty, ``slices`` is not in ``1 .. K``, or ``active`` does not fit.
    """
    _check_sample(x, slices)
    if active is not None:
        check.require(
            active.dtype == torch.bool and check.shape_of(active) == (slices,),
            lambda: (
                f"active: got {active.dtype} of shape {check.shape_of(active)}; a bool tensor of shape ({slices},) is needed"
            ),
        )
        check.together("x", x, active=active)
    return _moments(x.detach(), slices, active)


def _fake_std(x: Tensor, slices: int) -> Tensor:
    return x.new_empty(slices, dtype=check.wide_dtype(x))


_std = Operator("std", launch_std, reference.std, _fake_std)


def std(x: Tensor, slices: int) -> Tensor:
    """Unbiased standard deviation of every slice of ``x [M, K]``: ``[S]``, fp32 (fp64 for fp64).

    A slice of one element has standard deviation 0; inf and NaN give NaN. Not differentiable. Raises as :func:`moments`.
    """
    _check_sample(x, slices)
    return _std(x.detach(), slices)
