"""The product of ``ops/matmul_wgrad.py`` as a pipeline (SEMANTICS 6)."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from triton_analog.launch import cdiv, launch, multiprocessors
from triton_analog.ops._parts import launch_add_parts
from triton_analog.ops.hopper.gradient import gradient_producer, multiply_gradient, packed_flags
from triton_analog.ops.hopper.matmul import swizzled
from triton_analog.ops.hopper.pipeline import DEPTH, ROWS, slice_start, tile_of, wait_for_product
from triton_analog.ops.hopper.registers import numbers_of_threads, pack, place_of_thread, store_transposed

CONSUMERS, COLUMNS, STAGES = 2, 256, 4
REGISTERS, PRODUCER_REGISTERS = 240, 24
FEWEST_STEPS = 8
"""Of a tile that is shared: the parts' way through memory costs as much."""
STORE_PAIR = gl.constexpr("{ .reg .pred p; setp.ne.b32 p, $4, 0; @p st.global.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0; }")


@gluon.jit
def store_pair(address, low, high, inside):
    """Two neighbouring fp32 numbers, 8 bytes."""
    words = low.to(gl.int32, bitcast=True), high.to(gl.int32, bitcast=True)
    gl.inline_asm_elementwise(
        STORE_PAIR,
        "=r,l,r,r,r",
        [address, words[0], words[1], inside.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def store_tile(products, dw_ptr, scale, start, column, width, n, t, N, K, COLUMNS: gl.constexpr):
    """Rows ``n`` and ``n + 8`` of a slice's columns from ``column`` on, times ``scale``."""
    DTYPE: gl.constexpr = dw_ptr.dtype.element_ty
    for g in gl.static_range(COLUMNS // 32):
        for h in gl.static_range(2):
            row = dw_ptr + (n + 8 * h).to(gl.int64) * K + start
            words = ()
            for j in gl.static_range(4):
                low, high = products[16 * g + 4 * j + 2 * h] * scale, products[16 * g + 4 * j + 2 * h + 1] * scale
                if DTYPE == gl.float32:
                    k = column + 32 * g + 8 * j + 2 * t
                    store_pair(row + k, low, high, (n + 8 * h < N) & (k < width))
                else:
                    words = words + (pack(low, high, DTYPE),)
            if DTYPE != gl.float32:
                k = column + 32 * g + 8 * t
                store_transposed(words, t, row + k, (n + 8 * h < N) & (k < width))


@gluon.jit
def wgrad_consumer(
    args, MASK: gl.constexpr, SCALE: gl.constexpr, CONSUMERS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """64 rows of every tile of the weight's gradient."""
    ring, flag_buffers, range_ptr, dw_ptr, N, K, S, blocks_n, blocks_k, steps, part, q_max = args
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )
    r, t = place_of_thread(LAYOUT, COLUMNS)
    stage, phase = 0, 0
    tiles = blocks_n * S * blocks_k
    for tile in range(gl.program_id(0), tiles * gl.cdiv(steps, part), gl.num_programs(0)):
        split = tile // tiles
        block_n, block = tile_of(tile - split * tiles, blocks_n, S * blocks_k, GROUP)
        s = block // blocks_k
        first_n = (block_n * CONSUMERS + CONSUMER) * ROWS
        acc, stage, phase = multiply_gradient(
            ring,
            flag_buffers,
            stage,
            phase,
            first_n,
            gl.minimum(part, steps - split * part),
            MASK,
            False,
            CONSUMER,
            CONSUMERS,
            COLUMNS,
            STAGES,
            LAYOUT,
        )
        acc = wait_for_product(acc, ring, stage, STAGES)
        scale = t.to(gl.float32) * 0.0 + 1.0
        if SCALE:
            scale = gl.div_rn(scale * gl.abs(gl.load(range_ptr + s).to(gl.float32)), scale * q_max)
        width = K // S + gl.where(s < K % S, 1, 0)
        store_tile(
            numbers_of_threads(acc, COLUMNS), dw_ptr + split.to(gl.int64) * N * K, scale, slice_start(s, K, S),
            (block - s * blocks_k) * COLUMNS, width, first_n + r, t, N, K, COLUMNS,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "steps", "part"])
def matmul_wgrad_pipeline_kernel(
    g, x, mask, range_ptr, dw_ptr, M, N, K, S, blocks_n, blocks_k, steps, part, q_max,
    MASK: gl.constexpr, SCALE: gl.constexpr, CONSUMERS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """``g [M, N]`` and ``x [M, K]`` as descriptors; ``steps`` blocks of ``M``, of which a program takes ``part`` and leaves
    their sum at a ``dw [N, K]`` of their own; ``blocks_n`` tiles of ``N``, ``blocks_k`` of each slice's columns."""
    a_buffers = gl.allocate_shared_memory(g.dtype, [STAGES * CONSUMERS, DEPTH, ROWS], g.layout)
    b_buffers = gl.allocate_shared_memory(x.dtype, [STAGES, DEPTH, COLUMNS], x.layout)
    flag_buffers = gl.allocate_shared_memory(gl.int32, [STAGES * CONSUMERS, DEPTH, 4], mask.layout) if MASK else 0
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    ring = (a_buffers, b_buffers, ready, empty)
    args = (ring, flag_buffers, range_ptr, dw_ptr, N, K, S, blocks_n, blocks_k, steps, part, q_max)
    loads = (g, x, mask, ring, flag_buffers, M, N, K, S, blocks_n, blocks_k, steps, part)
    gl.warp_specialize([
        (wgrad_consumer, (args, MASK, SCALE, CONSUMERS, COLUMNS, STAGES, GROUP, 0)),
        (wgrad_consumer, (args, MASK, SCALE, CONSUMERS, COLUMNS, STAGES, GROUP, 1)),
        (gradient_producer, (loads, MASK, False, CONSUMERS, COLUMNS, STAGES, GROUP)),
    ], [4, 1], [REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


def launch_wgrad(
    grad: Tensor,
    x: Tensor,
    input_range: Tensor | None,
    mask: Tensor | None,
    dw: Tensor,
    slices: int,
    q_max: float,
    group_n: int,
) -> None:
    """Fill ``dw [N, K]``. ``input_range``: its step scales the result. Where there are fewer tiles than multiprocessors, several
    share a tile's rows.

    ``grad``, ``x``: rows that TMA can address, whose slices begin at multiples of 16 bytes.
    """
    (M, K), N = x.shape, grad.shape[1]
    blocks_n, blocks_k = cdiv(N, ROWS.value * CONSUMERS), cdiv(cdiv(K, slices), COLUMNS)
    tiles, steps, processors = blocks_n * slices * blocks_k, cdiv(M, DEPTH.value), multiprocessors(x.device)
    part = cdiv(steps, max(1, min(processors // tiles, steps // FEWEST_STEPS)))
    splits = cdiv(steps, part)
    parts = dw if splits == 1 else torch.empty(splits, N, K, dtype=torch.float32, device=x.device)
    launch(
        matmul_wgrad_pipeline_kernel, (min(tiles * splits, processors),), x.device, swizzled(grad, DEPTH.value, ROWS.value),
        swizzled(x, DEPTH.value, COLUMNS), packed_flags(mask), input_range, parts, M, N, K, slices, blocks_n, blocks_k, steps,
        part, q_max, MASK=mask is not None, SCALE=input_range is not None, CONSUMERS=CONSUMERS, COLUMNS=COLUMNS, STAGES=STAGES,
        GROUP=group_n, REGISTERS=REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        launch_add_parts(parts, dw)
