"""What feeds the tensor cores: a ring of stages in shared memory, a warp that fills it and warpgroups that use it up.

The kernel is persistent, one program to a multiprocessor, and the ring goes on from slice to slice and from tile to tile: while
consumers finish a slice, the loads of the next ones arrive. A stage holds 64 columns of both operands, of the left one 64 rows
for each consumer. ``ready[stage]`` completes when its bytes are there, ``empty[stage]`` when all consumers have read it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name since Triton 3.8, and before

ROWS = gl.constexpr(64)
"""Of a consumer's part of a tile."""
DEPTH = gl.constexpr(64)
"""Columns of a stage: 128 bytes, the widest row that can be swizzled."""


@gluon.jit
def tile_of(tile, blocks_m, blocks_n, GROUP_M: gl.constexpr):
    """Row and column of a tile among blocks; neighbours share rows and columns in the L2 cache."""
    per_group = GROUP_M * blocks_n
    group = tile // per_group
    rows = gl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    inside = tile - group * per_group
    return group * GROUP_M + inside % rows, inside // rows


@gluon.jit
def slice_start(s, K, S):
    """First column of slice ``s`` when ``K`` columns are cut into ``S``."""
    return s * (K // S) + gl.minimum(s, K % S)


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The stage after ``stage``; the ``phase`` of a barrier changes in each round."""
    is_last = stage == STAGES - 1
    return gl.where(is_last, 0, stage + 1), gl.where(is_last, phase ^ 1, phase)


@gluon.jit
def producer(loads, CONSUMERS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr):
    """Loads all tiles' blocks. In ``a`` every slice has ``steps`` whole blocks, in ``b`` as many columns as it has: what is
    loaded beyond them meets zeros in ``a``."""
    a, b, ring, M, N, K, S, steps = loads
    a_buffers, b_buffers, ready, empty = ring
    blocks_m = gl.cdiv(M, ROWS * CONSUMERS)
    blocks_n = gl.cdiv(N, COLUMNS)
    stage, phase = 0, 1
    for tile in range(gl.program_id(0), blocks_m * blocks_n, gl.num_programs(0)):
        block_m, block_n = tile_of(tile, blocks_m, blocks_n, GROUP_M)
        for s in range(S):
            start = slice_start(s, K, S)
            for step in range(steps):
                bar = ready.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(bar, (ROWS * CONSUMERS + COLUMNS) * DEPTH * 2)
                for i in gl.static_range(CONSUMERS):
                    row = (block_m * CONSUMERS + i) * ROWS
                    load(a, [row, (s * steps + step) * DEPTH], bar, a_buffers.index(stage * CONSUMERS + i))
                load(b, [block_n * COLUMNS, start + step * DEPTH], bar, b_buffers.index(stage))
                stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def multiply_step(
    acc, is_first, ring, stage, phase, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr
):
    """Start the product of a stage, and give back the stage before once its product is done."""
    a_buffers, b_buffers, ready, empty = ring
    mbarrier.wait(ready.index(stage), phase)
    a, b = a_buffers.index(stage * CONSUMERS + CONSUMER), b_buffers.index(stage).permute((1, 0))
    acc = warpgroup_mma(a, b, acc, use_acc=is_first == 0, is_async=True)
    acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
    mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), pred=is_first == 0)
    stage, phase = next_stage(stage, phase, STAGES)
    return acc, stage, phase


@gluon.jit
def wait_for_product(acc, ring, stage, STAGES: gl.constexpr):
    """Wait for all products, and give back the last stage."""
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(ring[3].index(gl.where(stage == 0, STAGES - 1, stage - 1)))
    return acc
