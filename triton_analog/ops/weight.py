"""The weight as the tiles hold it: clipped, quantized, disturbed; and the learned clip's gradient (SEMANTICS 4 to 6).

``W_q = round(clamp(W / d, -Q, Q)) * d`` with ``d = wmax / Q``, and ``W' = W_q + std_dev * wmax * z``
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_analog import reference
from triton_analog.lang import (
    WEIGHT_STREAM,
    cast,
    clamp,
    normal_tile,
    round_even,
    slice_bounds,
    slice_of,
    step_of,
    steps_per_unit,
    to_steps,
)
from triton_analog.launch import aligned, block, launch, runs_kernel
from triton_analog.ops import _checks as check
from triton_analog.ops.absmax import launch_absmax
from triton_analog.reference.grid import half_steps


@dataclass(frozen=True)
class WeightConfig:
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4


def default_config(rows: int, features: int) -> WeightConfig:
    return WeightConfig(BLOCK_N=block(rows, 16), BLOCK_K=block(features, 64))


@triton.jit
def weight_kernel(
    w_ptr, quant_ptr, noise_ptr, seed_ptr, out_ptr, N, K, S, stride_n, stride_k, quant_columns, noise_columns,
    q_max, std_dev,
    CLAMP: tl.constexpr, QUANTIZE: tl.constexpr, NOISE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``quant [S, N or 1]`` and ``noise [S, N or 1]`` are the scales of clip or quantization and of the noise."""
    first_n = tl.program_id(0).to(tl.int64) * BLOCK_N
    first_k = tl.program_id(1).to(tl.int64) * BLOCK_K
    n = first_n + tl.arange(0, BLOCK_N)[:, None]
    k = first_k + tl.arange(0, BLOCK_K)[None, :]
    inside = (n < N) & (k < K)
    s = slice_of(k, K, S)
    w = tl.load(w_ptr + n * stride_n + k * stride_k, mask=inside, other=0.0).to(tl.float32)
    if CLAMP or QUANTIZE:
        bound = tl.load(quant_ptr + s * quant_columns + n % quant_columns, mask=inside, other=0.0)
        if QUANTIZE:
            w = to_steps(w, bound, q_max) * step_of(bound, q_max)
        else:
            w = clamp(w, bound)
    if NOISE:
        scale = tl.load(noise_ptr + s * noise_columns + n % noise_columns, mask=inside, other=0.0)
        z = normal_tile(tl.load(seed_ptr), first_n, first_k, 0, WEIGHT_STREAM, BLOCK_N, BLOCK_K)
        w += (std_dev * scale) * z
    tl.store(out_ptr + n * K + k, cast(w, out_ptr.dtype.element_ty), mask=inside)


def _scale(wmax: Tensor, kind: str) -> Tensor:
    """``wmax [S, N]`` per channel, or the largest of each slice ``[S, 1]``."""
    return wmax.amax(1, keepdim=True) if kind == "per_tensor" else wmax


def launch_weight(
    weight: Tensor,
    slices: int,
    clip: Tensor | None,
    quantization: str,
    res: float,
    noise_type: str,
    std_dev: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    config: WeightConfig | None = None,
) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    config = config or default_config(N, K)
    wmax = launch_absmax(weight, slices) if clip is None else clip.float().abs().contiguous()
    quant, noise = _scale(wmax, quantization), _scale(wmax, noise_type)
    q_max = half_steps(res) if quantization != "none" else 0.0
    out = torch.empty(N, K, dtype=dtype, device=weight.device)
    grid = (triton.cdiv(N, config.BLOCK_N), triton.cdiv(K, config.BLOCK_K))
    launch(
        weight_kernel, grid, weight.device, weight, quant, noise, seed, out, N, K, slices, *weight.stride(),
        quant.shape[1], noise.shape[1], q_max, std_dev,
        CLAMP=clip is not None, QUANTIZE=q_max > 0, NOISE=noise_type != "none" and std_dev > 0, **asdict(config),
    )  # fmt: skip
    return out, wmax


