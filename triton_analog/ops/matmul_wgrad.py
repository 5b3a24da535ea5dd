"""Gradient of the analog product in its weight, the converted input rebuilt on the way in (SEMANTICS 6).

``dW_s = (g where slice s did not saturate)^T @ x_q``, with a static range as ``unit_s * (g^T @ q)`` on the integers
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_analog import reference
from triton_analog.lang import DYNAMIC_RANGE, STATIC_RANGE, cast, dot, slice_bounds, step_of
from triton_analog.launch import aligned, block, input_precision, launch, runs_kernel
from triton_analog.ops import _checks as check
from triton_analog.ops.dac import load_range, operand, range_mode
from triton_analog.ops.matmul_dgrad import drop_saturated
from triton_analog.reference.grid import half_steps


@dataclass(frozen=True)
class MatmulWgradConfig:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 3


def default_config(columns: int, width: int, rows: int, dtype: torch.dtype) -> MatmulWgradConfig:
    return MatmulWgradConfig(
        BLOCK_M=block(rows, 32 if dtype == torch.float32 else 64), BLOCK_N=block(columns, 64), BLOCK_K=block(width, 128)
    )


@triton.jit(do_not_specialize=["M"])
def matmul_wgrad_kernel(
    grad_ptr, x_ptr, range_ptr, mask_ptr, dw_ptr,
    M, N, K, S, stride_gm, stride_gn, stride_xm, stride_xk, in_q_max,
    MODE: tl.constexpr, DAC: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(2)
    start, width = slice_bounds(s, K, S, ALIGNED)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    k = (start + column).to(tl.int64)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty

    dw = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    r = tl.zeros((BLOCK_M if MODE == DYNAMIC_RANGE else 1, 1), tl.float32)
    if MODE == STATIC_RANGE:
        r = load_range(range_ptr, s, n, M, MODE)
    for first_m in range(0, M, BLOCK_M):
        m = first_m + tl.arange(0, BLOCK_M).to(tl.int64)
        x_inside = (m < M)[:, None] & (column < width)[None, :]
        x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk, mask=x_inside, other=0.0)
        if MODE == DYNAMIC_RANGE:
            r = load_range(range_ptr, s, m, M, MODE)
        x_q = operand(x, r, in_q_max, MODE, DAC, DTYPE)
        if MODE == DYNAMIC_RANGE and DAC:  # the step differs from row to row, so it cannot wait for the epilogue
            x_q = cast(x_q.to(tl.float32) * step_of(r, in_q_max), DTYPE)
        g_inside = (m < M)[:, None] & (n < N)[None, :]
        grad = tl.load(grad_ptr + m[:, None] * stride_gm + n[None, :] * stride_gn, mask=g_inside, other=0.0)
        if MASK:
            grad = drop_saturated(grad.to(tl.float32), mask_ptr, s, m, n, M, N)
        dw = dot(tl.trans(cast(grad.to(tl.float32), DTYPE)), x_q, dw, PRECISION)
    if MODE == STATIC_RANGE and DAC:
        dw *= step_of(r, in_q_max)
    inside = (n < N)[:, None] & (column < width)[None, :]
    tl.store(dw_ptr + n[:, None] * K + k[None, :], cast(dw, dw_ptr.dtype.element_ty), mask=inside)


def launch_matmul_wgrad(
    grad: Tensor,
    x: Tensor,
    input_range: Tensor | None,
    slices: int,
    mask: Tensor | None,
    inp_res: float,
    dtype: torch.dtype,
    config: MatmulWgradConfig | None = None,
) -> Tensor:
    (M, K), N = x.shape, grad.shape[1]
    width = triton.cdiv(K, slices)
    config = config or default_config(N, width, M, x.dtype)
    q_max = half_steps(inp_res)
    dw = torch.empty(N, K, dtype=dtype, device=x.device)
    grid = (triton.cdiv(N, config.BLOCK_N), triton.cdiv(width, config.BLOCK_K), slices)
    launch(
        matmul_wgrad_kernel, grid, x.device, grad, x, None if input_range is None else input_range.contiguous(), mask, dw,
        M, N, K, slices, *grad.stride(), *x.stride(), q_max,
        MODE=range_mode(input_range), DAC=input_range is not None and q_max > 0, MASK=mask is not None,
        PRECISION=input_precision(), ALIGNED=aligned(K, slices), **asdict(config),
    )  # fmt: skip
    return dw


@torch.library.custom_op("triton_analog::matmul_wgrad", mutates_args=())
def _matmul_wgrad(
    grad: Tensor,
    x: Tensor,
    input_range: Tensor | None,
    slices: int,
    mask: Tensor | None,
    inp_res: float,
    dtype: torch.dtype,
) -> Tensor:
    if runs_kernel(x) and grad.numel() > 0:
        return launch_matmul_wgrad(grad, x, input_range, slices, mask, inp_res, dtype)
    return reference.matmul_wgrad(grad, x, input_range, slices, mask, inp_res=inp_res, dtype=dtype)


@_matmul_wgrad.register_fake
def _(grad, x, input_range, slices, mask, inp_res, dtype):
    return x.new_empty(grad.shape[1], x.shape[1], dtype=dtype)


def matmul_wgrad(
    grad: Tensor,
    x: Tensor,
    input_range: Tensor | None,
    slices: int,
    mask: Tensor | None = None,
    *,
    inp_res: float = -1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gradient of :func:`triton_analog.ops.matmul` in its weight: ``[N, K]``, accumulated in fp32.

    Args:
        grad: Gradient ``[M, N]`` of the product, any strides.
        x: Inputs ``[M, K]`` of the forward, as they were before the converter.
        input_range: ``[S]``, ``[S, M]`` or None, as in the forward.
        slices: Number of slices of the columns.
        mask: The forward's saturation mask ``[S, M, ceil(N / 8)]``, or None without a bound.
        inp_res: The input converter's resolution, as in the forward.
        dtype: Of the result; default that of ``x``.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.matrix("x", x)
    check.slice_count(x.shape[1], slices)
    check.matrix("grad", grad)
    check.product_grad(grad, x, grad.shape[1], slices, mask)
    check.range_kind(input_range, slices, x.shape[0])
    check.together("x", x, input_range=input_range)
    check.input_converter(inp_res, input_range, x)
    return _matmul_wgrad(grad, x, input_range, slices, mask, float(inp_res), dtype or x.dtype)
