"""The normal field of ``lang.normal_tile`` (SEMANTICS 9) on single numbers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_analog.lang import MULTIPLY_WIDE, POLAR


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
