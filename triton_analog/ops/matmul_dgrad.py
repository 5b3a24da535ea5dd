"""Gradient of the analog product in its input, with the input range's gradient on the way out (SEMANTICS 6).

``dx_raw = (g where slice s did not saturate) @ W'_s``, ``dx = dx_raw where |x| <= r_s``, and ``dr_s`` of ``input_range.py``
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_analog import reference
from triton_analog.lang import cast, dot, slice_bounds
from triton_analog.launch import aligned, block, input_precision, launch, runs_kernel
from triton_analog.ops import _checks as check
from triton_analog.ops.input_range import launch_range_grad, range_grad_sums


@dataclass(frozen=True)
class MatmulDgradConfig:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 3


def default_config(rows: int, columns: int, width: int, dtype: torch.dtype) -> MatmulDgradConfig:
    return MatmulDgradConfig(
        BLOCK_M=block(rows, 64), BLOCK_N=block(columns, 32 if dtype == torch.float32 else 64), BLOCK_K=block(width, 128)
    )


@triton.jit
def drop_saturated(grad, mask_ptr, s, m, n, M, N):
    """A tile of ``grad`` with 0 where slice ``s`` saturated."""
    row_bytes = tl.cdiv(N, 8)
    address = (M.to(tl.int64) * s + m[:, None]) * row_bytes + n[None, :] // 8
    byte = tl.load(mask_ptr + address, mask=(m < M)[:, None] & (n < N)[None, :], other=0).to(tl.int32)
    return tl.where((byte >> (n % 8).to(tl.int32)[None, :]) & 1 != 0, 0.0, grad)


@triton.jit(do_not_specialize=["M"])
def matmul_dgrad_kernel(
    grad_ptr, w_ptr, x_ptr, range_ptr, mask_ptr, dx_ptr, parts_ptr,
    M, N, K, S, stride_gm, stride_gn, stride_wn, stride_wk, stride_xm, stride_xk,
    CLIP: tl.constexpr, FAST: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(2)
    start, width = slice_bounds(s, K, S, ALIGNED)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    k = (start + column).to(tl.int64)
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty

    dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first_n in range(0, N, BLOCK_N):
        n = first_n + tl.arange(0, BLOCK_N).to(tl.int64)
        g_inside = (m < M)[:, None] & (n < N)[None, :]
        w_inside = (n < N)[:, None] & (column < width)[None, :]
        grad = tl.load(grad_ptr + m[:, None] * stride_gm + n[None, :] * stride_gn, mask=g_inside, other=0.0)
        if MASK:
            grad = drop_saturated(grad.to(tl.float32), mask_ptr, s, m, n, M, N)
        w = tl.load(w_ptr + n[:, None] * stride_wn + k[None, :] * stride_wk, mask=w_inside, other=0.0)
        dx = dot(cast(grad.to(tl.float32), DTYPE), w, dx, PRECISION)

    inside = (m < M)[:, None] & (column < width)[None, :]
    if CLIP:
        r = tl.abs(tl.load(range_ptr + s).to(tl.float32))
        x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk, mask=inside, other=0.0).to(tl.float32)
        widen, unclipped = range_grad_sums(dx, x, r, inside, FAST)
        part = (s * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
        tl.store(parts_ptr + part * 2, widen)
        tl.store(parts_ptr + part * 2 + 1, unclipped)
        dx = tl.where(tl.abs(x) <= r, dx, 0.0)
    tl.store(dx_ptr + m[:, None] * K + k[None, :], cast(dx, dx_ptr.dtype.element_ty), mask=inside)


def launch_matmul_dgrad(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    input_range: Tensor | None,
    slices: int,
    mask: Tensor | None,
    decay: float,
    input_min_percentage: float,
    fast_mode: bool,
    config: MatmulDgradConfig | None = None,
) -> tuple[Tensor, Tensor]:
    (M, K), N = x.shape, weight.shape[0]
    width = triton.cdiv(K, slices)
    config = config or default_config(M, N, width, x.dtype)
    clip = input_range is not None
    grid = (triton.cdiv(M, config.BLOCK_M), triton.cdiv(width, config.BLOCK_K), slices)
    dx = torch.empty(M, K, dtype=x.dtype, device=x.device)
    input_range = input_range.contiguous() if input_range is not None else None
    parts = torch.empty(slices, grid[0] * grid[1] if clip else 0, 2, dtype=torch.float32, device=x.device)
    launch(
        matmul_dgrad_kernel, grid, x.device, grad, weight, x, input_range, mask, dx, parts, M, N, K, slices,
        *grad.stride(), *weight.stride(), *x.stride(),
        CLIP=clip, FAST=fast_mode, MASK=mask is not None, PRECISION=input_precision(),
        ALIGNED=aligned(K, slices), **asdict(config),
    )  # fmt: skip
    if input_range is None:
        return dx, parts.new_empty(0)
    return dx, launch_range_grad(parts, input_range, M, K, decay, input_min_percentage, fast_mode)


@torch.library.custom_op("triton_analog::matmul_dgrad", mutates_args=())
def _matmul_dgrad(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    input_range: Tensor | None,
    slices: int,
    mask: Tensor | None,
    decay: float,
    input_min_percentage: float,
    fast_mode: bool,
) -> tuple[Tensor, Tensor]:
    if runs_kernel(x):
        return launch_matmul_dgrad(grad, weight, x, input_range, slices, mask, decay, input_min_percentage, fast_mode)
    return reference.matmul_dgrad(
        grad, weight, x, input_range, slices, mask,
        decay=decay, input_min_percentage=input_min_percentage, fast_mode=fast_mode,
    )  # fmt: skip


@_matmul_dgrad.register_fake
def _(grad, weight, x, input_range, slices, mask, decay, input_min_percentage, fast_mode):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty(0 if input_range is None else slices, dtype=check.wide_dtype(x))


def matmul_dgrad(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    input_range: Tensor | None,
    slices: int,
    mask: Tensor | None = None,
    *,
    decay: float = 0.0,
    input_min_percentage: float = 0.95,
    fast_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`triton_analog.ops.matmul` in ``x [M, K]`` and in a static ``input_range [S]`` (fp32).

    Args:
        grad: Gradient ``[M, N]`` of the product, any strides.
        weight: ``[N, K]``, the weight of the forward.
        x: Inputs ``[M, K]`` of the forward.
        input_range: ``[S]``, or None where nothing clips (no range or a dynamic one); its gradient is then empty.
        slices: Number of slices of the columns.
        mask: The forward's saturation mask ``[S, M, ceil(N / 8)]``, or None without a bound.
        decay: Pull of the range towards 0 where almost nothing clips; 0 is off.
        input_min_percentage: Share of unclipped inputs above which ``decay`` acts.
        fast_mode: The plain gradient of a clamp instead of the learned-range rule.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.product(x, weight, slices, None)
    check.product_grad(grad, x, weight.shape[0], slices, mask)
    if input_range is not None:
        check.static_range(input_range, slices)
        check.together("x", x, input_range=input_range)
    check.range_rule(decay, input_min_percentage)
    return _matmul_dgrad(grad, weight, x, input_range, slices, mask, decay, input_min_percentage, fast_mode)
