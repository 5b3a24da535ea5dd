"""Tiles of matrices: their order, how they are loaded, and the saturation mask of a product's tiles."""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_analog.lang import is_nvidia

# PTX for NVIDIA GPUs, with a plain path beside its use.
STORE_32_BITS = tl.constexpr("{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0; }")
STORE_16_BITS = tl.constexpr(
    "{ .reg .pred p; .reg .b16 h; setp.ne.s32 p, $3, 0; cvt.u16.u32 h, $2; @p st.global.b16 [$1], h; mov.b32 $0, 0; }"
)


def descriptor(matrix: Tensor, rows: int, columns: int, wanted: bool) -> Tensor | TensorDescriptor:
    """``matrix`` for :func:`load_tile` (or several, for :func:`load_plane`) in tiles of ``rows`` x ``columns``."""
    return TensorDescriptor.from_tensor(matrix, [1] * (matrix.ndim - 2) + [rows, columns]) if wanted else matrix


@triton.jit
def grouped(program, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """Row and column of a program among blocks; neighbouring programs share rows and columns in the L2 cache."""
    group = program // (GROUP_M * blocks_n)
    rows = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + program % rows, program % (GROUP_M * blocks_n) // rows


@triton.jit
def load_tile(
    source, row, column, stride_row, stride_column, row_end, column_end,
    DESCRIPTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``source[row : row + ROWS, column : column + COLUMNS]``, 0 beyond the ends (of a descriptor: beyond the matrix)."""
    if DESCRIPTOR:
        return source.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS).to(tl.int64)[:, None]
        columns = column + tl.arange(0, COLUMNS).to(tl.int64)[None, :]
        inside = (rows < row_end) & (columns < column_end)
        return tl.load(source + rows * stride_row + columns * stride_column, mask=inside, other=0)


@triton.jit
def load_plane(
    source, plane, row, column, stride_plane, stride_row, stride_column, row_end, column_end,
    DESCRIPTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """:func:`load_tile` of ``source[plane]``."""
    if DESCRIPTOR:
        return source.load([plane, row, column]).reshape(ROWS, COLUMNS)
    else:
        source += plane.to(tl.int64) * stride_plane
        return load_tile(source, row, column, stride_row, stride_column, row_end, column_end, False, ROWS, COLUMNS)


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of the columns."""
    return tl.split(tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1))


@triton.jit
def column_parts(tile, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns in 1, 2 or 4 parts from left to right.

    What follows a product needs many registers for each element. Done for one part after the other, each under a condition
    that always holds but that the compiler cannot know, only one part's numbers are alive at a time.
    """
    if PARTS == 1:
        return tl.tuple((tile,))
    elif PARTS == 2:
        return halves(tile, ROWS, COLUMNS)
    else:
        left, right = halves(tile, ROWS, COLUMNS)
        return halves(left, ROWS, COLUMNS // 2) + halves(right, ROWS, COLUMNS // 2)


@triton.jit
def store_bits(mask_ptr, words, s, first_m, first_n, M, N, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Store what :func:`pack_bits` gave for the tile at ``(first_m, first_n)`` into ``mask [S, ceil(N / 128), M, 4]``.

    Tiles have to cover the last 128 columns to their end.
    """
    m = first_m + tl.arange(0, ROWS)[:, None]
    PARTS: tl.constexpr = 128 // COLS  # tiles that share a word
    TYPE: tl.constexpr = tl.int32 if PARTS == 1 else (tl.int16 if PARTS == 2 else tl.int8)
    row = (s * tl.cdiv(N, 128) + first_n // 128).to(tl.int64) * M + m
    part = (first_n % 128 // COLS).to(tl.int32)
    address = mask_ptr.to(tl.pointer_type(TYPE)) + (row * 4 + tl.arange(0, 4)[None, :]) * PARTS + part
    inside = m < tl.where(first_n < tl.cdiv(N, 128) * 128, M, 0)
    if (
        PARTS <= 2 and is_nvidia()
    ):  # tl.store would send the words through shared memory first, with a barrier in the loop
        ASM: tl.constexpr = STORE_32_BITS if PARTS == 1 else STORE_16_BITS
        tl.inline_asm_elementwise(
            ASM, "=r,l,r,r", [address, words, inside.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        tl.store(address, words.to(TYPE), mask=inside)


@triton.jit
def saturated(mask_ptr, s, first_m, first_n, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether slice ``s`` saturated, for a tile of up to 128 columns; anything beyond the product."""
    m = first_m + tl.arange(0, ROWS)[:, None]
    row = (s * tl.cdiv(N, 128) + first_n // 128).to(tl.int64) * M + m
    words = tl.load(mask_ptr + row * 4 + tl.arange(0, 4)[None, :], mask=m < tl.where(first_n < N, M, 0), other=0)
    # Column 8 * u + 2 * t + l is bit 2 * u + l of word t.
    u = first_n % 128 // 8 + tl.arange(0, COLUMNS // 8)
    bit = 2 * u[None, :, None, None] + tl.arange(0, 2)[None, None, None, :]
    return ((words[:, None, :, None] >> bit.to(tl.int32)) & 1 != 0).reshape(ROWS, COLUMNS)
