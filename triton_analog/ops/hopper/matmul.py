"""The product of ``ops/matmul.py`` as a pipeline (SEMANTICS 3)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triton_analog.lang import DYNAMIC_RANGE, TINY
from triton_analog.launch import cdiv, launch, multiprocessors
from triton_analog.ops.hopper.output_stage import (
    fetch_coefficients,
    fetch_deviations,
    finish_slice,
    load_seed,
    range_of_row,
    store_rows,
)
from triton_analog.ops.hopper.pipeline import (
    DEPTH,
    ROWS,
    multiply_step,
    producer,
    tile_of,
    wait_for_product,
)
from triton_analog.ops.hopper.registers import numbers_of_threads, place_of_thread
from triton_analog.reference.noise import is_placed


class Tile(NamedTuple):
    """What a program works on at a time, and with what."""

    CONSUMERS: int
    """Warpgroups, each with 64 rows."""
    COLUMNS: int
    STAGES: int
    REGISTERS: int
    """Of a consumer's threads; a multiprocessor has 64 K."""
    PRODUCER_REGISTERS: int


def tile_for(slices: int, bound: bool) -> Tile:
    """A consumer's registers hold a product of 64 x 256 numbers, or one of 64 x 128 and the sum over slices beside it."""
    return Tile(3, 128, 5, 160, 32) if bound and slices > 1 else Tile(2, 256, 4, 240, 24)


def swizzled(matrix: Tensor, rows: int, columns: int = DEPTH.value) -> TensorDescriptor:
    """``matrix [M, K]`` in boxes of ``rows`` and ``columns``, as tensor cores read them from shared memory."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)


@gluon.jit
def consume_slice(
    sums, s, stage, phase, ring, buffers, range_ptr, coefficient_ptr, seed, mask_ptr, first_n, m, t, M, N, S, steps, columns,
    out_q_max,
    MODE: gl.constexpr, DAC: gl.constexpr, NOISE: gl.constexpr, ADC: gl.constexpr, MASK: gl.constexpr, CONSUMER: gl.constexpr,
    CONSUMERS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """``sums`` with slice ``s``, and where in the ring the next one begins."""
    ranges = (0.0, 0.0)
    if MODE == DYNAMIC_RANGE:
        ranges = (range_of_row(range_ptr, s, m, M), range_of_row(range_ptr, s, m + 8, M))
    acc = gl.zeros((ROWS, COLUMNS), gl.float32, LAYOUT)
    for step in range(steps):
        acc, stage, phase = multiply_step(acc, step > 0, step == 0, ring, stage, phase, CONSUMER, CONSUMERS, STAGES)
        if step == 0:  # the product runs meanwhile
            fetch_coefficients(buffers, coefficient_ptr, s, first_n, S, columns, NOISE, 3 * CONSUMER, COLUMNS)
    acc = wait_for_product(acc, ring, stage, STAGES)
    sums = finish_slice(
        numbers_of_threads(acc, COLUMNS), sums, ranges, buffers, seed, mask_ptr, s, first_n, m, t, M, N, out_q_max,
        MODE, DAC, NOISE, True, ADC, MASK, 3 * CONSUMER, COLUMNS,
    )  # fmt: skip
    return sums, stage, phase


@gluon.jit
def unit_of_slice(range_ptr, s, m, M, q_max, fallback, MODE: gl.constexpr):
    """The input converter's step in slice ``s``, for a dynamic range in rows ``m``. A slice without a range adds nothing,
    whatever its unit."""
    if MODE == DYNAMIC_RANGE:
        r = range_of_row(range_ptr, s, m, M)
    else:
        r = fallback * 0.0 + gl.abs(gl.load(range_ptr + s).to(gl.float32))
    return gl.where(r < TINY, fallback, r / q_max)


@gluon.jit
def consume_slices(
    stage, phase, ring, range_ptr, first_m, M, S, steps, in_q_max,
    MODE: gl.constexpr, DAC: gl.constexpr, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The sum over slices where nothing is done to a slice's product: one accumulator, brought from one slice's unit to the next
    one's; and where in the ring the next tile begins."""
    m = first_m + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    acc = gl.zeros((ROWS, COLUMNS), gl.float32, LAYOUT)
    unit = m.to(gl.float32) * 0.0 + 1.0
    if DAC:
        unit = unit_of_slice(range_ptr, 0, m, M, in_q_max, unit, MODE)
    for s in range(S):
        for step in range(steps):
            acc, stage, phase = multiply_step(
                acc, s + step > 0, step == 0, ring, stage, phase, CONSUMER, CONSUMERS, STAGES
            )
        acc = wait_for_product(acc, ring, stage, STAGES)
        if DAC:
            new = unit
            if s < S - 1:
                new = unit_of_slice(range_ptr, s + 1, m, M, in_q_max, unit, MODE)
                acc *= gl.expand_dims(unit / new, 1)
            unit = new
    if DAC:
        acc *= gl.expand_dims(unit, 1)
    return acc, stage, phase


