"""Largest magnitude per slice and row: the weights' ``wmax`` and the dynamic input range (SEMANTICS 8).

``out[s, n] = max over k in slice s of |x[n, k]|``
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_analog import reference
from triton_analog.lang import slice_bounds
from triton_analog.launch import aligned, block, launch, runs_kernel
from triton_analog.ops import _checks as check


@dataclass(frozen=True)
class AbsmaxConfig:
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4


def default_config(rows: int, width: int) -> AbsmaxConfig:
    return AbsmaxConfig(BLOCK_N=block(rows, 16), BLOCK_K=block(width, 128))


@triton.jit(do_not_specialize=["N"])
def absmax_kernel(
    x_ptr, out_ptr, N, K, S, stride_n, stride_k, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    s = tl.program_id(1)
    start, width = slice_bounds(s, K, S, ALIGNED)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    largest = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(0, width, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        address = n[:, None] * stride_n + (start + k)[None, :].to(tl.int64) * stride_k
        x = tl.load(x_ptr + address, mask=(n < N)[:, None] & (k < width)[None, :], other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    # A reduction drops NaN, so it is carried beside it.
    is_nan = tl.max((largest != largest).to(tl.int32), axis=1) > 0
    out = tl.where(is_nan, float("nan"), tl.max(tl.where(largest != largest, 0.0, largest), axis=1))
    tl.store(out_ptr + s.to(tl.int64) * N + n, out, mask=n < N)


def launch_absmax(x: Tensor, slices: int, config: AbsmaxConfig | None = None) -> Tensor:
    N, K = x.shape
    config = config or default_config(N, triton.cdiv(K, slices))
    out = torch.empty(slices, N, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(N, config.BLOCK_N), slices)
    launch(
        absmax_kernel, grid, x.device, x, out, N, K, slices, *x.stride(), ALIGNED=aligned(K, slices), **asdict(config)
    )
    return out


@torch.library.custom_op("triton_analog::absmax", mutates_args=())
def _absmax(x: Tensor, slices: int) -> Tensor:
    return launch_absmax(x, slices) if runs_kernel(x) else reference.absmax(x, slices)


@_absmax.register_fake
def _(x: Tensor, slices: int) -> Tensor:
    return x.new_empty(slices, x.shape[0], dtype=check.wide_dtype(x))


def absmax(x: Tensor, slices: int) -> Tensor:
    """Largest magnitude of every row of ``x [N, K]`` within every slice: ``[S, N]``, fp32 (fp64 for fp64).

    Not differentiable: a range or scale found from data is a constant of the backward. NaN propagates.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: ``x`` is not a matrix, or ``slices`` is not in ``1 .. K``.
    """
    check.matrix("x", x)
    check.slice_count(x.shape[1], slices)
    return _absmax(x.detach(), slices)
