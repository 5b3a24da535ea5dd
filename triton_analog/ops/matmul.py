"""The analog matrix product: input converter, tiles, output noise, output converter, sum over slices (SEMANTICS 3).

``y = sum over s of ADC(unit_s * (q_s @ W_s^T) + sigma_s * z_s) + bias``

A first launch writes the input converter's integers ``q_s``, exact in bf16 up to 512 steps, each slice padded with zeros to
whole blocks, and what the output stage needs per slice and column. The product then runs on ready operands: one loop over
the blocks of all slices, so that loads go on while a slice is finished. Without an output converter the noises of all slices
are one normal of their summed variance, and one accumulator serves all slices: it is rescaled from one slice's unit to the
next one's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import triton_analog.ops.hopper.matmul as pipeline
import triton_analog.reference as reference
from triton_analog.lang import (
    DYNAMIC_RANGE,
    NO_RANGE,
    OUTPUT_STREAM,
    STATIC_RANGE,
    TINY,
    cast,
    clamp,
    dot,
    load_seed,
    normal_tile,
    pack_bits,
    round_even,
    slice_bounds,
)
from triton_analog.launch import (
    aligned,
    block,
    cdiv,
    describable,
    hardware,
    has_wide_tiles,
    input_precision,
    launch,
    slices_describable,
)
from triton_analog.launch.lookup import choose
from triton_analog.launch.space import Problem, Space, covers, large_enough, operands_fit
from triton_analog.ops import _checks as check
from triton_analog.ops._operator import Operator
from triton_analog.ops._tiles import column_parts, descriptor, grouped, load_tile, store_bits
from triton_analog.ops._transforms import Gradient
from triton_analog.ops.dac import SPACE as DAC_SPACE
from triton_analog.ops.dac import convert_columns, convert_tile, disturb_tile, load_columns, load_range, range_mode
from triton_analog.ops.matmul_backward import _matmul_backward
from triton_analog.ops.matmul_dgrad import _matmul_dgrad
from triton_analog.ops.matmul_wgrad import _matmul_wgrad
from triton_analog.reference.adc import mask_shape
from triton_analog.reference.grid import half_steps
from triton_analog.reference.noise import is_placed


@dataclass(frozen=True)
class MatmulConfig:
    """``PARTS``: column parts of a tile that are finished one after the other, so that fewer registers are in use at once.
    ``PREPARED``: the input is converted by a launch of its own instead of in the loop. ``DESCRIPTORS``: load through tensor
    descriptors where the operands' layout allows it. ``PIPELINED``: the kernel of ``ops/hopper``, whose tile follows from the
    number of slices (:func:`triton_analog.ops.hopper.matmul.tile_for`); of the rest only ``GROUP_M`` matters then."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int = 16
    PARTS: int = 1
    PREPARED: bool = True
    DESCRIPTORS: bool = True
    PIPELINED: bool = False
    num_warps: int = 8
    num_stages: int = 3


def _has_tensor_memory(capability: int) -> bool:
    """There Triton 3.6 cannot compile slices that are finished in one part."""
    return 100 <= capability < 120


PIPELINED = MatmulConfig(192, 128, 64, GROUP_M=8, PIPELINED=True, num_warps=4, num_stages=5)


def _can_be_pipelined(problem: Problem) -> bool:
    per_slice, noise, dynamic = problem.flags
    folded = noise and dynamic and not per_slice  # a deviation for each row and column
    return problem.hardware.capability == 90 and problem.dtype.itemsize == 2 and not folded


def _should_be_pipelined(problem: Problem) -> bool:
    """With fewer outputs multiprocessors have no tile, or wait for the last tile's output stage. (Found on an H200.)"""
    rows, columns, _ = problem.sizes
    per_slice, noise, _ = problem.flags
    fewest = 2_000_000 if not per_slice else 4_500_000 if noise else 3_200_000
    # Between powers of two the answer is the same, as the configuration has to be.
    return _can_be_pipelined(problem) and triton.next_power_of_2(rows) * columns >= fewest


def default_config(problem: Problem) -> MatmulConfig:
    return PIPELINED if _should_be_pipelined(problem) else _plain_config(problem)


