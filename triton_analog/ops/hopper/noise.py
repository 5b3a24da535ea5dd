"""The normal field of ``lang.normal_tile`` (SEMANTICS 9) on single numbers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_analog.lang import MULTIPLY_WIDE, POLAR, POLAR_UNIT

PACK = gl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
UNPACK = gl.constexpr("{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }")


@gluon.jit
def multiply_wide(a, FACTOR: gl.constexpr):
    """High and low word of the product of uint32 ``a`` and ``FACTOR``."""
    return gl.inline_asm_elementwise(
        MULTIPLY_WIDE, "=r,=r,r,r", [a, a * 0 + FACTOR], dtype=(gl.uint32, gl.uint32), is_pure=True, pack=1
    )


@gluon.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-7 (Salmon et al. 2011): four uint32 words of each counter."""
    for _ in gl.static_range(7):
        a_high, a_low = multiply_wide(c0, 0xD2511F53)
        b_high, b_low = multiply_wide(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@gluon.jit
def polar(word):
    """Radius in units of ``POLAR_UNIT``, cosine and sine of a uint32 word."""
    return gl.inline_asm_elementwise(
        POLAR, "=f,=f,=f,r", [word], dtype=(gl.float32, gl.float32, gl.float32), is_pure=True, pack=1
    )


@gluon.jit
def counters_of(seed, stream, plane, m, first_n, t):
    """Counter and key of a thread's numbers in 16 columns from ``first_n`` on; ``m`` is the first of its two rows."""
    row = (m // 16 * 8 + m % 8).to(gl.uint32)
    column = (first_n // 4 + t).to(gl.uint32)
    return row, column, row * 0 + plane, row * 0 + stream, (seed & 0xFFFFFFFF).to(gl.uint32), (seed >> 32).to(gl.uint32)


@gluon.jit
def make_ahead(slot, counters, group):
    """Leave a thread's eight normals of the columns ``16 * group`` to ``16 * group + 15``, in fp16, in ``slot``: ``[128, 4]`` words
    of shared memory. Each thread reads what it wrote."""
    row, column, plane, stream, key0, key1 = counters
    words = philox(row, column + 4 * group.to(gl.uint32), plane, stream, key0, key1)
    packed = ()
    for i in gl.static_range(4):
        radius, cosine, sine = polar(words[i])
        radius *= POLAR_UNIT
        packed = packed + (
            gl.inline_asm_elementwise(
                PACK, "=r,f,f", [radius * cosine, radius * sine], dtype=gl.int32, is_pure=True, pack=1
            ),
        )
    four = gl.join(gl.join(packed[0], packed[2]), gl.join(packed[1], packed[3]))
    slot.store(four.reshape([128, 4]))


@gluon.jit
def read_ahead(slot, like):
    """What :func:`make_ahead` left: for each of its four pairs of a word the number of the upper and of the lower row."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    four = slot.load(LAYOUT).reshape([4, 8, 4, 2, 2])
    even, odd = gl.split(four)
    word0, word2 = gl.split(even)
    word1, word3 = gl.split(odd)
    packed = (word0, word1, word2, word3)
    out = ()
    for i in gl.static_range(4):
        word = gl.convert_layout(packed[i], like.type.layout, assert_trivial=True)
        out = out + (
            gl.inline_asm_elementwise(UNPACK, "=f,=f,r", [word], dtype=(gl.float32, gl.float32), is_pure=True, pack=1),
        )
    return out
