"""The weight as the tiles hold it: clipped, quantized, disturbed; and the learned clip's gradient (SEMANTICS 4 to 6).

``W_q = round(clamp(W / d, -Q, Q)) * d`` with ``d = wmax / Q``, and ``W' = W_q + std_dev * wmax * z``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import triton_analog.reference as reference
from triton_analog.lang import (
    WEIGHT_STREAM,
    clamp,
    load_seed,
    normal_tile,
    round_even,
    step_of,
    steps_per_unit,
    to_steps,
)
from triton_analog.launch import aligned, block, cdiv, launch
from triton_analog.launch.lookup import choose
from triton_analog.launch.space import POWERS, Problem, Space, tile_fits
from triton_analog.ops import _checks as check
from triton_analog.ops._columns import column_masks, load_tile, slice_span, store_tile
from triton_analog.ops._operator import Operator
from triton_analog.ops._transforms import Gradient
from triton_analog.ops.absmax import (
    absmax_of_rows,
    largest_magnitude,
    launch_absmax,
    launch_absmax_and_maxima,
    magnitude_bits,
)
from triton_analog.reference.grid import half_steps
from triton_analog.reference.noise import is_placed


@dataclass(frozen=True)
class WeightConfig:
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4


def default_config(problem: Problem) -> WeightConfig:
    """Tiles as wide as a slice, if that is possible, so that it stays in registers.

    32 numbers to a thread keep more loads in flight; 16 fit with noise or with slices that start anywhere.
    """
    (rows, width), (noise, aligned_slices) = problem.sizes, problem.flags
    per_thread = 32 if aligned_slices and not noise else 16
    block_k = block(width, 4096)
    num_warps = 8 if block_k > 128 * per_thread else 4
    block_n = block(rows, 32 * num_warps * per_thread // block_k, smallest=1)
    return WeightConfig(BLOCK_N=block_n, BLOCK_K=block_k, num_warps=num_warps)


def default_grad_config(problem: Problem) -> WeightConfig:
    return default_config(problem._replace(flags=(True, True)))


def _fits(problem: Problem, config: WeightConfig) -> bool:
    """What does not stay in registers is read twice: narrow tiles are slow."""
    wide = config.BLOCK_K >= min(512, problem.sizes[1])
    return wide and tile_fits(problem, config.BLOCK_N, config.BLOCK_K, least=512, most=1024 * config.num_warps)


_VALUES = {"BLOCK_N": POWERS[:10], "BLOCK_K": POWERS[4:13], "num_warps": (4, 8)}
SPACE = Space(
    "weight", WeightConfig, sizes=("rows", "width"), flags=("noise", "aligned"), formula=default_config, fits=_fits,
    values=_VALUES,
)  # fmt: skip
GRAD_SPACE = Space(
    "weight_grad", WeightConfig, sizes=("rows", "width"), formula=default_grad_config, fits=_fits, values=_VALUES
)


@triton.jit
def largest_of_slice(maxima_ptr, s, P, BLOCK_P: tl.constexpr):
    """The largest of ``maxima [S, P]`` of slice ``s``, ``[1, 1]``."""
    p = tl.arange(0, BLOCK_P)
    maxima = tl.load(maxima_ptr + s.to(tl.int64) * P + p, mask=p < P, other=0.0)
    return (tl.full((1, 1), 0, tl.int32) + tl.max(magnitude_bits(maxima))).to(tl.float32, bitcast=True)


@triton.jit
def modify(
    w, quant_scale, noise_scale, seed_ptr, n, k, q_max, std_dev, CLAMP: tl.constexpr, QUANTIZE: tl.constexpr,
    INTEGERS: tl.constexpr, NOISE: tl.constexpr, PLACED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of the weight from row ``n`` and column ``k`` on, clipped or quantized, then disturbed."""
    if QUANTIZE:
        w = to_steps(w, quant_scale, q_max)
        if not INTEGERS:
            w *= step_of(quant_scale, q_max)
    elif CLAMP:
        w = clamp(w, quant_scale)
    if NOISE:
        seed, first_n, first_k, plane = load_seed(seed_ptr, PLACED)
        z = normal_tile(seed, first_n + n, first_k + k, plane, WEIGHT_STREAM, BLOCK_N, BLOCK_K)
        w = tl.fma(
            (std_dev * noise_scale) + tl.zeros_like(z), z, w
        )  # by name: which product the compiler fuses may change
    return w


