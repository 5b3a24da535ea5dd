"""What both gradients' pipelines share: their operands, and the saturation mask applied on the way (SEMANTICS 6).

Both multiply the gradient ``g [M, N]`` with a second operand of ``K`` columns: the weight, or what the tiles saw of the input.
A stage holds for each consumer 64 x 64 numbers of ``g`` and 64 rows of the other. A consumer clears what its slice's converter
saturated in its part of ``g`` while its previous product runs, so that no masked gradient is ever written to memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton_analog.ops.hopper.pipeline import DEPTH, ROWS, load, next_stage, slice_start, tile_of

reinterpret = (
    getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
)  # its name since Triton 3.9, and before

# PTX: of two neighbouring numbers of 16 bits, those whose flags in the two lowest bits are 0. A byte's sign is spread over 16.
CLEAR_FLAGGED = gl.constexpr("""{ .reg .b32 low, high; shl.b32 low, $2, 7; shl.b32 high, $2, 6; prmt.b32 low, low, high, 0xCC88;
    lop3.b32 $0, $1, low, low, 0x30; }""")


@gluon.jit
def gradient_producer(
    loads,
    ROWS_FIRST: gl.constexpr,
    CONSUMERS: gl.constexpr,
    COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Loads all tiles' blocks: ``g`` by rows of the tile and steps along its columns if ``ROWS_FIRST``, else the other way
    round, and steps of ``b`` at a slice's columns. A tile is ``blocks_a`` x (slices x ``blocks_k``)."""
    g, b, ring, K, S, blocks_a, blocks_k, steps = loads
    a_buffers, b_buffers, ready, empty = ring
    stage, phase = 0, 1
    for tile in range(gl.program_id(0), blocks_a * S * blocks_k, gl.num_programs(0)):
        block_a, block = tile_of(tile, blocks_a, S * blocks_k, GROUP)
        k = slice_start(block // blocks_k, K, S) + block % blocks_k * COLUMNS
        for step in range(steps):
            bar = ready.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, (ROWS * CONSUMERS + COLUMNS) * DEPTH * 2)
            for i in gl.static_range(CONSUMERS):
                a = (block_a * CONSUMERS + i) * ROWS
                buffer = a_buffers.index(stage * CONSUMERS + i)
                if ROWS_FIRST:
                    load(g, [a, step * DEPTH], bar, buffer)
                else:
                    load(g, [step * DEPTH, a], bar, buffer)
            load(b, [step * DEPTH, k], bar, b_buffers.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def load_flags(mask_ptr, s, m, n, M, N):
    """The mask's words for the rows ``m`` of 64 and the 64 columns from ``n`` on, those in their low halves."""
    t = gl.arange(0, 4, layout=gl.SliceLayout(0, m.type.layout.parent))
    inside = m < gl.where(n < N, M, 0)
    row = (s * gl.cdiv(N, 128) + n // 128).to(gl.int64) * M + m
    words = gl.load(
        mask_ptr + gl.expand_dims(row * 4, 1) + gl.expand_dims(t, 0), mask=gl.expand_dims(inside, 1), other=0
    )
    return words >> (n % 128 // 64 * 16)


@gluon.jit
def clear_saturated(box, flags, LAYOUT: gl.constexpr):
    """``box``: 64 x 64 numbers of 16 bits in shared memory, zero from now on where ``flags [64, 4]`` have a bit."""
    PAIRS: gl.constexpr = gl.BlockedLayout([1, 16], [16, 2], [4, 1], [1, 0])
    WORDS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    pairs = reinterpret(box, gl.int32, [64, 32], WORDS)
    numbers = gl.convert_layout(pairs.load(PAIRS).reshape([64, 8, 4]), LAYOUT, assert_trivial=True)
    u = gl.arange(
        0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT))
    )  # column 8 * u + 2 * t + l is bit 2 * u + l of word t
    two = gl.expand_dims(flags, 1) >> (2 * gl.expand_dims(gl.expand_dims(u, 0), 2))
    kept = gl.inline_asm_elementwise(CLEAR_FLAGGED, "=r,r,r", [numbers, two], dtype=gl.int32, is_pure=True, pack=1)
    pairs.store(gl.convert_layout(kept.reshape([64, 32]), PAIRS, assert_trivial=True))
    fence_async_shared()


@gluon.jit
def multiply_gradient(
    ring, stage, phase, mask_ptr, s, first_m, first_n, steps, M, N,
    MASK: gl.constexpr, ROWS_FIRST: gl.constexpr, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, ACCUMULATOR: gl.constexpr,
):  # fmt: skip
    """The product of a consumer's part of a tile, and where in the ring the next one begins. ``first_m`` and ``first_n``: where
    in ``g`` its first box lies; the others follow along the columns if ``ROWS_FIRST``, else along the rows."""
    a_buffers, b_buffers, ready, empty = ring
    FLAGS: gl.constexpr = gl.BlockedLayout([1, 4, 4], [16, 2, 1], [4, 1, 1], [2, 1, 0])
    m = first_m + gl.arange(0, 64, layout=gl.SliceLayout(1, gl.SliceLayout(1, FLAGS)))
    STEP_M: gl.constexpr = 0 if ROWS_FIRST else DEPTH
    STEP_N: gl.constexpr = DEPTH if ROWS_FIRST else 0
    acc = gl.zeros((ROWS, COLUMNS), gl.float32, ACCUMULATOR)
    if MASK:
        flags = load_flags(mask_ptr, s, m, first_n, M, N)
    for step in range(steps):
        box = a_buffers.index(stage * CONSUMERS + CONSUMER)
        mbarrier.wait(ready.index(stage), phase)
        if MASK:
            clear_saturated(box, flags, FLAGS)
        if ROWS_FIRST:
            acc = warpgroup_mma(box, b_buffers.index(stage), acc, use_acc=step > 0, is_async=True)
        else:
            acc = warpgroup_mma(box.permute((1, 0)), b_buffers.index(stage), acc, use_acc=step > 0, is_async=True)
        if MASK:  # not before the product, whose fence would wait for it
            flags = load_flags(mask_ptr, s, m + (step + 1) * STEP_M, first_n + (step + 1) * STEP_N, M, N)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), pred=step > 0)
        stage, phase = next_stage(stage, phase, STAGES)
    return acc, stage, phase
