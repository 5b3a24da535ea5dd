"""The input converter: clamp to the range, then round to its grid (SEMANTICS 3, steps 1 and 2).

``x_q = round(clamp(x / step, -Q, Q)) * step`` with ``step = r_s / Q``; without a resolution ``x_q = clamp(x, -r_s, r_s)``.
Behind it ``x_q += inp_noise * r_s * z``
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
    DYNAMIC_RANGE,
    INPUT_STREAM,
    NO_RANGE,
    ROUNDING_STREAM,
    STATIC_RANGE,
    TINY,
    cast,
    clamp,
    load_seed,
    normal_tile,
    slice_bounds,
    slice_of,
    step_of,
    to_random_steps,
    to_steps,
    uniform_at,
    uniform_tile,
)
from triton_analog.launch import aligned, block, cdiv, launch
from triton_analog.launch.lookup import choose
from triton_analog.launch.space import POWERS, Problem, Space, tile_fits
from triton_analog.ops import _checks as check
from triton_analog.ops._operator import Operator
from triton_analog.ops._transforms import Gradient
from triton_analog.ops.input_range import _input_range_grad
from triton_analog.reference.grid import half_steps
from triton_analog.reference.noise import is_placed

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


# ---- The operation on its own ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DacConfig:
    BLOCK_M: int
    BLOCK_K: int
    num_warps: int = 4


def default_config(problem: Problem) -> DacConfig:
    rows, width = problem.sizes
    block_k = block(width, 512)
    return DacConfig(BLOCK_M=block(rows, 4096 // block_k, smallest=1), BLOCK_K=block_k)


def _fits(problem: Problem, config: DacConfig) -> bool:
    return tile_fits(problem, config.BLOCK_M, config.BLOCK_K, least=1024, most=8192)


_VALUES = {"BLOCK_M": POWERS[:9], "BLOCK_K": POWERS[4:11], "num_warps": (4, 8)}
SPACE = Space(
    "dac", DacConfig, sizes=("rows", "width"), flags=("dynamic",), formula=default_config, fits=_fits, values=_VALUES
)
STEPS_SPACE = Space(
    "dac_steps", DacConfig, sizes=("rows", "features"), formula=default_config, fits=_fits, values=_VALUES
)


@triton.jit
def load_columns(x_ptr, m, start, column, width, M, stride_m, stride_k):
    """``x`` at rows ``m`` and columns ``start + column``, 0 where ``column >= width``; fp32."""
    inside = (m < M)[:, None] & (column < width)[None, :]
    address = m[:, None] * stride_m + (start + column).to(tl.int64)[None, :] * stride_k
    return tl.load(x_ptr + address, mask=inside, other=0).to(tl.float32)


@triton.jit
def convert_columns(x, range_ptr, s, m, M, q_max, MODE: tl.constexpr, QUANTIZE: tl.constexpr):
    """Converter integers, or clamped values, or ``x`` as it is; fp32."""
    if MODE != NO_RANGE:
        r = load_range(range_ptr, s, m, M, MODE)
        x = to_steps(x, r, q_max) if QUANTIZE else clamp(x, r)
    return x


@triton.jit
def convert_tile(
    x, range_ptr, seed_ptr, s, first_m, first_column, m, M, q_max, MODE: tl.constexpr, QUANTIZE: tl.constexpr,
    STO_ROUND: tl.constexpr, PLACED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """:func:`convert_columns` of a tile that begins at ``first_m`` and ``first_column`` of the slice, a multiple of 16."""
    if STO_ROUND:
        seed, row, _, plane = load_seed(seed_ptr, PLACED)
        u = uniform_tile(seed, row + first_m, first_column, plane + s, ROUNDING_STREAM, ROWS, COLUMNS)
        return to_random_steps(x, load_range(range_ptr, s, m, M, MODE), q_max, u)
    else:
        return convert_columns(x, range_ptr, s, m, M, q_max, MODE, QUANTIZE)


@triton.jit
def disturb_tile(
    x, range_ptr, seed_ptr, s, first_m, first_column, m, M, q_max, inp_noise, MODE: tl.constexpr, QUANTIZE: tl.constexpr,
    PLACED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of :func:`convert_tile` plus input noise, in its unit; a range of zero has no noise."""
    deviation = load_range(range_ptr, s, m, M, MODE)
    if QUANTIZE:
        deviation = tl.where(deviation < TINY, 0.0, q_max)
    seed, row, _, plane = load_seed(seed_ptr, PLACED)
    z = normal_tile(seed, row + first_m, first_column, plane + s, INPUT_STREAM, ROWS, COLUMNS)
    return x + inp_noise * deviation * z


