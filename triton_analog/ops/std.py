"""Moments and standard deviation per slice, one read of the input (SEMANTICS 8).

Every program finds count, mean and squared deviations of its rows of one slice, tile by tile; a second kernel merges the
programs' moments. Both merge as Chan et al. (1979), in a fixed order, so two runs give the same bits. All of it works on
distances from the slice's first element: a constant slice then has deviation 0 exactly, and a mean far from 0 costs no
precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_analog import reference
from triton_analog.lang import slice_bounds
from triton_analog.launch import aligned, block, launch, runs_kernel
from triton_analog.ops import _checks as check

MAX_PARTS = 512


@dataclass(frozen=True)
class StdConfig:
    BLOCK_M: int
    BLOCK_K: int
    rows_per_program: int
    num_warps: int = 4


def default_config(rows: int, width: int) -> StdConfig:
    block_m = block(rows, 32)
    return StdConfig(
        BLOCK_M=block_m,
        BLOCK_K=block(width, 128),
        rows_per_program=triton.cdiv(triton.cdiv(rows, MAX_PARTS), block_m) * block_m,
    )


@triton.jit
def merge(count, mean, m2, count_b, mean_b, m2_b):
    total = count + count_b
    share = tl.where(total > 0, count_b / tl.maximum(total, 1.0), 0.0)
    delta = mean_b - mean
    return total, mean + delta * share, m2 + m2_b + delta * delta * count * share


@triton.jit(do_not_specialize=["M", "rows_per_program"])
def moments_kernel(
    x_ptr, active_ptr, parts_ptr, M, K, S, stride_m, stride_k, rows_per_program,
    HAS_ACTIVE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    part, s = tl.program_id(0), tl.program_id(1)
    start, width = slice_bounds(s, K, S, ALIGNED)
    first_row = part.to(tl.int64) * rows_per_program
    last_row = tl.minimum(first_row + rows_per_program, M)
    if HAS_ACTIVE:  # a slice that nobody asks for costs one byte
        width = tl.where(tl.load(active_ptr + s) != 0, width, 0)
    pivot = tl.load(x_ptr + start.to(tl.int64) * stride_k, mask=width > 0, other=0.0).to(tl.float32)
    count, mean, m2 = 0.0, 0.0, 0.0
    for first_k in range(0, width, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        columns = tl.minimum(width - first_k, BLOCK_K)
        for row in range(first_row, last_row, BLOCK_M):
            m = row + tl.arange(0, BLOCK_M).to(tl.int64)
            inside = (m < last_row)[:, None] & (k < width)[None, :]
            address = m[:, None] * stride_m + (start + k)[None, :].to(tl.int64) * stride_k
            x = tl.load(x_ptr + address, mask=inside, other=0.0).to(tl.float32)
            distance = tl.where(inside, x - pivot, 0.0)
            tile_count = (columns * tl.minimum(last_row - row, BLOCK_M)).to(tl.float32)
            tile_mean = tl.sum(distance) / tile_count
            deviation = tl.where(inside, distance - tile_mean, 0.0)
            tile_m2 = tl.sum(deviation * deviation)
            count, mean, m2 = merge(count, mean, m2, tile_count, tile_mean, tile_m2)
    out_ptr = parts_ptr + (part * S + s) * 4
    tl.store(out_ptr, count)
    tl.store(out_ptr + 1, mean)
    tl.store(out_ptr + 2, m2)
    tl.store(out_ptr + 3, pivot)


@triton.jit(do_not_specialize=["P"])
def merge_moments_kernel(parts_ptr, out_ptr, P, S, BLOCK_P: tl.constexpr):
    s = tl.program_id(0)
    p = tl.arange(0, BLOCK_P)
    address = (p * S + s) * 4
    count = tl.load(parts_ptr + address, mask=p < P, other=0.0)
    mean = tl.load(parts_ptr + address + 1, mask=p < P, other=0.0)
    m2 = tl.load(parts_ptr + address + 2, mask=p < P, other=0.0)
    total = tl.sum(count)
    merged = tl.sum(count * mean) / tl.maximum(total, 1.0)
    delta = mean - merged
    tl.store(out_ptr + s * 3, total)
    tl.store(out_ptr + s * 3 + 1, tl.load(parts_ptr + s * 4 + 3) + merged)
    tl.store(out_ptr + s * 3 + 2, tl.sum(m2 + count * delta * delta))


def launch_moments(x: Tensor, slices: int, active: Tensor | None, config: StdConfig | None = None) -> Tensor:
    M, K = x.shape
    config = config or default_config(M, triton.cdiv(K, slices))
    count = triton.cdiv(M, config.rows_per_program)
    parts = torch.empty(count, slices, 4, dtype=torch.float32, device=x.device)
    launch(
        moments_kernel, (count, slices), x.device, x, active, parts, M, K, slices, *x.stride(), config.rows_per_program,
        HAS_ACTIVE=active is not None, ALIGNED=aligned(K, slices), BLOCK_M=config.BLOCK_M, BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
    )  # fmt: skip
    out = torch.empty(slices, 3, dtype=torch.float32, device=x.device)
    launch(merge_moments_kernel, (slices,), x.device, parts, out, count, slices, BLOCK_P=block(count, 2**20))
    return out


@torch.library.custom_op("triton_analog::moments", mutates_args=())
def _moments(x: Tensor, slices: int, active: Tensor | None) -> Tensor:
    return launch_moments(x, slices, active) if runs_kernel(x) else reference.moments(x, slices, active)


@_moments.register_fake
def _(x: Tensor, slices: int, active: Tensor | None) -> Tensor:
    return x.new_empty(slices, 3, dtype=check.wide_dtype(x))


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
    check.matrix("x", x)
    check.require(x.shape[0] > 0, lambda: f"x: got shape {check.shape_of(x)}; an empty tensor has no moments")
    check.slice_count(x.shape[1], slices)
    if active is not None:
        check.require(
            active.dtype == torch.bool and check.shape_of(active) == (slices,),
            lambda: (
                f"active: got {active.dtype} of shape {check.shape_of(active)}; a bool tensor of shape ({slices},) is needed"
            ),
        )
        check.together("x", x, active=active)
    return _moments(x.detach(), slices, active)


def std(x: Tensor, slices: int) -> Tensor:
    """Unbiased standard deviation of every slice of ``x [M, K]``: ``[S]``, fp32 (fp64 for fp64).

    A slice of one element has standard deviation 0; inf and NaN give NaN. Not differentiable. Raises as :func:`moments`.
    """
    return reference.std_of(moments(x, slices))
