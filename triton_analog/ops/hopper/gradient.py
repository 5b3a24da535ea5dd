"""What both gradients' pipelines share: their operands, and the saturation mask applied on the way (SEMANTICS 6).

Both multiply the gradient ``g [M, N]`` with a second operand of ``K`` columns: the weight, or what the tiles saw of the input.
A stage holds for each consumer 64 x 64 numbers of ``g`` and 64 rows of the other. A consumer clears what its slice's converter
saturated in its part of ``g`` while its previous product runs, so that no masked gradient is ever written to memory.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from triton_analog.ops.hopper.pipeline import DEPTH, ROWS, load, next_stage, slice_start, tile_of

reinterpret = (
    getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
)  # its name since Triton 3.9, and before

FLAG_BYTES = gl.constexpr(64 * 4 * 4)

# PTX: of two neighbouring numbers of 16 bits, those whose flags in the two lowest bits are 0. A byte's sign is spread over 16.
CLEAR_FLAGGED = gl.constexpr("""{ .reg .b32 low, high; shl.b32 low, $2, 7; shl.b32 high, $2, 6; prmt.b32 low, low, high, 0xCC88;
    lop3.b32 $0, $1, low, low, 0x30; }""")


@gluon.jit
def gradient_producer(
    loads, MASK: gl.constexpr, ROWS_FIRST: gl.constexpr, CONSUMERS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Loads all tiles' blocks: ``g`` by rows of the tile and steps along its columns if ``ROWS_FIRST``, else the other way
    round, and steps of ``b`` at a slice's columns. Tiles are ``blocks_a`` x (slices x ``blocks_k``), a program's ``part`` of one
    so many steps."""
    g, b, mask, ring, flag_buffers, M, N, K, S, blocks_a, blocks_k, steps, part = loads
    a_buffers, b_buffers, ready, empty = ring
    stage, phase = 0, 1
    BYTES: gl.constexpr = (ROWS * CONSUMERS + COLUMNS) * DEPTH * 2 + (CONSUMERS * FLAG_BYTES if MASK else 0)
    tiles = blocks_a * S * blocks_k
    for tile in range(gl.program_id(0), tiles * gl.cdiv(steps, part), gl.num_programs(0)):
        block_a, block = tile_of(tile % tiles, blocks_a, S * blocks_k, GROUP)
        s = block // blocks_k
        k = slice_start(s, K, S) + block % blocks_k * COLUMNS
        first = tile // tiles * part
        for step in range(first, gl.minimum(first + part, steps)):
            bar = ready.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, BYTES)
            for i in gl.static_range(CONSUMERS):
                a = (block_a * CONSUMERS + i) * ROWS
                buffer = a_buffers.index(stage * CONSUMERS + i)
                m, n = (a, step * DEPTH) if ROWS_FIRST else (step * DEPTH, a)
                load(g, [m, n], bar, buffer)
                if MASK:  # rows beyond the matrix have the flags of others, but nothing to clear
                    row = (s * gl.cdiv(N, 128) + n // 128) * M + m
                    load(mask, [row, 0], bar, flag_buffers.index(stage * CONSUMERS + i))
            load(b, [step * DEPTH, k], bar, b_buffers.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def clear_saturated(box, words, is_right):
    """``box``: 64 x 64 numbers of 16 bits in shared memory, zero from now on where ``words [64, 4]`` of the mask, there too, have
    a bit: those of the left 64 of 128 columns, or of the others if it ``is_right``."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4, 4], [16, 2, 1], [4, 1, 1], [2, 1, 0])
    flags = words.load(gl.SliceLayout(1, LAYOUT)) >> (16 * is_right)
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
    ring, flag_buffers, stage, phase, first_n, steps,
    MASK: gl.constexpr, ROWS_FIRST: gl.constexpr, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, ACCUMULATOR: gl.constexpr,
):  # fmt: skip
    """The product of a consumer's part of a tile, and where in the ring the next one begins. ``first_n``: the first column of
    ``g``, along whose columns the steps go if ``ROWS_FIRST``, else along its rows."""
    a_buffers, b_buffers, ready, empty = ring
    acc = gl.zeros((ROWS, COLUMNS), gl.float32, ACCUMULATOR)
    for step in range(steps):
        i = stage * CONSUMERS + CONSUMER
        box = a_buffers.index(i)
        mbarrier.wait(ready.index(stage), phase)
        if MASK:
            clear_saturated(box, flag_buffers.index(i), (step if ROWS_FIRST else first_n // DEPTH) % 2)
        if ROWS_FIRST:
            acc = warpgroup_mma(box, b_buffers.index(stage), acc, use_acc=step > 0, is_async=True)
        else:
            acc = warpgroup_mma(box.permute((1, 0)), b_buffers.index(stage), acc, use_acc=step > 0, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), pred=step > 0)
        stage, phase = next_stage(stage, phase, STAGES)
    return acc, stage, phase


def packed_flags(mask: Tensor | None) -> TensorDescriptor | None:
    """``mask [S, ceil(N / 128), M, 4]`` in boxes of 64 rows."""
    if mask is None:
        return None
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor.from_tensor(mask.view(-1, 4), [ROWS.value, 4], layout)