@triton.jit(do_not_specialize=["M"])
def dac_kernel(
    x_ptr, range_ptr, out_ptr, seed_ptr, M, K, S, stride_m, stride_k, q_max, inp_noise,
    MODE: tl.constexpr, QUANTIZE: tl.constexpr, STO_ROUND: tl.constexpr, INPUT_NOISE: tl.constexpr, PLACED: tl.constexpr,
    VALUES: tl.constexpr, CONVERTED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    m = first_m + tl.arange(0, BLOCK_M)
    s = tl.program_id(2)
    start, width = slice_bounds(s, K, S, ALIGNED)
    first_column = tl.program_id(1) * BLOCK_K
    column = first_column + tl.arange(0, BLOCK_K)
    x = load_columns(x_ptr, m, start, column, width, M, stride_m, stride_k)
    if not CONVERTED:
        x = convert_tile(
            x, range_ptr, seed_ptr, s, first_m, first_column, m, M, q_max, MODE, QUANTIZE, STO_ROUND, PLACED, BLOCK_M, BLOCK_K
        )  # fmt: skip
    if INPUT_NOISE:
        x = disturb_tile(
            x, range_ptr, seed_ptr, s, first_m, first_column, m, M, q_max, inp_noise, MODE, QUANTIZE, PLACED, BLOCK_M, BLOCK_K
        )  # fmt: skip
    if VALUES and QUANTIZE:
        x *= step_of(load_range(range_ptr, s, m, M, MODE), q_max)
    inside = (m < M)[:, None] & (column < width)[None, :]
    tl.store(out_ptr + m[:, None] * K + (start + column)[None, :], cast(x, out_ptr.dtype.element_ty), mask=inside)


def launch_dac(
    x: Tensor,
    input_range: Tensor,
    slices: int,
    inp_res: float,
    *,
    dtype: torch.dtype | None = None,
    values: bool = True,
    converted: bool = False,
    inp_noise: float = 0.0,
    inp_sto_round: bool = False,
    seed: Tensor | None = None,
    config: DacConfig | None = None,
) -> Tensor:
    """``values``: converted inputs in their own unit, otherwise numbers of steps; ``x`` holds those if ``converted``."""
    M, K = x.shape
    width = cdiv(K, slices)
    config = config or choose(SPACE, x.device, x.dtype, (M, width), (input_range.ndim == 2,))
    q_max = half_steps(inp_res)
    out = torch.empty(M, K, dtype=dtype or x.dtype, device=x.device)
    launch(
        dac_kernel, (cdiv(M, config.BLOCK_M), cdiv(width, config.BLOCK_K), slices), x.device, x,
        input_range.contiguous(), out, seed, M, K, slices, *x.stride(), q_max, inp_noise, MODE=range_mode(input_range),
        QUANTIZE=q_max > 0, STO_ROUND=inp_sto_round and q_max > 0, INPUT_NOISE=inp_noise > 0,
        PLACED=is_placed(seed), VALUES=values, CONVERTED=converted, ALIGNED=aligned(K, slices), **vars(config),
    )  # fmt: skip
    return out


def _launch(
    x: Tensor,
    input_range: Tensor,
    slices: int,
    inp_res: float,
    decay: float,
    input_min_percentage: float,
    fast_mode: bool,
    inp_noise: float,
    inp_sto_round: bool,
    seed: Tensor | None,
) -> Tensor:
    """``decay``, ``input_min_percentage`` and ``fast_mode`` are for the backward."""
    return launch_dac(x, input_range, slices, inp_res, inp_noise=inp_noise, inp_sto_round=inp_sto_round, seed=seed)


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_dac = Operator("dac", _launch, reference.dac, _fake)


class _Dac(Gradient):
    NAME = "dac"

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _dac(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, input_range, ctx.slices, _, *ctx.rule, _, _, _ = inputs
        ctx.save_for_backward(x, input_range)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, input_range = ctx.saved_tensors
        if input_range.ndim == 2:  # a dynamic range never clips
            return grad, *(None,) * 9
        grad_x, grad_range = _input_range_grad(grad, x, input_range, ctx.slices, *ctx.rule)
        return grad_x, grad_range.to(input_range.dtype), *(None,) * 8


_dac.gradient = _Dac


def dac(
    x: Tensor,
    input_range: Tensor,
    slices: int,
    inp_res: float = -1.0,
    *,
    decay: float = 0.0,
    input_min_percentage: float = 0.95,
    fast_mode: bool = False,
    inp_noise: float = 0.0,
    inp_sto_round: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """``x [M, K]`` clamped to its input range and, with ``inp_res``, quantized; contiguous, in the dtype of ``x``.

    Differentiable in ``x`` (straight through rounding and noise, 0 where clipped) and in a static ``input_range`` (SEMANTICS 6).

    Args:
        x: Inputs ``[M, K]``.
        input_range: ``[S]``, one range per slice whose absolute value is used, or ``[S, M]``, one per slice and row
            (a constant of the backward, and never below ``|x|``: ``absmax(x, slices)``).
        slices: Number of slices of the columns.
        inp_res: Number of steps (> 1) or its inverse (0 < res <= 1); ``<= 0`` only clamps.
        decay: Pull of the range towards 0 where almost nothing clips.
        input_min_percentage: Share of unclipped inputs above which ``decay`` acts.
        fast_mode: The plain gradient of a clamp instead of the learned-range rule.
        inp_noise: Standard deviation of normal noise behind the converter, in units of the range; 0 is off.
        inp_sto_round: Round up with the probability of the fraction instead of to the nearest step; needs ``inp_res``.
        seed: int64 tensor with one element, or that of a part (:func:`triton_analog.seeds.placed`) that has some rows or slices;
            needed for ``inp_noise`` and ``inp_sto_round``.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.matrix("x", x)
    check.slice_count(x.shape[1], slices)
    check.range_kind(input_range, slices, x.shape[0])
    check.together("x", x, input_range=input_range, seed=seed)
    check.resolution("inp_res", inp_res)
    check.random_input(inp_noise, inp_sto_round, inp_res, input_range, seed)
    check.range_rule(decay, input_min_percentage)
    return _dac(
        x, input_range, slices, float(inp_res), decay, input_min_percentage, fast_mode, inp_noise, inp_sto_round, seed
    )


# ---- What a backward needs of the input, in less than half of its bytes --------------------------------------------------


@triton.jit(do_not_specialize=["M"])
def dac_steps_kernel(
    x_ptr, range_ptr, steps_ptr, clipped_ptr, seed_ptr, M, K, S, stride_m, stride_k, q_max,
    MODE: tl.constexpr, STO_ROUND: tl.constexpr, PLACED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tiles of whole bytes of flags, so slices may begin anywhere in them."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = (m < M) & (k < K)
    s = slice_of(k, K, S)
    x = tl.load(x_ptr + m * stride_m + k.to(tl.int64) * stride_k, mask=inside, other=0.0).to(tl.float32)
    if MODE == DYNAMIC_RANGE:
        r = tl.abs(tl.load(range_ptr + s.to(tl.int64) * M + m, mask=inside, other=0.0).to(tl.float32))
    else:
        r = tl.abs(tl.load(range_ptr + s, mask=k < K, other=0.0).to(tl.float32))
    if STO_ROUND:
        column = k - (s * (K // S) + tl.minimum(s, K % S))  # in its slice
        seed, row, _, plane = load_seed(seed_ptr, PLACED)
        q = to_random_steps(x, r, q_max, uniform_at(seed, row + m, column, plane + s, ROUNDING_STREAM))
    else:
        q = to_steps(x, r, q_max)
    touches, passes = inside & (tl.abs(x) >= r), inside & (tl.abs(x) <= r)
    q = tl.where(
        touches & (q == 0), tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)), q
    )  # the sign survives a range of 0
    tl.store(steps_ptr + m * K + k, q.to(tl.int8), mask=inside)
    if MODE == STATIC_RANGE:
        row_bytes = tl.cdiv(K, 8)
        byte = tl.program_id(1) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)[None, :]
        inside = (m < M) & (byte < row_bytes)
        for plane in tl.static_range(2):
            flags = touches if plane == 0 else passes
            bits = flags.to(tl.int32).reshape(BLOCK_M, BLOCK_K // 8, 8) << tl.arange(0, 8)[None, None, :]
            tl.store(
                clipped_ptr + (plane * M.to(tl.int64) + m) * row_bytes + byte,
                tl.sum(bits, axis=2).to(tl.uint8),
                mask=inside,
            )


def launch_dac_steps(
    x: Tensor,
    input_range: Tensor,
    slices: int,
    inp_res: float,
    inp_sto_round: bool = False,
    seed: Tensor | None = None,
    config: DacConfig | None = None,
) -> tuple[Tensor, Tensor]:
    M, K = x.shape
    config = config or choose(STEPS_SPACE, x.device, x.dtype, (M, K))
    static = input_range.ndim == 1
    steps = torch.empty(M, K, dtype=torch.int8, device=x.device)
    clipped = torch.empty(2, M if static else 0, -(-K // 8), dtype=torch.uint8, device=x.device)
    launch(
        dac_steps_kernel, (cdiv(M, config.BLOCK_M), cdiv(K, config.BLOCK_K)), x.device, x,
        input_range.contiguous(), steps, clipped, seed, M, K, slices, *x.stride(), half_steps(inp_res),
        MODE=range_mode(input_range), STO_ROUND=inp_sto_round, PLACED=is_placed(seed), **vars(config),
    )  # fmt: skip
    return steps, clipped


def _fake_steps(x: Tensor, input_range: Tensor) -> tuple[Tensor, Tensor]:
    (M, K), static = x.shape, input_range.ndim == 1
    return x.new_empty(M, K, dtype=torch.int8), x.new_empty(2, M if static else 0, (K + 7) // 8, dtype=torch.uint8)


_dac_steps = Operator("dac_steps", launch_dac_steps, reference.dac_steps, _fake_steps)


def dac_steps(
    x: Tensor,
    input_range: Tensor,
    slices: int,
    inp_res: float,
    *,
    inp_sto_round: bool = False,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All that a backward needs of an input ``[M, K]``, in five eighths of the bytes of fp16: int8 numbers of steps
    ``[M, K]`` and, for a static range, two flags per element, uint8 ``[2, M, ceil(K / 8)]`` (low bit first).

    The first flag is set where ``|x| >= r``, the second where ``|x| <= r``. NaN has neither, and any number of steps.

    Args:
        x: Inputs ``[M, K]``.
        input_range: ``[S]`` or, dynamic, ``[S, M]``.
        slices: Number of slices of the columns.
        inp_res: Number of steps, 2 to 254, or its inverse.
        inp_sto_round, seed: As in :func:`dac`.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.matrix("x", x)
    check.slice_count(x.shape[1], slices)
    check.range_kind(input_range, slices, x.shape[0])
    check.together("x", x, input_range=input_range, seed=seed)
    check.int8_steps("inp_res", inp_res)
    check.random_input(0.0, inp_sto_round, inp_res, input_range, seed)
    return _dac_steps(x.detach(), input_range.detach(), slices, float(inp_res), inp_sto_round, seed)