@gluon.jit
def consumer(
    args, MODE: gl.constexpr, DAC: gl.constexpr, NOISE: gl.constexpr, PLACED: gl.constexpr, BOUND: gl.constexpr,
    ADC: gl.constexpr, MASK: gl.constexpr, BIAS: gl.constexpr, WIDE: gl.constexpr, ONE_SLICE: gl.constexpr,
    CONSUMERS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Products and output stages of 64 rows of every tile."""
    (
        ring, buffers, bias_ptr, range_ptr, coefficient_ptr, noise_wmax_ptr, seed_ptr, y_ptr, mask_ptr, M, N, S, steps, columns,
        noise_columns, in_q_max, sigma, out_q_max,
    ) = args  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )
    blocks_m = gl.cdiv(M, ROWS * CONSUMERS)
    blocks_n = gl.cdiv(N, COLUMNS)
    r, t = place_of_thread(LAYOUT, COLUMNS)
    seed = load_seed(seed_ptr, PLACED) if NOISE else 0
    nothing = t.to(gl.float32) * 0.0
    stage, phase = 0, 0
    for tile in range(gl.program_id(0), blocks_m * blocks_n, gl.num_programs(0)):
        block_m, block_n = tile_of(tile, blocks_m, blocks_n, GROUP_M)
        first_n = block_n * COLUMNS
        first_m = (block_m * CONSUMERS + CONSUMER) * ROWS
        m = first_m + r
        sums = ()
        for _ in gl.static_range(COLUMNS // 2):
            sums = sums + (nothing,)
        if not BOUND:
            acc, stage, phase = consume_slices(
                stage, phase, ring, range_ptr, first_m, M, S, steps, in_q_max, MODE, DAC, CONSUMER, CONSUMERS, COLUMNS, STAGES,
                LAYOUT,
            )  # fmt: skip
            sums = numbers_of_threads(acc, COLUMNS)
            if NOISE:
                fetch_deviations(
                    buffers, range_ptr, noise_wmax_ptr, first_n, N, S, noise_columns, sigma, 3 * CONSUMER, COLUMNS
                )
                sums = finish_slice(
                    sums, sums, (0.0, 0.0), buffers, seed, mask_ptr, 0, first_n, m, t, M, N, out_q_max, MODE, DAC, NOISE, BOUND,
                    ADC, MASK, 3 * CONSUMER, COLUMNS,
                )  # fmt: skip
        elif ONE_SLICE:  # no second accumulator then
            sums, stage, phase = consume_slice(
                sums, 0, stage, phase, ring, buffers, range_ptr, coefficient_ptr, seed, mask_ptr, first_n, m, t, M, N, S, steps,
                columns, out_q_max, MODE, DAC, NOISE, ADC, MASK, CONSUMER, CONSUMERS, COLUMNS, STAGES, LAYOUT,
            )  # fmt: skip
        else:
            for s in range(S):
                sums, stage, phase = consume_slice(
                    sums, s, stage, phase, ring, buffers, range_ptr, coefficient_ptr, seed, mask_ptr, first_n, m, t, M, N, S,
                    steps, columns, out_q_max, MODE, DAC, NOISE, ADC, MASK, CONSUMER, CONSUMERS, COLUMNS, STAGES, LAYOUT,
                )  # fmt: skip
        store_rows(sums, bias_ptr, y_ptr, first_n, m, t, M, N, BIAS, WIDE, COLUMNS)


@gluon.jit(do_not_specialize=["M", "S"])  # with S known to be 1 Triton 3.6 fails at dynamic ranges
def matmul_pipeline_kernel(
    x, w, bias_ptr, range_ptr, coefficient_ptr, noise_wmax_ptr, seed_ptr, y_ptr, mask_ptr, M, N, K, S, steps, columns,
    noise_columns, in_q_max, sigma, out_q_max,
    MODE: gl.constexpr, DAC: gl.constexpr, NOISE: gl.constexpr, PLACED: gl.constexpr, BOUND: gl.constexpr, ADC: gl.constexpr,
    MASK: gl.constexpr, BIAS: gl.constexpr, WIDE: gl.constexpr, ONE_SLICE: gl.constexpr, CONSUMERS: gl.constexpr,
    COLUMNS: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """``x``: prepared, each slice padded with zeros to ``steps`` blocks; ``w [N, K]``; both as descriptors."""
    a_buffers = gl.allocate_shared_memory(x.dtype, [STAGES * CONSUMERS, ROWS, DEPTH], x.layout)
    b_buffers = gl.allocate_shared_memory(w.dtype, [STAGES, COLUMNS, DEPTH], w.layout)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    buffers = gl.allocate_shared_memory(gl.float32, [3 * CONSUMERS, COLUMNS // 2, 2], FLAT)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    ring = (a_buffers, b_buffers, ready, empty)
    args = (
        ring, buffers, bias_ptr, range_ptr, coefficient_ptr, noise_wmax_ptr, seed_ptr, y_ptr, mask_ptr, M, N, S, steps, columns,
        noise_columns, in_q_max, sigma, out_q_max,
    )  # fmt: skip
    loads = (x, w, ring, M, N, K, S, steps)
    # Constants stay constants only if they are named here.
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consumer, (args, MODE, DAC, NOISE, PLACED, BOUND, ADC, MASK, BIAS, WIDE, ONE_SLICE, CONSUMERS, COLUMNS, STAGES,
                        GROUP_M, 0)),
            (consumer, (args, MODE, DAC, NOISE, PLACED, BOUND, ADC, MASK, BIAS, WIDE, ONE_SLICE, CONSUMERS, COLUMNS, STAGES,
                        GROUP_M, 1)),
            (producer, (loads, CONSUMERS, COLUMNS, STAGES, GROUP_M)),
        ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer, (args, MODE, DAC, NOISE, PLACED, BOUND, ADC, MASK, BIAS, WIDE, ONE_SLICE, CONSUMERS, COLUMNS, STAGES,
                        GROUP_M, 0)),
            (consumer, (args, MODE, DAC, NOISE, PLACED, BOUND, ADC, MASK, BIAS, WIDE, ONE_SLICE, CONSUMERS, COLUMNS, STAGES,
                        GROUP_M, 1)),
            (consumer, (args, MODE, DAC, NOISE, PLACED, BOUND, ADC, MASK, BIAS, WIDE, ONE_SLICE, CONSUMERS, COLUMNS, STAGES,
                        GROUP_M, 2)),
            (producer, (loads, CONSUMERS, COLUMNS, STAGES, GROUP_M)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


def launch_product(
    operand: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_range: Tensor,
    coefficients: Tensor | None,
    noise_wmax: Tensor | None,
    seed: Tensor | None,
    y: Tensor,
    mask: Tensor,
    slices: int,
    in_q_max: float,
    sigma: float,
    out_q_max: float,
    group_m: int,
    flags: dict[str, int | bool],
) -> None:
    """Fill ``y [M, N]`` and the saturation ``mask``, if it is not empty.

    ``operand``: the prepared input, each slice padded with zeros to whole steps. ``weight``: slices that begin at multiples of 16
    bytes. ``coefficients [3, S, columns]``: whole tiles of columns, for a bound. ``flags``: the kernel's.
    """
    (M, N), tile = y.shape, tile_for(slices, coefficients is not None)
    tiles = cdiv(M, ROWS.value * tile.CONSUMERS) * cdiv(N, tile.COLUMNS)
    launch(
        matmul_pipeline_kernel, (min(tiles, multiprocessors(y.device)),), y.device, swizzled(operand, ROWS.value),
        swizzled(weight, tile.COLUMNS), None if bias is None else bias.contiguous(), input_range, coefficients, noise_wmax, seed,
        y, mask, M, N, weight.shape[1], slices, operand.shape[1] // slices // DEPTH.value,
        0 if coefficients is None else coefficients.shape[2], 1 if noise_wmax is None else noise_wmax.shape[1], in_q_max, sigma,
        out_q_max, **flags, PLACED=flags["NOISE"] and is_placed(seed), MASK=mask.numel() > 0, BIAS=bias is not None,
        WIDE=N % 8 == 0, ONE_SLICE=slices == 1, **tile._asdict(), GROUP_M=group_m, num_warps=4,
    )  # fmt: skip
