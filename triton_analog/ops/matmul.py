"""The analog matrix product: input converter, tiles, output noise, output converter, sum over slices (SEMANTICS 3).

``y = sum over s of ADC(unit_s * (q_s @ W_s^T) + sigma_s * z_s) + bias``

``q_s`` are the input converter's integers, exact in bf16 up to 512 steps, and ``unit_s`` its step. Without an output
converter the noises of all slices are one normal of their summed variance.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_analog import reference
from triton_analog.lang import (
    DYNAMIC_RANGE,
    NO_RANGE,
    OUTPUT_STREAM,
    cast,
    convert,
    dot,
    normal_tile,
    pack_bits,
    slice_bounds,
    step_of,
)
from triton_analog.launch import aligned, block, input_precision, launch, runs_kernel
from triton_analog.ops import _checks as check
from triton_analog.ops.dac import load_range, operand, range_mode
from triton_analog.ops.matmul_dgrad import _matmul_dgrad
from triton_analog.ops.matmul_wgrad import _matmul_wgrad
from triton_analog.reference.grid import half_steps


@dataclass(frozen=True)
class MatmulConfig:
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int = 8
    num_warps: int = 8
    num_stages: int = 3


def default_config(rows: int, columns: int, width: int, dtype: torch.dtype) -> MatmulConfig:
    """64 x 128 tiles leave room for two blocks on a multiprocessor, one in its epilogue while the other multiplies."""
    return MatmulConfig(
        BLOCK_M=block(rows, 64), BLOCK_N=block(columns, 128), BLOCK_K=block(width, 32 if dtype == torch.float32 else 64)
    )


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    x_ptr, w_ptr, bias_ptr, range_ptr, noise_wmax_ptr, bound_wmax_ptr, seed_ptr, y_ptr, mask_ptr,
    M, N, K, S, stride_xm, stride_xk, stride_wn, stride_wk, noise_columns, bound_columns,
    in_q_max, sigma, out_bound, out_q_max,
    MODE: tl.constexpr, DAC: tl.constexpr, NOISE: tl.constexpr, BOUND: tl.constexpr, ADC: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share rows of x and columns of w in the L2 cache.
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP_M * blocks_n)
    group_rows = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    first_m = (group * GROUP_M + pid % group_rows).to(tl.int64) * BLOCK_M
    first_n = (pid % (GROUP_M * blocks_n) // group_rows).to(tl.int64) * BLOCK_N
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty

    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    RANGE_ROWS: tl.constexpr = BLOCK_M if MODE == DYNAMIC_RANGE else 1
    r = tl.zeros((RANGE_ROWS, 1), tl.float32)
    variance = tl.zeros((RANGE_ROWS, BLOCK_N), tl.float32)
    for s in range(S):
        start, width = slice_bounds(s, K, S, ALIGNED)
        if MODE != NO_RANGE:
            r = load_range(range_ptr, s, m, M, MODE)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first_k in range(0, width, BLOCK_K):
            column = first_k + tl.arange(0, BLOCK_K)
            k = (start + column).to(tl.int64)
            x_inside = (m < M)[:, None] & (column < width)[None, :]
            w_inside = (column < width)[:, None] & (n < N)[None, :]
            x = tl.load(x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk, mask=x_inside, other=0.0)
            w = tl.load(w_ptr + k[:, None] * stride_wk + n[None, :] * stride_wn, mask=w_inside, other=0.0)
            acc = dot(operand(x, r, in_q_max, MODE, DAC, DTYPE), w, acc, PRECISION)
        if DAC:
            acc *= step_of(r, in_q_max)
        if NOISE:
            at = noise_wmax_ptr + s * noise_columns + n % noise_columns
            sigma_s = sigma * r * tl.load(at, mask=n < N, other=0.0).to(tl.float32)[None, :]
            if BOUND:
                acc += sigma_s * normal_tile(tl.load(seed_ptr), first_m, first_n, s, OUTPUT_STREAM, BLOCK_M, BLOCK_N)
            else:
                variance += sigma_s * sigma_s
        if BOUND:
            at = bound_wmax_ptr + s * bound_columns + n % bound_columns
            bound = out_bound * r * tl.load(at, mask=n < N, other=0.0).to(tl.float32)[None, :]
            acc, saturated = convert(acc, bound, out_q_max, ADC)
            row_bytes = tl.cdiv(N, 8)
            byte = first_n // 8 + tl.arange(0, BLOCK_N // 8)
            address = (M.to(tl.int64) * s + m[:, None]) * row_bytes + byte[None, :]
            bits = pack_bits(saturated & (n < N)[None, :], BLOCK_M, BLOCK_N)
            tl.store(mask_ptr + address, bits, mask=(m < M)[:, None] & (byte < row_bytes)[None, :])
        y += acc
    if NOISE and not BOUND:
        z = normal_tile(tl.load(seed_ptr), first_m, first_n, 0, OUTPUT_STREAM, BLOCK_M, BLOCK_N)
        y += tl.sqrt_rn(variance) * z
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + m[:, None] * N + n[None, :], cast(y, y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :]
    )


def launch_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    slices: int,
    inp_res: float,
    out_noise: float,
    noise_wmax: Tensor | None,
    out_bound: float,
    bound_wmax: Tensor | None,
    out_res: float,
    seed: Tensor | None,
    config: MatmulConfig | None = None,
) -> tuple[Tensor, Tensor]:
    (M, K), N = x.shape, weight.shape[0]
    config = config or default_config(M, N, triton.cdiv(K, slices), x.dtype)
    in_q_max, out_q_max = half_steps(inp_res), half_steps(out_res)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    mask = torch.empty(slices if out_bound > 0 else 0, M, -(-N // 8), dtype=torch.uint8, device=x.device)
    small = [None if t is None else t.contiguous() for t in (bias, input_range, noise_wmax, bound_wmax)]
    columns = [1 if t is None else t.shape[1] for t in (noise_wmax, bound_wmax)]
    grid = (triton.cdiv(M, config.BLOCK_M) * triton.cdiv(N, config.BLOCK_N),)
    launch(
        matmul_kernel, grid, x.device, x, weight, *small, seed, y, mask, M, N, K, slices, *x.stride(), *weight.stride(),
        *columns, in_q_max, out_noise / slices**0.5, out_bound, out_q_max,
        MODE=range_mode(input_range), DAC=input_range is not None and in_q_max > 0, NOISE=out_noise > 0,
        BOUND=out_bound > 0, ADC=out_q_max > 0, BIAS=bias is not None, PRECISION=input_precision(),
        ALIGNED=aligned(K, slices), **asdict(config),
    )  # fmt: skip
    return y, mask


@torch.library.custom_op("triton_analog::matmul", mutates_args=())
def _matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    slices: int,
    inp_res: float,
    out_noise: float,
    noise_wmax: Tensor | None,
    out_bound: float,
    bound_wmax: Tensor | None,
    out_res: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if runs_kernel(x):
        return launch_matmul(
            x, weight, bias, input_range, slices, inp_res, out_noise, noise_wmax, out_bound, bound_wmax, out_res, seed
        )
    return reference.matmul(
        x, weight, bias, input_range, slices, inp_res=inp_res, out_noise=out_noise, noise_wmax=noise_wmax,
        out_bound=out_bound, bound_wmax=bound_wmax, out_res=out_res, seed=seed,
    )  # fmt: skip


@_matmul.register_fake
def _(x, weight, bias, input_range, slices, inp_res, out_noise, noise_wmax, out_bound, bound_wmax, out_res, seed):
    M, N = x.shape[0], weight.shape[0]
    return x.new_empty(M, N), x.new_empty(slices if out_bound > 0 else 0, M, (N + 7) // 8, dtype=torch.uint8)


def _setup_context(ctx, inputs, output):
    x, weight, bias, input_range, ctx.slices, ctx.inp_res, _, _, out_bound, *_ = inputs
    ctx.save_for_backward(x, weight, input_range, output[1] if out_bound > 0 else None)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    x, weight, input_range, mask = ctx.saved_tensors
    dx = dw = dbias = dr = None
    static = input_range if input_range is not None and input_range.ndim == 1 else None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
        dx, dr = _matmul_dgrad(grad, weight, x, static, ctx.slices, mask, 0.0, 1.0, False)
        dr = dr.to(static.dtype) if static is not None else None
    if ctx.needs_input_grad[1]:
        dw = _matmul_wgrad(grad, x, input_range, ctx.slices, mask, ctx.inp_res, weight.dtype)
    if ctx.needs_input_grad[2]:
        dbias = grad.sum(0, dtype=check.wide_dtype(grad)).to(ctx.bias_dtype)
    return dx, dw, dbias, dr, None, None, None, None, None, None, None, None


_matmul.register_autograd(_backward, setup_context=_setup_context)


def matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    slices: int,
    *,
    inp_res: float = -1.0,
    out_noise: float = 0.0,
    noise_wmax: Tensor | None = None,
    out_bound: float = 0.0,
    bound_wmax: Tensor | None = None,
    out_res: float = -1.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The analog product ``y [M, N]`` of ``x`` and ``weight``, and the output converter's packed saturation mask.

    Differentiable in ``x``, ``weight``, ``bias`` and a static ``input_range`` (SEMANTICS 6; the learned-range rule without
    decay). The weight given is kept for the backward: :func:`triton_analog.functional.analog_linear` rebuilds it instead.

    Args:
        x: Inputs ``[M, K]``, any strides.
        weight: ``[N, K]`` as the tiles hold it (see :func:`triton_analog.ops.weight`), dtype of ``x``.
        bias: ``[N]`` or None, added digitally.
        input_range: ``[S]`` (static, absolute value used), ``[S, M]`` (dynamic, a constant of the backward), or None.
        slices: Number of slices of the columns.
        inp_res: Input converter: number of steps (> 1) or its inverse; ``<= 0`` is off.
        out_noise: Output noise in units of ``r * noise_wmax``, divided by ``sqrt(slices)`` per slice; 0 is off.
        noise_wmax: ``[S, N]`` or ``[S, 1]``.
        out_bound: Output converter's bound in units of ``r * bound_wmax``; ``<= 0`` is off.
        bound_wmax: ``[S, N]`` or ``[S, 1]``.
        out_res: Output converter's number of steps or its inverse; ``<= 0`` does not round.
        seed: int64 tensor with one element, needed for noise.

    Returns:
        ``y [M, N]`` in the dtype of ``x``, and uint8 ``[S, M, ceil(N / 8)]``: bit ``n % 8`` of byte ``n // 8`` is set where
        slice ``s`` saturated (no slices without a bound).

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.product(x, weight, slices, input_range)
    N = weight.shape[0]
    check.input_converter(inp_res, input_range, x)
    check.bias(bias, N)
    check.output_stage(input_range, out_noise, noise_wmax, out_bound, bound_wmax, out_res, seed)
    check.wmax_shape("noise_wmax", noise_wmax, slices, N)
    check.wmax_shape("bound_wmax", bound_wmax, slices, N)
    check.together("x", x, bias=bias, noise_wmax=noise_wmax, bound_wmax=bound_wmax, seed=seed)
    return _matmul(
        x, weight, bias, input_range, slices, float(inp_res), out_noise, noise_wmax, out_bound, bound_wmax, float(out_res),
        seed,
    )  # fmt: skip
