"""The input converter: clamp to the range, then round to its grid (SEMANTICS 3, steps 1 and 2).

``x_q = round(clamp(x / step, -Q, Q)) * step`` with ``step = r_s / Q``; without a resolution ``x_q = clamp(x, -r_s, r_s)``
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_analog import reference
from triton_analog.lang import DYNAMIC_RANGE, NO_RANGE, STATIC_RANGE, cast, clamp, slice_of, step_of, to_steps
from triton_analog.launch import block, launch, runs_kernel
from triton_analog.ops import _checks as check
from triton_analog.ops.input_range import _input_range_grad
from triton_analog.reference.grid import half_steps

# ---- For the matrix products: a tile of the input as their dot takes it -------------------------------------------------


def range_mode(input_range: Tensor | None) -> int:
    if input_range is None:
        return NO_RANGE.value
    return (STATIC_RANGE if input_range.ndim == 1 else DYNAMIC_RANGE).value


@triton.jit
def load_range(range_ptr, s, m, M, MODE: tl.constexpr):
    """``|r|`` of slice ``s`` as ``[1, 1]`` (static) or ``[rows, 1]`` (dynamic)."""
    if MODE == DYNAMIC_RANGE:
        r = tl.load(range_ptr + M.to(tl.int64) * s + m, mask=m < M, other=0.0)[:, None]
    else:
        r = tl.load(range_ptr + s + tl.zeros((1, 1), tl.int32))
    return tl.abs(r.to(tl.float32))


@triton.jit
def operand(x, r, q_max, MODE: tl.constexpr, QUANTIZE: tl.constexpr, DTYPE: tl.constexpr):
    """A tile of the input as the dot takes it: converter integers, clamped values, or as it is."""
    x = x.to(tl.float32)
    if QUANTIZE:
        x = to_steps(x, r, q_max)
    elif MODE != NO_RANGE:
        x = clamp(x, r)
    return cast(x, DTYPE)


# ---- The operation on its own ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DacConfig:
    BLOCK_M: int
    BLOCK_K: int
    num_warps: int = 4


def default_config(rows: int, features: int) -> DacConfig:
    return DacConfig(BLOCK_M=block(rows, 16, smallest=1), BLOCK_K=block(features, 256))


@triton.jit(do_not_specialize=["M"])
def dac_kernel(
    x_ptr, range_ptr, out_ptr, M, K, S, stride_m, stride_k, q_max,
    DYNAMIC: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = (m < M) & (k < K)
    s = slice_of(k, K, S)
    if DYNAMIC:
        r = tl.load(range_ptr + s.to(tl.int64) * M + m, mask=inside, other=0.0)
    else:
        r = tl.load(range_ptr + s, mask=k < K, other=0.0)
    r = tl.abs(r.to(tl.float32))
    x = tl.load(x_ptr + m * stride_m + k.to(tl.int64) * stride_k, mask=inside, other=0.0).to(tl.float32)
    if QUANTIZE:
        out = to_steps(x, r, q_max) * step_of(r, q_max)
    else:
        out = clamp(x, r)
    tl.store(out_ptr + m * K + k, cast(out, out_ptr.dtype.element_ty), mask=inside)


def launch_dac(x: Tensor, input_range: Tensor, slices: int, inp_res: float, config: DacConfig | None = None) -> Tensor:
    M, K = x.shape
    config = config or default_config(M, K)
    q_max = half_steps(inp_res)
    out = torch.empty(M, K, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(M, config.BLOCK_M), triton.cdiv(K, config.BLOCK_K))
    launch(
        dac_kernel, grid, x.device, x, input_range.contiguous(), out, M, K, slices, *x.stride(), q_max,
        DYNAMIC=input_range.ndim == 2, QUANTIZE=q_max > 0, **asdict(config),
    )  # fmt: skip
    return out


@torch.library.custom_op("triton_analog::dac", mutates_args=())
def _dac(
    x: Tensor,
    input_range: Tensor,
    slices: int,
    inp_res: float,
    decay: float,
    input_min_percentage: float,
    fast_mode: bool,
) -> Tensor:
    if runs_kernel(x):
        return launch_dac(x, input_range, slices, inp_res)
    return reference.dac(x, input_range, slices, inp_res)


@_dac.register_fake
def _(x, input_range, slices, inp_res, decay, input_min_percentage, fast_mode):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    x, input_range, ctx.slices, _, ctx.decay, ctx.input_min_percentage, ctx.fast_mode = inputs
    ctx.save_for_backward(x, input_range)


def _backward(ctx, grad):
    x, input_range = ctx.saved_tensors
    if input_range.ndim == 2:  # a dynamic range never clips
        return grad, None, None, None, None, None, None
    grad_x, grad_range = _input_range_grad(
        grad, x, input_range, ctx.slices, ctx.decay, ctx.input_min_percentage, ctx.fast_mode
    )
    return grad_x, grad_range.to(input_range.dtype), None, None, None, None, None


_dac.register_autograd(_backward, setup_context=_setup_context)


def dac(
    x: Tensor,
    input_range: Tensor,
    slices: int,
    inp_res: float = -1.0,
    *,
    decay: float = 0.0,
    input_min_percentage: float = 0.95,
    fast_mode: bool = False,
) -> Tensor:
    """``x [M, K]`` clamped to its input range and, with ``inp_res``, quantized; contiguous, in the dtype of ``x``.

    Differentiable in ``x`` (straight through the rounding, 0 where clipped) and in a static ``input_range`` (SEMANTICS 6).

    Args:
        x: Inputs ``[M, K]``.
        input_range: ``[S]``, one range per slice whose absolute value is used, or ``[S, M]``, one per slice and row
            (a constant of the backward, and never below ``|x|``: ``absmax(x, slices)``).
        slices: Number of slices of the columns.
        inp_res: Number of steps (> 1) or its inverse (0 < res <= 1); ``<= 0`` only clamps.
        decay: Pull of the range towards 0 where almost nothing clips.
        input_min_percentage: Share of unclipped inputs above which ``decay`` acts.
        fast_mode: The plain gradient of a clamp instead of the learned-range rule.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.matrix("x", x)
    check.slice_count(x.shape[1], slices)
    check.range_kind(input_range, slices, x.shape[0])
    check.together("x", x, input_range=input_range)
    check.resolution("inp_res", inp_res)
    check.range_rule(decay, input_min_percentage)
    return _dac(x, input_range, slices, float(inp_res), decay, input_min_percentage, fast_mode)
