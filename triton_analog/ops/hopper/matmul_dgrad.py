"""The product of ``ops/matmul_dgrad.py`` as a pipeline (SEMANTICS 6)."""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from triton_analog.lang import TINY
from triton_analog.launch import cdiv, launch, multiprocessors
from triton_analog.ops.hopper.gradient import gradient_producer, multiply_gradient, packed_flags
from triton_analog.ops.hopper.matmul import swizzled
from triton_analog.ops.hopper.output_stage import MAGIC, clamp
from triton_analog.ops.hopper.pipeline import DEPTH, ROWS, slice_start, tile_of, wait_for_product
from triton_analog.ops.hopper.registers import (
    load_chunk,
    numbers_of_threads,
    pack,
    place_of_thread,
    store_transposed,
    sum_of_threads,
    transposed,
    unpack,
)

CONSUMERS, COLUMNS, STAGES = 2, 256, 4
REGISTERS, PRODUCER_REGISTERS = 240, 24


@gluon.jit
def load_chunks(x_ptr, stride_m, m, k, M, inside):
    """What both rows of a thread have of the input in its 8 columns from ``k`` on."""
    row = x_ptr + m.to(gl.int64) * stride_m + k
    return load_chunk(row, inside & (m < M)), load_chunk(row + 8 * stride_m, inside & (m + 8 < M))


@gluon.jit
def clip_numbers(dx, x, r, sums, FAST: gl.constexpr):
    """``dx`` where the input ``x`` was not clipped, and the ``sums`` of ``input_range.range_grad_sums`` with them."""
    widen, unclipped = sums
    if FAST:
        widen += gl.where(x >= r, dx, 0.0) - gl.where(x <= -r, dx, 0.0)
    else:
        widen += gl.where(x >= r, gl.minimum(dx, 0.0), 0.0) - gl.where(x <= -r, gl.maximum(dx, 0.0), 0.0)
    unclipped += gl.where(gl.abs(x) < r, 1.0, 0.0)
    return gl.where(gl.abs(x) <= r, dx, 0.0), (widen, unclipped)


@gluon.jit
def finish_columns(
    dx, chunks, t, r, steps_per_unit, q_max, sums, DTYPE: gl.constexpr, CLIP: gl.constexpr, FAST: gl.constexpr,
    STEPS: gl.constexpr,
):  # fmt: skip
    """Words of two numbers of 32 columns, for a thread's two rows: of ``dx`` and of the converter's integers. ``chunks``: those
    of :func:`load_chunks`."""
    dx_words = ()
    step_words = ()
    for h in gl.static_range(2):
        if CLIP:
            words = transposed(chunks[h], t)
        for j in gl.static_range(4):
            low, high = dx[4 * j + 2 * h], dx[4 * j + 2 * h + 1]
            if CLIP:
                x_low, x_high = unpack(words[j], DTYPE)
                low, sums = clip_numbers(low, x_low, r, sums, FAST)
                high, sums = clip_numbers(high, x_high, r, sums, FAST)
                if STEPS:
                    steps_low = (clamp(x_low * steps_per_unit, q_max) + MAGIC) - MAGIC
                    steps_high = (clamp(x_high * steps_per_unit, q_max) + MAGIC) - MAGIC
                    step_words = step_words + (pack(steps_low, steps_high, DTYPE),)
            dx_words = dx_words + (pack(low, high, DTYPE),)
    return dx_words, step_words, sums