@triton.jit(do_not_specialize=["N", "P"])
def weight_kernel(
    w_ptr, clip_ptr, maxima_ptr, seed_ptr, wmax_ptr, out_ptr, N, K, S, P, stride_n, stride_k, stride_cs, stride_cn,
    q_max, std_dev, QUANTIZATION: tl.constexpr, NOISE: tl.constexpr, PLACED: tl.constexpr, ALIGNED: tl.constexpr,
    ONE_TILE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Some rows of one slice, which is read once if it fits in ``ONE_TILE``.

    ``wmax [S, N]`` is the learned clip's magnitude, or found here; both are stored. If an earlier launch left ``maxima
    [S, P]`` of it, because something is per tensor, it left ``wmax`` too.
    """
    s = tl.program_id(0) % S
    first_n = (tl.program_id(0) // S).to(tl.int64) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    origin, start, end = slice_span(s, K, S, ALIGNED)
    if ONE_TILE:
        k = origin + tl.arange(0, BLOCK_K)
        loaded, inside = column_masks(k, start, end, K, ALIGNED)
        w = load_tile(w_ptr, n, k, stride_n, stride_k, N, loaded)

    wmax_ptr += s.to(tl.int64) * N
    if clip_ptr is not None:
        clip = tl.load(clip_ptr + s.to(tl.int64) * stride_cs + n * stride_cn, mask=n < N, other=0.0)
        wmax = tl.abs(clip.to(tl.float32))
    elif maxima_ptr is not None:
        wmax = tl.load(wmax_ptr + n, mask=n < N, other=0.0)
    else:
        if ONE_TILE:
            bits = largest_magnitude(w, inside)
        else:
            bits = absmax_of_rows(w_ptr, n, N, origin, start, end, K, stride_n, stride_k, ALIGNED, BLOCK_N, BLOCK_K)
        wmax = bits.to(tl.float32, bitcast=True)
    if clip_ptr is not None or maxima_ptr is None:
        tl.store(wmax_ptr + n, wmax, mask=n < N)
    quant_scale, noise_scale = wmax[:, None], wmax[:, None]
    if QUANTIZATION == "per_tensor":
        quant_scale = largest_of_slice(maxima_ptr, s, P, BLOCK_P)
    if NOISE == "per_tensor":
        noise_scale = largest_of_slice(maxima_ptr, s, P, BLOCK_P)

    for first in range(origin, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        if not ONE_TILE:
            loaded, inside = column_masks(k, start, end, K, ALIGNED)
            w = load_tile(w_ptr, n, k, stride_n, stride_k, N, loaded)
        new = modify(
            w, quant_scale, noise_scale, seed_ptr, first_n, first, q_max, std_dev, clip_ptr is not None,
            QUANTIZATION != "none", out_ptr.dtype.element_ty == tl.int8, NOISE != "none", PLACED, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip
        store_tile(out_ptr, new, n, k, N, K, start, end, ALIGNED)


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
    slice_wmax: Tensor | None = None,
    config: WeightConfig | None = None,
) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    noise_type = noise_type if std_dev > 0 else "none"
    width = cdiv(K, slices) + (0 if aligned(K, slices) else 15)  # a slice's first tile may begin before it
    config = config or choose(
        SPACE, weight.device, weight.dtype, (N, width), (noise_type != "none", aligned(K, slices))
    )
    per_tensor = "per_tensor" in (quantization, noise_type)
    maxima: Tensor | None = slice_wmax.contiguous() if per_tensor and slice_wmax is not None else None
    if per_tensor and clip is None:
        wmax, found = launch_absmax_and_maxima(weight, slices)
        maxima = found if maxima is None else maxima
    else:
        wmax = torch.empty(slices, N, dtype=torch.float32, device=weight.device)
    if per_tensor and maxima is None and clip is not None:
        maxima = launch_absmax(clip, 1).T
    P = 1 if maxima is None else maxima.shape[1]
    out = torch.empty(N, K, dtype=dtype, device=weight.device)
    launch(
        weight_kernel, (cdiv(N, config.BLOCK_N) * slices,), weight.device, weight, clip, maxima, seed, wmax, out,
        N, K, slices, P, *weight.stride(), *((0, 0) if clip is None else clip.stride()), half_steps(res), std_dev,
        QUANTIZATION=quantization, NOISE=noise_type, PLACED=is_placed(seed), ALIGNED=aligned(K, slices),
        ONE_TILE=width <= config.BLOCK_K, BLOCK_P=block(P, 2**20), **vars(config),
    )  # fmt: skip
    return out, wmax


def _fake(weight: Tensor, slices: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    return out, weight.new_empty(slices, weight.shape[0], dtype=check.wide_dtype(weight))


_weight = Operator("weight", launch_weight, reference.weight, _fake)


class _Weight(Gradient):
    NAME = "weight"

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _weight(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        weight, ctx.slices, clip, ctx.quantization, ctx.res, *_ = inputs
        ctx.dtype = weight.dtype
        ctx.save_for_backward(*((weight, clip) if clip is not None else ()))
        out, wmax = output
        ctx.mark_non_differentiable(wmax, *(() if out.is_floating_point() else (out,)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        grad_clip = None
        if ctx.saved_tensors:
            weight, clip = ctx.saved_tensors
            grad, grad_clip = _weight_grad(grad, weight, clip, ctx.slices, ctx.quantization, ctx.res)
            grad_clip = grad_clip.to(clip.dtype)
        return grad.to(ctx.dtype), None, grad_clip, *(None,) * 7


_weight.gradient = _Weight


def _check_dtype(dtype: torch.dtype, quantization: str, res: float, noise_type: str) -> None:
    """A weight can be given in ``dtype``."""
    if dtype in check.DTYPES:
        return
    if dtype != torch.int8:
        raise TypeError(f"dtype: got {dtype}; allowed are float32, bfloat16, float16, float64 and int8")
    check.require(
        quantization != "none" and half_steps(res) <= 127 and noise_type == "none",
        lambda: (
            f"dtype: got {dtype} with quantization {quantization!r}, {2 * half_steps(res):g} states and noise_type "
            f"{noise_type!r}; allowed for int8 is a quantization to at most 254 states without noise"
        ),
    )


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
    slice_wmax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weight as the tiles hold it, ``[N, K]``, and its scale ``wmax [S, N]`` (fp32). The argument is never changed.

    Differentiable: the identity through quantization and noise; with a learned clip the gradients of SEMANTICS 6. As int8
    it is not: the weight is then given as its number of steps, ``-Q .. Q`` with ``Q = states / 2``, so that it is this number
    times ``wmax / Q`` (the slice's largest ``wmax`` for ``"per_tensor"``). NaN makes ``wmax`` NaN and the steps arbitrary.

    Args:
        weight: ``[N, K]``, torch's linear layout.
        slices: Number of slices of the columns.
        clip: Learned clip ``[S, N]``, whose absolute value bounds the weight and replaces ``wmax``.
        quantization: ``"none"``, ``"per_tensor"`` (one scale per slice) or ``"per_channel"``.
        res: Number of states (> 1) or its inverse, for quantization.
        noise_type: ``"none"``, ``"per_tensor"`` or ``"per_channel"``.
        std_dev: Standard deviation of the noise in units of ``wmax`` (its largest channel's for ``"per_tensor"``).
        seed: int64 tensor with one element, or that of a part of a weight (:func:`triton_analog.seeds.placed`); needed for noise:
            the same seed gives the same noise again.
        dtype: Of the result; default that of ``weight``. int8 needs a quantization to at most 254 states and no noise.
        slice_wmax: ``[S, 1]``, fp32 (fp64 for fp64): each slice's largest ``wmax``, where ``weight`` has only some of the outputs
            and ``"per_tensor"`` means all of them; None: that of ``weight``.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.weight_stage(weight, slices, clip, quantization, res)
    check.kind("noise_type", noise_type)
    check.non_negative("std_dev", std_dev)
    check.seed_given(seed, noise_type != "none" and std_dev > 0, "weight noise")
    check.together("weight", weight, seed=seed, slice_wmax=slice_wmax)
    check.slice_wmax(slice_wmax, slices, weight)
    dtype = dtype or weight.dtype
    _check_dtype(dtype, quantization, res, noise_type if std_dev > 0 else "none")
    return _weight(weight, slices, clip, quantization, res, noise_type, std_dev, seed, dtype, slice_wmax)


# ---- Gradient of the learned clip -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N"])
def weight_grad_kernel(
    grad_ptr, w_ptr, clip_ptr, dw_ptr, dclip_ptr, N, K, S, stride_gn, stride_gk, stride_wn, stride_wk,
    stride_cs, stride_cn, q_max,
    QUANTIZE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0) % S
    n = (tl.program_id(0) // S).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    origin, start, end = slice_span(s, K, S, ALIGNED)
    clip = tl.load(clip_ptr + s.to(tl.int64) * stride_cs + n * stride_cn, mask=n < N, other=0.0).to(tl.float32)
    bound = tl.abs(clip)[:, None]
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(origin, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        loaded, inside = column_masks(k, start, end, K, ALIGNED)
        w = load_tile(w_ptr, n, k, stride_wn, stride_wk, N, loaded)
        grad = load_tile(grad_ptr, n, k, stride_gn, stride_gk, N, loaded)
        outside = tl.abs(w) > bound
        if QUANTIZE:
            q = w * steps_per_unit(bound, q_max)
            t = round_even(q) - q
        else:
            t = tl.zeros_like(w)
        t = tl.where(outside, tl.where(w > 0, q_max, -q_max), t)
        product = grad * t
        if not ALIGNED:  # columns of the slices beside it
            product = tl.where(inside[None, :], product, 0.0)
        total += tl.sum(product, axis=1)
        store_tile(dw_ptr, tl.where(outside, 0.0, grad), n, k, N, K, start, end, ALIGNED)
    dclip = total / tl.sqrt_rn(q_max * (N * 1.0 * (end - start)))
    tl.store(dclip_ptr + s.to(tl.int64) * N + n, tl.where(clip < 0, -dclip, dclip), mask=n < N)


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
    config = config or choose(GRAD_SPACE, weight.device, weight.dtype, (N, cdiv(K, slices)))
    quantized = quantization != "none"
    dw = torch.empty(N, K, dtype=grad.dtype, device=grad.device)
    dclip = torch.empty(slices, N, dtype=torch.float32, device=grad.device)
    launch(
        weight_grad_kernel, (cdiv(N, config.BLOCK_N) * slices,), grad.device, grad, weight, clip, dw, dclip, N, K,
        slices, *grad.stride(), *weight.stride(), *clip.stride(), half_steps(res) if quantized else 1.0,
        QUANTIZE=quantized, ALIGNED=aligned(K, slices), **vars(config),
    )  # fmt: skip
    return dw, dclip


def _fake_grad(grad: Tensor, weight: Tensor, slices: int) -> tuple[Tensor, Tensor]:
    dw = torch.empty_like(grad, memory_format=torch.contiguous_format)
    return dw, weight.new_empty(slices, weight.shape[0], dtype=check.wide_dtype(weight))


_weight_grad = Operator("weight_grad", launch_weight_grad, reference.weight_grad, _fake_grad)


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