def _plain_config(problem: Problem) -> MatmulConfig:
    rows, columns, width = problem.sizes
    per_slice, noise, dynamic = problem.flags
    capability, size = problem.hardware.capability, problem.dtype.itemsize
    block_k = block(width, 128 // size if has_wide_tiles(capability) else min(64, 128 // size), 32 if size == 1 else 16)
    block_m, block_n = block(rows, 64, 32), block(columns, 128, 64)
    in_parts = (block_n == 128 and (per_slice or noise)) or (per_slice and _has_tensor_memory(capability))
    parts = 2 if in_parts else 1
    if capability == 0:  # AMD's shared memory has no room for splitting a tile
        return MatmulConfig(block_m, block_n, block_k, DESCRIPTORS=False, num_stages=2)
    if not has_wide_tiles(capability) or size == 4:
        return MatmulConfig(block_m, block_n, block_k, PARTS=parts, DESCRIPTORS=False)
    if per_slice or rows <= 128 or columns <= 128 or (noise and dynamic):
        # Two of these fit on Hopper's multiprocessor: one finishes a slice while the other multiplies.
        warps = 4 if capability < 100 else 8
        return MatmulConfig(block_m, block_n, block_k, PARTS=parts, num_warps=warps, num_stages=4)
    return MatmulConfig(256, block_n, block_k, PARTS=4 if noise else 1)


def _fits(problem: Problem, config: MatmulConfig) -> bool:
    if config.PIPELINED:
        return _should_be_pipelined(problem) and config in (PIPELINED, replace(PIPELINED, GROUP_M=16))
    rows, columns, width = problem.sizes
    per_slice, noise, _ = problem.flags
    capability, size = problem.hardware.capability, problem.dtype.itemsize
    row_bytes = config.BLOCK_K * size
    outputs = config.BLOCK_M * config.BLOCK_N // (32 * config.num_warps)
    part = config.BLOCK_N // config.PARTS
    return (
        covers(config.BLOCK_M, rows, 32)
        and covers(config.BLOCK_N, columns, 64)
        and covers(config.BLOCK_K, width, 32 if size == 1 else 16)
        and (row_bytes in (64, 128) or config.BLOCK_K >= width)
        and (size > 1 or config.BLOCK_K >= 32)  # what NVIDIA's integer products take
        and operands_fit(problem.hardware, config.BLOCK_M + config.BLOCK_N, row_bytes, config.num_stages)
        and outputs <= (64 if per_slice else 128)  # a second accumulator holds the sum over slices
        and (config.PARTS > 1 or not (per_slice and _has_tensor_memory(capability)))
        and (config.PARTS == 1 or ((per_slice or noise) and part >= 32 and not (per_slice and config.PARTS > 2)))
        and (config.PREPARED or columns <= 1024)  # else the input is converted too often
        and config.DESCRIPTORS is (has_wide_tiles(capability) and size < 4)
        and large_enough(config.BLOCK_M, config.BLOCK_N, rows, columns)
        and config.BLOCK_M != PIPELINED.BLOCK_M
        and config.num_stages != PIPELINED.num_stages
    )


SPACE = Space(
    "matmul", MatmulConfig, sizes=("rows", "columns", "width"), flags=("per_slice", "noise", "dynamic"),
    formula=default_config, fits=_fits,
    values={
        "BLOCK_M": (32, 64, 128, 192, 256), "BLOCK_N": (64, 128, 256), "BLOCK_K": (16, 32, 64, 128), "GROUP_M": (8, 16),
        "PARTS": (1, 2, 4), "PREPARED": (True, False), "DESCRIPTORS": (True, False), "PIPELINED": (False, True),
        "num_warps": (4, 8), "num_stages": (2, 3, 4, 5),
    },
    others=(pipeline,),
)  # fmt: skip
"""``per_slice``: slices are finished separately (bound or int8)."""


# ---- What comes before the product --------------------------------------------------------------------------------------


@triton.jit
def load_scale(ptr, s, n, columns, N):
    """One number per column ``n`` of slice ``s`` from ``[S, columns]``, ``columns`` being ``N`` or 1."""
    return tl.load(ptr + s * columns + n % columns, mask=n < N, other=0.0).to(tl.float32)


@triton.jit
def write_coefficients(
    coefficient_ptr, range_ptr, noise_wmax_ptr, bound_wmax_ptr, weight_wmax_ptr, s, n, N, S, columns, noise_columns,
    bound_columns, weight_columns, in_q_max, weight_q_max, sigma, out_bound, out_q_max,
    MODE: tl.constexpr, DAC: tl.constexpr, NOISE: tl.constexpr, BOUND: tl.constexpr, ADC: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """``[3, S, columns]``, 0 beyond ``N``: factors that bring product and noise into ADC steps (without rounding: into the
    product's unit), and the step (the bound). A static range is part of them; a dynamic one multiplies what comes out."""
    r = tl.abs(tl.load(range_ptr + s).to(tl.float32)) if MODE == STATIC_RANGE else 1.0
    product = tl.zeros_like(n).to(tl.float32) + (r / in_q_max if DAC else 1.0)
    if INT8:
        product *= load_scale(weight_wmax_ptr, s, n, weight_columns, N) / weight_q_max
    noise = sigma * r * load_scale(noise_wmax_ptr, s, n, noise_columns, N) if NOISE else tl.zeros_like(product)
    out = tl.zeros_like(product)
    if BOUND:
        out = out_bound * r * load_scale(bound_wmax_ptr, s, n, bound_columns, N)
    if ADC:
        is_zero = out < TINY
        per_unit = tl.where(is_zero, 0.0, out_q_max / tl.where(is_zero, 1.0, out))
        product *= per_unit
        noise *= per_unit
        out = out / out_q_max
    at = coefficient_ptr + s * columns + n
    tl.store(at, tl.where(n < N, product, 0.0), mask=n < columns)
    tl.store(at + S * columns, noise, mask=n < columns)
    tl.store(at + 2 * S * columns, out, mask=n < columns)


@triton.jit(do_not_specialize=["M", "blocks_m"])
def matmul_prepare_kernel(
    x_ptr, range_ptr, operand_ptr, noise_wmax_ptr, bound_wmax_ptr, weight_wmax_ptr, coefficient_ptr, poison_ptr, seed_ptr,
    M, N, K, S, stride_m, stride_k, width, blocks_m, blocks_k, columns, noise_columns, bound_columns, weight_columns,
    in_q_max, weight_q_max, sigma, out_bound, out_q_max, inp_noise,
    MODE: tl.constexpr, DAC: tl.constexpr, NOISE: tl.constexpr, BOUND: tl.constexpr, ADC: tl.constexpr, INT8: tl.constexpr,
    STO_ROUND: tl.constexpr, INPUT_NOISE: tl.constexpr, PLACED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The first ``blocks_m * blocks_k * S`` programs convert the input, each slice padded with zeros to ``width`` columns; the
    others find the coefficients."""
    pid = tl.program_id(0)
    blocks = blocks_m * blocks_k
    if pid < blocks * S:
        s = pid // blocks
        first_m, first_column = (pid % blocks // blocks_k).to(tl.int64) * BLOCK_M, pid % blocks_k * BLOCK_K
        m = first_m + tl.arange(0, BLOCK_M)
        start, slice_width = slice_bounds(s, K, S, ALIGNED)
        column = first_column + tl.arange(0, BLOCK_K)
        x = load_columns(x_ptr, m, start, column, slice_width, M, stride_m, stride_k)
        x = convert_tile(
            x, range_ptr, seed_ptr, s, first_m, first_column, m, M, in_q_max, MODE, DAC, STO_ROUND, PLACED, BLOCK_M, BLOCK_K
        )  # fmt: skip
        if INPUT_NOISE:
            x = disturb_tile(
                x, range_ptr, seed_ptr, s, first_m, first_column, m, M, in_q_max, inp_noise, MODE, DAC, PLACED, BLOCK_M,
                BLOCK_K,
            )  # fmt: skip
            x = tl.where((column < slice_width)[None, :], x, 0.0)
        if INT8:  # integers cannot hold NaN
            is_nan = tl.max((x != x).to(tl.int32), axis=1) > 0
            tl.store(poison_ptr + m, tl.full((BLOCK_M,), float("nan"), tl.float32), mask=is_nan & (m < M))
        address = operand_ptr + m[:, None] * (S * width) + (s * width + column)[None, :]
        tl.store(address, cast(x, operand_ptr.dtype.element_ty), mask=(m < M)[:, None] & (column < width)[None, :])
    elif BOUND or INT8:
        blocks_n = tl.cdiv(columns, BLOCK_N)
        n = (pid - blocks * S) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
        write_coefficients(
            coefficient_ptr, range_ptr, noise_wmax_ptr, bound_wmax_ptr, weight_wmax_ptr, (pid - blocks * S) // blocks_n, n, N,
            S, columns, noise_columns, bound_columns, weight_columns, in_q_max, weight_q_max, sigma, out_bound, out_q_max,
            MODE, DAC, NOISE, BOUND, ADC, INT8,
        )  # fmt: skip


# ---- The product --------------------------------------------------------------------------------------------------------


@triton.jit
def finish_slice(
    y, acc, coefficient_ptr, range_ptr, seed, mask_ptr, s, first_m, first_n, M, N, S, columns, out_q_max,
    MODE: tl.constexpr, DAC: tl.constexpr, NOISE: tl.constexpr, BOUND: tl.constexpr, ADC: tl.constexpr, MASK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``y`` plus what one slice's product ``acc`` becomes in the output stage; ``seed`` is what :func:`load_seed` gives. Columns
    beyond ``N`` get coefficients of 0."""
    m = first_m + tl.arange(0, ROWS)
    n = first_n + tl.arange(0, COLUMNS)
    at = coefficient_ptr + s * columns + n
    v = acc.to(tl.float32) * tl.load(at)[None, :]
    if MODE == DYNAMIC_RANGE:
        r = load_range(range_ptr, s, m, M, MODE)
        if not DAC:
            v *= tl.where(r < TINY, 0.0, 1.0 / tl.where(r < TINY, 1.0, r))
    if NOISE and BOUND:
        noise = tl.load(at + S * columns)[None, :]
        number, row, column, plane = seed
        v += noise * normal_tile(number, row + first_m, column + first_n, plane + s, OUTPUT_STREAM, ROWS, COLUMNS)
    if BOUND:
        out = tl.load(at + 2 * S * columns)[None, :]
        if ADC:
            v = round_even(v)  # rounds coarsely beyond 2**22, where the clamp acts anyway
            passes = tl.abs(v) <= out_q_max
            v = clamp(v, out_q_max) * out
        else:
            passes = tl.abs(v) <= out
            v = clamp(v, out)
        if MASK:
            store_bits(mask_ptr, ~pack_bits(passes, ROWS, COLUMNS), s, first_m, first_n, M, N, ROWS, COLUMNS)
    if MODE == DYNAMIC_RANGE:
        v *= r
    return y + v


@triton.jit
def finish_tile(
    y, bias_ptr, range_ptr, noise_wmax_ptr, poison_ptr, seed, y_ptr, first_m, first_n, M, N, S, noise_columns, sigma,
    MODE: tl.constexpr, FOLDED_NOISE: tl.constexpr, BIAS: tl.constexpr, INT8: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The noise of all slices in one draw, the bias, and the cast."""
    m = first_m + tl.arange(0, ROWS)
    n = first_n + tl.arange(0, COLUMNS)
    if FOLDED_NOISE:
        variance = tl.zeros((ROWS if MODE == DYNAMIC_RANGE else 1, COLUMNS), tl.float32)
        for s in range(S):
            deviation = (
                sigma
                * load_range(range_ptr, s, m, M, MODE)
                * load_scale(noise_wmax_ptr, s, n, noise_columns, N)[None, :]
            )
            variance += deviation * deviation
        number, row, column, plane = seed
        size = tl.sqrt(variance)
        y += size * normal_tile(number, row + first_m, column + first_n, plane, OUTPUT_STREAM, ROWS, COLUMNS)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if INT8:
        y += tl.load(poison_ptr + m, mask=m < M, other=0.0)[:, None]
    address = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(address, cast(y, y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def slice_unit(range_ptr, s, m, M, q_max, fallback, MODE: tl.constexpr):
    """The input converter's step in slice ``s``; a slice without a range adds nothing, whatever its unit."""
    r = load_range(range_ptr, s, m, M, MODE)
    return tl.where(r < TINY, fallback, r / q_max)


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    x, w, bias_ptr, range_ptr, coefficient_ptr, noise_wmax_ptr, poison_ptr, seed_ptr, y_ptr, mask_ptr,
    M, N, K, S, stride_xm, stride_xk, stride_wn, stride_wk, blocks_n, x_columns, width, noise_columns, in_q_max, sigma,
    out_q_max,
    MODE: tl.constexpr, DAC: tl.constexpr, NOISE: tl.constexpr, PLACED: tl.constexpr, BOUND: tl.constexpr, ADC: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, INT8: tl.constexpr, CONVERT: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, DESCRIPTORS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``width`` is that of a slice in whole blocks. Slices lie that far apart in a prepared ``x``; not if it is to
    ``CONVERT`` in the loop."""
    PER_SLICE: tl.constexpr = BOUND or INT8
    RESCALE: tl.constexpr = DAC and not PER_SLICE
    ACC: tl.constexpr = tl.int32 if INT8 else tl.float32
    COLUMNS: tl.constexpr = BLOCK_N // PARTS
    block_m, block_n = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), blocks_n, GROUP_M)
    first_m, first_n = block_m * BLOCK_M, block_n * BLOCK_N
    m = first_m + tl.arange(0, BLOCK_M)
    seed = load_seed(seed_ptr, PLACED) if NOISE else 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    y0 = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    y1 = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    unit = tl.full((BLOCK_M if MODE == DYNAMIC_RANGE else 1, 1), 1.0, tl.float32)
    if RESCALE:
        unit = slice_unit(range_ptr, 0, m, M, in_q_max, unit, MODE)
    s, step = 0, 0
    steps = width // BLOCK_K
    for i in range(S * steps):
        start, slice_width = slice_bounds(s, K, S, ALIGNED)
        column = step * BLOCK_K
        b = load_tile(
            w, first_n, start + column, stride_wn, stride_wk, N, start + slice_width, DESCRIPTORS, BLOCK_N, BLOCK_K
        )
        if CONVERT:
            a = load_tile(
                x, first_m, start + column, stride_xm, stride_xk, M, start + slice_width, DESCRIPTORS, BLOCK_M, BLOCK_K
            )
            a = convert_columns(a.to(tl.float32), range_ptr, s, m, M, in_q_max, MODE, DAC)
            a = cast(tl.where((column + tl.arange(0, BLOCK_K) < slice_width)[None, :], a, 0.0), b.dtype)
        else:
            a = load_tile(x, first_m, i * BLOCK_K, stride_xm, stride_xk, M, x_columns, DESCRIPTORS, BLOCK_M, BLOCK_K)
        acc = dot(a, tl.trans(b), acc, PRECISION)
        if step == steps - 1:
            if PER_SLICE:
                parts = column_parts(acc, PARTS, BLOCK_M, BLOCK_N)
                if M > 0:
                    y0 = finish_slice(
                        y0, parts[0], coefficient_ptr, range_ptr, seed, mask_ptr, s, first_m, first_n, M, N, S,
                        blocks_n * BLOCK_N, out_q_max, MODE, DAC, NOISE, BOUND, ADC, MASK, BLOCK_M, COLUMNS,
                    )  # fmt: skip
                if PARTS == 2:  # noqa: SIM102 (this one is known to the compiler, the next one is not)
                    if N > 0:
                        y1 = finish_slice(
                            y1, parts[1], coefficient_ptr, range_ptr, seed, mask_ptr, s, first_m, first_n + COLUMNS, M, N, S,
                            blocks_n * BLOCK_N, out_q_max, MODE, DAC, NOISE, BOUND, ADC, MASK, BLOCK_M, COLUMNS,
                        )  # fmt: skip
                acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
            elif RESCALE:
                new = slice_unit(range_ptr, tl.minimum(s + 1, S - 1), m, M, in_q_max, unit, MODE)
                acc *= unit / new
                unit = new
        # Outside of the condition, or the loads of the next blocks would wait for it.
        s = tl.where(step == steps - 1, s + 1, s)
        step = tl.where(step == steps - 1, 0, step + 1)

    FOLDED_NOISE: tl.constexpr = NOISE and not BOUND
    if PER_SLICE:
        parts = (y0, y1)
    else:
        if RESCALE:
            acc *= unit
        parts = column_parts(acc, PARTS, BLOCK_M, BLOCK_N)
    for part in tl.static_range(PARTS):
        if part - PARTS < M:
            finish_tile(
                parts[part], bias_ptr, range_ptr, noise_wmax_ptr, poison_ptr, seed, y_ptr, first_m,
                first_n + part * COLUMNS, M, N, S, noise_columns, sigma, MODE, FOLDED_NOISE, BIAS, INT8, BLOCK_M, COLUMNS,
            )  # fmt: skip


def launch_padding(weight: Tensor, slices: int, width: int) -> Tensor:
    """``weight`` with each slice padded with zeros to ``width`` columns."""
    (N, K), columns = weight.shape, slices * width
    out = torch.empty(N, columns, dtype=weight.dtype, device=weight.device)
    tiles = choose(DAC_SPACE, weight.device, weight.dtype, (N, width), (False,))
    blocks = cdiv(N, tiles.BLOCK_M), cdiv(width, tiles.BLOCK_K)
    launch(
        matmul_prepare_kernel, (slices * blocks[0] * blocks[1],), weight.device, weight, None, out, *[None] * 6,
        N, 0, K, slices, *weight.stride(), width, *blocks, 0, 1, 1, 1, *[0.0] * 6, MODE=NO_RANGE, DAC=False,
        NOISE=False, BOUND=False, ADC=False, INT8=False, STO_ROUND=False, INPUT_NOISE=False, PLACED=False,
        ALIGNED=aligned(K, slices), BLOCK_N=16, **vars(tiles),
    )  # fmt: skip
    return out


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
    weight_wmax: Tensor | None = None,
    weight_res: float = 0.0,
    needs_mask: bool = True,
    inp_noise: float = 0.0,
    inp_sto_round: bool = False,
    config: MatmulConfig | None = None,
) -> tuple[Tensor, Tensor]:
    (M, K), N = x.shape, weight.shape[0]
    if input_range is None:  # then slices make no difference
        slices = 1
    sigma, in_q_max, out_q_max = out_noise / slices**0.5, half_steps(inp_res), half_steps(out_res)
    int8, ranged = weight.dtype == torch.int8, input_range is not None
    dynamic = input_range is not None and input_range.ndim == 2
    sizes, switches = (M, N, cdiv(K, slices)), (int8 or out_bound > 0, out_noise > 0, dynamic)
    config = config or choose(SPACE, x.device, weight.dtype, sizes, switches)
    if config.PIPELINED and not (M > 0 and ranged):
        config = _plain_config(Problem(hardware(x.device), weight.dtype, sizes, switches))
    tile = pipeline.tile_for(slices, out_bound > 0)
    block_k, tile_columns = (
        (pipeline.DEPTH.value, tile.COLUMNS) if config.PIPELINED else (config.BLOCK_K, config.BLOCK_N)
    )
    width = cdiv(cdiv(K, slices), block_k) * block_k
    is_random = inp_noise > 0 or inp_sto_round  # then it is to be drawn once, not for each tile of the product
    convert = ranged and not (config.PREPARED or int8 or is_random)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=x.device)

    input_range, noise_wmax, bound_wmax, weight_wmax = (
        None if t is None else t.contiguous() for t in (input_range, noise_wmax, bound_wmax, weight_wmax)
    )
    noise_columns, bound_columns, weight_columns = (
        1 if t is None else t.shape[1] for t in (noise_wmax, bound_wmax, weight_wmax)
    )
    flags = {
        "MODE": range_mode(input_range), "DAC": ranged and in_q_max > 0, "NOISE": out_noise > 0, "BOUND": out_bound > 0,
        "ADC": out_q_max > 0, "INT8": int8,
    }  # fmt: skip
    operand = new(M, slices * width, dtype=weight.dtype) if ranged and not convert else x
    blocks_n = cdiv(cdiv(N, 128) * 128 if out_bound > 0 else N, tile_columns)  # whole words of the mask
    columns = blocks_n * tile_columns
    coefficients = new(3, slices, columns) if int8 or out_bound > 0 else None
    poison = torch.zeros(M, dtype=torch.float32, device=x.device) if int8 else None
    if operand is not x or coefficients is not None:
        tiles = choose(DAC_SPACE, x.device, x.dtype, (M, width), (dynamic,))
        blocks = cdiv(M, tiles.BLOCK_M) if operand is not x else 0, cdiv(width, tiles.BLOCK_K)
        block_n = block(columns, 1024)
        programs = slices * (blocks[0] * blocks[1] + (cdiv(columns, block_n) if coefficients is not None else 0))
        launch(
            matmul_prepare_kernel, (programs,), x.device, x, input_range, operand, noise_wmax, bound_wmax, weight_wmax,
            coefficients, poison, seed if is_random else None, M, N, K, slices, *x.stride(), width, *blocks, columns,
            noise_columns, bound_columns, weight_columns, in_q_max, half_steps(weight_res), sigma, out_bound, out_q_max,
            inp_noise, **flags, STO_ROUND=inp_sto_round and in_q_max > 0, INPUT_NOISE=inp_noise > 0,
            PLACED=is_random and is_placed(seed), ALIGNED=aligned(K, slices), BLOCK_N=block_n, **vars(tiles),
        )  # fmt: skip

    y = new(M, N, dtype=x.dtype)
    mask = new(*mask_shape(slices if out_bound > 0 and needs_mask else 0, M, N), dtype=torch.int32)
    if config.PIPELINED:
        assert input_range is not None
        del flags["INT8"]
        if not (describable(weight) and slices_describable(weight, slices)):
            weight = launch_padding(weight, slices, width)
        pipeline.launch_product(
            operand, weight, bias, input_range, coefficients, noise_wmax, seed, y, mask, slices, in_q_max, sigma, out_q_max,
            config.GROUP_M, flags,
        )  # fmt: skip
        return y, mask
    options = dict(vars(config))
    del options["PREPARED"], options["PIPELINED"]
    options["DESCRIPTORS"] = descriptors = (
        config.DESCRIPTORS and describable(operand, weight) and slices_describable(weight, slices)
    )
    launch(
        matmul_kernel, (cdiv(M, config.BLOCK_M) * blocks_n,), x.device,
        descriptor(operand, config.BLOCK_M, config.BLOCK_K, descriptors),
        descriptor(weight, config.BLOCK_N, config.BLOCK_K, descriptors),
        None if bias is None else bias.contiguous(), input_range, coefficients, noise_wmax, poison, seed, y, mask,
        M, N, K, slices, *operand.stride(), *weight.stride(), blocks_n, operand.shape[1], width, noise_columns, in_q_max, sigma,
        out_q_max, **flags, PLACED=out_noise > 0 and is_placed(seed), MASK=mask.numel() > 0, BIAS=bias is not None,
        CONVERT=convert, PRECISION=input_precision(), ALIGNED=aligned(K, slices), **options,
    )  # fmt: skip
    return y, mask


def _fake(x: Tensor, weight: Tensor, slices: int, out_bound: float, needs_mask: bool) -> tuple[Tensor, Tensor]:
    M, N = x.shape[0], weight.shape[0]
    shape = mask_shape(slices if out_bound > 0 and needs_mask else 0, M, N)
    return x.new_empty(M, N), x.new_empty(shape, dtype=torch.int32)


_matmul = Operator("matmul", launch_matmul, reference.matmul, _fake)


class _Matmul(Gradient):
    NAME = "matmul"

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        _, weight, _, _, _, _, _, _, out_bound, *_, needs_mask, _, _ = args
        check.require(
            needs_mask or out_bound <= 0,
            lambda: (
                "needs_mask: False, but a bound's backward needs the mask; leave it on or run under torch.no_grad()"
            ),
        )
        check.require(
            weight.dtype != torch.int8, lambda: "weight: an int8 weight has no backward; run under torch.no_grad()"
        )
        return _matmul(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, input_range, ctx.slices, ctx.inp_res, *_ = inputs
        out_bound, seed, ctx.random = inputs[8], inputs[11], inputs[-2:]
        _, mask = output
        ctx.save_for_backward(
            x, weight, input_range, mask if out_bound > 0 else None, seed if any(ctx.random) else None
        )
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x, weight, input_range, mask, seed = ctx.saved_tensors
        dx = dw = dbias = dr = None
        needs_x, needs_weight, needs_bias, needs_range = ctx.needs_input_grad[:4]
        static = input_range if input_range is not None and input_range.ndim == 1 else None
        dtype, bias_dtype = weight.dtype, ctx.bias_dtype if needs_bias else None
        rule = 0.0, 1.0, False
        if (needs_x or needs_range) and (needs_weight or needs_bias):
            dx, dr, dw, dbias = _matmul_backward(
                grad, weight, x, None, input_range, ctx.slices, mask, *rule, ctx.inp_res, dtype, bias_dtype, *ctx.random, seed,
                True,
            )  # fmt: skip
        elif needs_x or needs_range:
            dx, dr, _ = _matmul_dgrad(grad, weight, x, None, static, ctx.slices, mask, *rule, -1.0, False)
        elif needs_weight or needs_bias:
            dw, dbias = _matmul_wgrad(
                grad, x, input_range, ctx.slices, mask, ctx.inp_res, dtype, False, bias_dtype, *ctx.random, seed
            )
        dr = dr if static is not None else None
        return dx, dw, dbias if needs_bias else None, dr, *(None,) * 13


_matmul.gradient = _Matmul


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
    weight_wmax: Tensor | None = None,
    weight_res: float = 0.0,
    needs_mask: bool = True,
    inp_noise: float = 0.0,
    inp_sto_round: bool = False,
) -> tuple[Tensor, Tensor]:
    """The analog product ``y [M, N]`` of ``x`` and ``weight``, and the output converter's packed saturation mask.

    Differentiable in ``x``, ``weight``, ``bias`` and a static ``input_range`` (SEMANTICS 6; the learned-range rule without
    decay). The weight given is kept for the backward: :func:`triton_analog.functional.analog_linear` rebuilds it instead.

    Args:
        x: Inputs ``[M, K]``, any strides.
        weight: ``[N, K]`` as the tiles hold it (see :func:`triton_analog.ops.weight`), dtype of ``x``; or int8, numbers of
            steps, which makes an exact product of integers (not differentiable).
        bias: ``[N]`` or None, added digitally.
        input_range: ``[S]`` (static, absolute value used), ``[S, M]`` (dynamic, a constant of the backward), or None.
        slices: Number of slices of the columns.
        inp_res: Input converter: number of steps (> 1) or its inverse; ``<= 0`` is off.
        out_noise: Output noise in units of ``r * noise_wmax``, divided by ``sqrt(slices)`` per slice; 0 is off.
        noise_wmax: ``[S, N]`` or ``[S, 1]``.
        out_bound: Output converter's bound in units of ``r * bound_wmax``; ``<= 0`` is off.
        bound_wmax: ``[S, N]`` or ``[S, 1]``.
        out_res: Output converter's number of steps or its inverse; ``<= 0`` does not round.
        seed: int64 tensor with one element, or that of a part of a product (:func:`triton_analog.seeds.placed`); needed for noise
            and for stochastic rounding.
        weight_wmax: Scale of an int8 weight, ``[S, N]`` or ``[S, 1]``.
        weight_res: Number of states of an int8 weight (at most 254) or its inverse.
        needs_mask: Whether to write the mask; without it there is no backward through a bound.
        inp_noise: Input noise behind the input converter, in units of the range; 0 is off. Not with an int8 weight.
        inp_sto_round: The input converter rounds up with the probability of the fraction; needs ``inp_res``.

    Returns:
        ``y [M, N]`` in the dtype of ``x``, and int32 ``[S, ceil(N / 128), M, 4]``, a bit for every product that saturated
        (:func:`triton_analog.reference.pack_bits` has the order); empty without a bound.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.matrix("x", x)
    check.product_operands(x, weight, slices)
    check.range_kind(input_range, slices, x.shape[0])
    check.together("x", x, input_range=input_range)
    if weight.dtype == torch.int8:
        check.int8_weight(weight, weight_wmax, weight_res, slices, inp_res)
        check.require(
            inp_noise <= 0, lambda: f"inp_noise: got {inp_noise}, but int8 inputs are whole steps; pass a float weight"
        )
    else:
        check.same_dtype("x", x, weight=weight)
    N = weight.shape[0]
    check.input_converter(inp_res, input_range, x)
    check.random_input(inp_noise, inp_sto_round, inp_res, input_range, seed)
    check.bias(bias, N)
    check.output_stage(input_range, out_noise, noise_wmax, out_bound, bound_wmax, out_res, seed)
    check.wmax_shape("noise_wmax", noise_wmax, slices, N)
    check.wmax_shape("bound_wmax", bound_wmax, slices, N)
    check.together("x", x, bias=bias, noise_wmax=noise_wmax, bound_wmax=bound_wmax, seed=seed)
    check.together("x", x, weight_wmax=weight_wmax)
    return _matmul(
        x, weight, bias, input_range, slices, float(inp_res), out_noise, noise_wmax, out_bound, bound_wmax, float(out_res),
        seed, weight_wmax, float(weight_res), needs_mask, inp_noise, inp_sto_round,
    )  # fmt: skip