@torch.library.custom_op("triton_analog::weight", mutates_args=())
def _weight(
    weight: Tensor,
    slices: int,
    clip: Tensor | None,
    quantization: str,
    res: float,
    noise_type: str,
    std_dev: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if runs_kernel(weight):
        return launch_weight(weight, slices, clip, quantization, res, noise_type, std_dev, seed, dtype)
    return reference.weight(
        weight, slices, clip=clip, quantization=quantization, res=res, noise_type=noise_type, std_dev=std_dev, seed=seed,
        dtype=dtype,
    )  # fmt: skip


@_weight.register_fake
def _(weight, slices, clip, quantization, res, noise_type, std_dev, seed, dtype):
    out = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    return out, weight.new_empty(slices, weight.shape[0], dtype=check.wide_dtype(weight))


def _setup_context(ctx, inputs, output):
    weight, ctx.slices, clip, ctx.quantization, ctx.res, *_ = inputs
    ctx.dtype = weight.dtype
    ctx.save_for_backward(*((weight, clip) if clip is not None else ()))
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    grad_clip = None
    if ctx.saved_tensors:
        weight, clip = ctx.saved_tensors
        grad, grad_clip = _weight_grad(grad, weight, clip, ctx.slices, ctx.quantization, ctx.res)
        grad_clip = grad_clip.to(clip.dtype)
    return grad.to(ctx.dtype), None, grad_clip, None, None, None, None, None, None


_weight.register_autograd(_backward, setup_context=_setup_context)


def weight(
    weight: Tensor,
    slices: int,
    *,
    clip: Tensor | None = None,
    quantization: str = "none",
    res: float = 0.0,
    noise_type: str = "none",
    std_dev: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The weight as the tiles hold it, ``[N, K]``, and its scale ``wmax [S, N]`` (fp32). The argument is never changed.

    Differentiable: the identity through quantization and noise; with a learned clip the gradients of SEMANTICS 6.

    Args:
        weight: ``[N, K]``, torch's linear layout.
        slices: Number of slices of the columns.
        clip: Learned clip ``[S, N]``, whose absolute value bounds the weight and replaces ``wmax``.
        quantization: ``"none"``, ``"per_tensor"`` (one scale per slice) or ``"per_channel"``.
        res: Number of states (> 1) or its inverse, for quantization.
        noise_type: ``"none"``, ``"per_tensor"`` or ``"per_channel"``.
        std_dev: Standard deviation of the noise in units of ``wmax`` (its largest channel's for ``"per_tensor"``).
        seed: int64 tensor with one element, needed for noise: the same seed gives the same noise again.
        dtype: Of the result; default that of ``weight``.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.weight_stage(weight, slices, clip, quantization, res)
    check.kind("noise_type", noise_type)
    check.non_negative("std_dev", std_dev)
    check.seed_given(seed, noise_type != "none" and std_dev > 0, "weight noise")
    check.together("weight", weight, seed=seed)
    return _weight(weight, slices, clip, quantization, res, noise_type, std_dev, seed, dtype or weight.dtype)


# ---- Gradient of the learned clip -----------------------------------------------------------------------------------


@triton.jit
def weight_grad_kernel(
    grad_ptr, w_ptr, clip_ptr, dw_ptr, dclip_ptr, N, K, S, stride_gn, stride_gk, stride_wn, stride_wk, q_max,
    QUANTIZE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    start, width = slice_bounds(s, K, S, ALIGNED)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    clip_address = s.to(tl.int64) * N + n
    clip = tl.load(clip_ptr + clip_address, mask=n < N, other=0.0).to(tl.float32)
    bound = tl.abs(clip)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(0, width, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        k = (start + column).to(tl.int64)[None, :]
        inside = (n < N)[:, None] & (column < width)[None, :]
        w = tl.load(w_ptr + n[:, None] * stride_wn + k * stride_wk, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + n[:, None] * stride_gn + k * stride_gk, mask=inside, other=0.0).to(tl.float32)
        outside = tl.abs(w) > bound
        if QUANTIZE:
            q = clamp(w * steps_per_unit(bound, q_max), q_max)
            t = round_even(q) - q
        else:
            t = tl.zeros_like(w)
        t = tl.where(outside, tl.where(w > 0, q_max, -q_max), t)
        total += grad * t
        dw = cast(tl.where(outside, 0.0, grad), dw_ptr.dtype.element_ty)
        tl.store(dw_ptr + n[:, None] * K + k, dw, mask=inside)
    dclip = tl.sum(total, axis=1) / tl.sqrt_rn(q_max * (N * 1.0 * width))
    tl.store(dclip_ptr + clip_address, tl.where(clip < 0, -dclip, dclip), mask=n < N)


def launch_weight_grad(
    grad: Tensor,
    weight: Tensor,
    clip: Tensor,
    slices: int,
    quantization: str,
    res: float,
    config: WeightConfig | None = None,
) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    config = config or default_config(N, triton.cdiv(K, slices))
    quantized = quantization != "none"
    dw = torch.empty(N, K, dtype=grad.dtype, device=grad.device)
    dclip = torch.empty(slices, N, dtype=torch.float32, device=grad.device)
    launch(
        weight_grad_kernel, (triton.cdiv(N, config.BLOCK_N), slices), grad.device, grad, weight, clip.contiguous(), dw,
        dclip, N, K, slices, *grad.stride(), *weight.stride(), half_steps(res) if quantized else 1.0,
        QUANTIZE=quantized, ALIGNED=aligned(K, slices), **asdict(config),
    )  # fmt: skip
    return dw, dclip


@torch.library.custom_op("triton_analog::weight_grad", mutates_args=())
def _weight_grad(
    grad: Tensor, weight: Tensor, clip: Tensor, slices: int, quantization: str, res: float
) -> tuple[Tensor, Tensor]:
    if runs_kernel(weight):
        return launch_weight_grad(grad, weight, clip, slices, quantization, res)
    return reference.weight_grad(grad, weight, clip, slices, quantization=quantization, res=res)


@_weight_grad.register_fake
def _(grad, weight, clip, slices, quantization, res):
    dw = torch.empty_like(grad, memory_format=torch.contiguous_format)
    return dw, weight.new_empty(slices, weight.shape[0], dtype=check.wide_dtype(weight))


def weight_grad(
    grad: Tensor, weight: Tensor, clip: Tensor, slices: int, *, quantization: str = "none", res: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight ``[N, K]`` and of its learned clip ``[S, N]`` (fp32), SEMANTICS 6.

    Args:
        grad: Gradient ``[N, K]`` of the modified weight.
        weight: The stored weight ``[N, K]``.
        clip: The learned clip ``[S, N]``.
        slices: Number of slices of the columns.
        quantization: ``"none"`` or ``"per_channel"``, as in the forward.
        res: As in the forward.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.weight_stage(weight, slices, clip, quantization, res)
    check.matrix("grad", grad)
    check.require(
        grad.shape == weight.shape,
        lambda: f"grad: got shape {check.shape_of(grad)}; {check.shape_of(weight)} is needed",
    )
    check.together("weight", weight, grad=grad)
    return _weight_grad(grad, weight, clip, slices, quantization, res)