@gluon.jit
def finish_tile(
    products, x_ptr, range_ptr, dx_ptr, steps_ptr, parts_ptr, part, s, start, column, width, m, t, M, N, K, stride_xm, q_max,
    CLIP: gl.constexpr, FAST: gl.constexpr, STEPS: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Store the columns of a slice from ``column`` on, and at ``part`` their share of the range's gradient."""
    DTYPE: gl.constexpr = dx_ptr.dtype.element_ty
    nothing = t.to(gl.float32) * 0.0
    sums = (nothing, nothing)
    r, steps_per_unit = nothing, nothing
    if CLIP:
        r = nothing + gl.abs(gl.load(range_ptr + s).to(gl.float32))
        is_zero = r < TINY
        steps_per_unit = gl.where(is_zero, 0.0, gl.div_rn(nothing + q_max, gl.where(is_zero, 1.0, r)))
        chunks = load_chunks(x_ptr, stride_xm, m, start + column + 8 * t, M, column + 8 * t < width)
    for g in gl.static_range(COLUMNS // 32):
        if N > g - COLUMNS:  # always; without, the compiler works on all columns at once and runs out of registers
            first = column + 32 * g + 8 * t
            current = ()
            if CLIP:
                current = chunks
                if g + 1 < COLUMNS // 32:
                    chunks = load_chunks(x_ptr, stride_xm, m, start + first + 32, M, first + 32 < width)
            dx_words, step_words, sums = finish_columns(
                products[16 * g : 16 * g + 16], current, t, r, steps_per_unit, q_max, sums, DTYPE, CLIP, FAST, STEPS
            )
            at = m.to(gl.int64) * K + start + first
            for h in gl.static_range(2):
                inside = (m + 8 * h < M) & (first < width)
                store_transposed(dx_words[4 * h : 4 * h + 4], t, dx_ptr + at + 8 * h * K, inside)
                if STEPS:
                    store_transposed(step_words[4 * h : 4 * h + 4], t, steps_ptr + at + 8 * h * K, inside)
    if CLIP:
        gl.store(parts_ptr + part * 2, sum_of_threads(sums[0]))
        gl.store(parts_ptr + part * 2 + 1, sum_of_threads(sums[1]))


@gluon.jit
def dgrad_consumer(
    args, MASK: gl.constexpr, CLIP: gl.constexpr, FAST: gl.constexpr, STEPS: gl.constexpr, CONSUMERS: gl.constexpr,
    COLUMNS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Products and output stages of 64 rows of every tile."""
    (
        ring, flag_buffers, x_ptr, range_ptr, dx_ptr, steps_ptr, parts_ptr, M, N, K, S, blocks_m, blocks_k, steps, stride_xm,
        q_max,
    ) = args  # fmt: skip
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )
    r, t = place_of_thread(LAYOUT, COLUMNS)
    stage, phase = 0, 0
    for tile in range(gl.program_id(0), blocks_m * S * blocks_k, gl.num_programs(0)):
        block_m, block = tile_of(tile, blocks_m, S * blocks_k, GROUP)
        s = block // blocks_k
        block_k = block - s * blocks_k
        first_m = (block_m * CONSUMERS + CONSUMER) * ROWS
        acc, stage, phase = multiply_gradient(
            ring, flag_buffers, stage, phase, 0, steps, MASK, True, CONSUMER, CONSUMERS, COLUMNS, STAGES, LAYOUT
        )
        acc = wait_for_product(acc, ring, stage, STAGES)
        part = (s * blocks_m * CONSUMERS + block_m * CONSUMERS + CONSUMER) * blocks_k + block_k
        width = K // S + gl.where(s < K % S, 1, 0)
        finish_tile(
            numbers_of_threads(acc, COLUMNS), x_ptr, range_ptr, dx_ptr, steps_ptr, parts_ptr, part, s, slice_start(s, K, S),
            block_k * COLUMNS, width, first_m + r, t, M, N, K, stride_xm, q_max, CLIP, FAST, STEPS, COLUMNS,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "blocks_m"])
def matmul_dgrad_pipeline_kernel(
    g, w, mask, x_ptr, range_ptr, dx_ptr, steps_ptr, parts_ptr, M, N, K, S, blocks_m, blocks_k, steps, stride_xm, q_max,
    MASK: gl.constexpr, CLIP: gl.constexpr, FAST: gl.constexpr, STEPS: gl.constexpr, CONSUMERS: gl.constexpr,
    COLUMNS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """``g [M, N]`` and ``w [N, K]`` as descriptors; ``steps`` blocks of ``N``, ``blocks_m`` tiles of rows, ``blocks_k`` of each
    slice's columns."""
    a_buffers = gl.allocate_shared_memory(g.dtype, [STAGES * CONSUMERS, ROWS, DEPTH], g.layout)
    b_buffers = gl.allocate_shared_memory(w.dtype, [STAGES, DEPTH, COLUMNS], w.layout)
    flag_buffers = gl.allocate_shared_memory(gl.int32, [STAGES * CONSUMERS, ROWS, 4], mask.layout) if MASK else 0
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    ring = (a_buffers, b_buffers, ready, empty)
    args = (
        ring, flag_buffers, x_ptr, range_ptr, dx_ptr, steps_ptr, parts_ptr, M, N, K, S, blocks_m, blocks_k, steps, stride_xm,
        q_max,
    )  # fmt: skip
    loads = (g, w, mask, ring, flag_buffers, M, N, K, S, blocks_m, blocks_k, steps, steps)
    gl.warp_specialize([
        (dgrad_consumer, (args, MASK, CLIP, FAST, STEPS, CONSUMERS, COLUMNS, STAGES, GROUP, 0)),
        (dgrad_consumer, (args, MASK, CLIP, FAST, STEPS, CONSUMERS, COLUMNS, STAGES, GROUP, 1)),
        (gradient_producer, (loads, MASK, True, CONSUMERS, COLUMNS, STAGES, GROUP)),
    ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


def launch_dgrad(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    input_range: Tensor | None,
    mask: Tensor | None,
    dx: Tensor,
    steps: Tensor,
    parts: Tensor,
    slices: int,
    q_max: float,
    fast_mode: bool,
    group_m: int,
) -> None:
    """Fill ``dx [M, K]``, the input's ``steps`` if it has rows, and the ``parts [S, :func:`dgrad_parts`, 2]``.

    ``grad``, ``weight``, ``x``: rows that TMA can address, whose slices begin at multiples of 16 bytes.
    """
    (M, K), N = x.shape, weight.shape[0]
    blocks_m, blocks_k = cdiv(M, ROWS.value * CONSUMERS), cdiv(cdiv(K, slices), COLUMNS)
    programs = min(blocks_m * slices * blocks_k, multiprocessors(x.device))
    launch(
        matmul_dgrad_pipeline_kernel, (programs,), x.device, swizzled(grad, ROWS.value), swizzled(weight, DEPTH.value, COLUMNS),
        packed_flags(mask), x, input_range, dx, steps, parts, M, N, K, slices, blocks_m, blocks_k, cdiv(N, DEPTH.value),
        x.stride(0), q_max,
        MASK=mask is not None, CLIP=input_range is not None, FAST=fast_mode, STEPS=steps.numel() > 0, CONSUMERS=CONSUMERS,
        COLUMNS=COLUMNS, STAGES=STAGES, GROUP=group_m, REGISTERS=REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=4,
    )  # fmt: skip


def dgrad_parts(rows: int, width: int) -> int:
    """How many shares of a slice's range gradient there are."""
    return cdiv(rows, ROWS.value * CONSUMERS) * CONSUMERS * cdiv(width, COLUMNS)
