"""An accumulator as its threads' single numbers.

A tensor core leaves ``[64, n]`` numbers in 128 threads: thread ``4 * r + t`` of a warp holds rows ``r`` and ``r + 8`` of its 16
and of every 8 columns ``2 * t`` and ``2 * t + 1``. What follows a product is written for such single numbers, each a tensor
``[4 warps, 8 rows, 4 pairs of columns]`` with one element to a thread: taking an accumulator apart only renames registers, and
the compiler then sees plain scalar code that it can order as it likes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# PTX; these kernels run nowhere else. Four words of each of four neighbouring lanes are transposed in two exchanges, between
# numbers as their threads hold them and 16 neighbouring bytes for each lane.
_TRANSPOSE = """.reg .pred odd, high; .reg .b32 bit, sent, got, a0, a1, a2, a3, b0, b1, b2, b3;
    and.b32 bit, LANE, 1; setp.ne.b32 odd, bit, 0; and.b32 bit, LANE, 2; setp.ne.b32 high, bit, 0;
    selp.b32 sent, W0, W1, odd; shfl.sync.bfly.b32 got, sent, 1, 0x1f, 0xffffffff;
    selp.b32 a0, got, W0, odd; selp.b32 a1, W1, got, odd;
    selp.b32 sent, W2, W3, odd; shfl.sync.bfly.b32 got, sent, 1, 0x1f, 0xffffffff;
    selp.b32 a2, got, W2, odd; selp.b32 a3, W3, got, odd;
    selp.b32 sent, a0, a2, high; shfl.sync.bfly.b32 got, sent, 2, 0x1f, 0xffffffff;
    selp.b32 b0, got, a0, high; selp.b32 b2, a2, got, high;
    selp.b32 sent, a1, a3, high; shfl.sync.bfly.b32 got, sent, 2, 0x1f, 0xffffffff;
    selp.b32 b1, got, a1, high; selp.b32 b3, a3, got, high;"""


def _transpose(words: tuple[str, str, str, str], lane: str) -> str:
    """PTX that leaves the transposed ``words`` in b0 to b3."""
    text = _TRANSPOSE.replace("LANE", lane)
    for i, word in enumerate(words):
        text = text.replace(f"W{i}", word)
    return text


STORE_TRANSPOSED = gl.constexpr(
    "{ .reg .pred inside; setp.ne.b32 inside, $7, 0; "
    + _transpose(("$1", "$2", "$3", "$4"), "$5")
    + "@inside st.global.v4.b32 [$6], {b0, b1, b2, b3}; mov.b32 $0, 0; }"
)
TRANSPOSE = gl.constexpr(
    "{ "
    + _transpose(("$4", "$5", "$6", "$7"), "$8")
    + "mov.b32 $0, b0; mov.b32 $1, b1; mov.b32 $2, b2; mov.b32 $3, b3; }"
)
LOAD_CHUNK = gl.constexpr("""{ .reg .pred inside; setp.ne.b32 inside, $5, 0; mov.b32 $0, 0x7FFF7FFF; mov.b32 $1, 0x7FFF7FFF;
    mov.b32 $2, 0x7FFF7FFF; mov.b32 $3, 0x7FFF7FFF; @inside ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }""")
PACK_BF16 = gl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
PACK_FP16 = gl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
UNPACK_BF16 = gl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;")
UNPACK_FP16 = gl.constexpr("{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }")


@gluon.jit
def cut(x):
    """First and second half of the last dimension of ``[4, 8, 4, n]``."""
    n: gl.constexpr = x.shape[3]
    return gl.split(x.reshape([4, 8, 4, 2, n // 2]).permute((0, 1, 2, 4, 3)))


@gluon.jit
def numbers_of_threads(accumulator, COLUMNS: gl.constexpr):
    """A tuple of single numbers: at ``4 * j + 2 * h + l`` row ``r + 8 * h`` and column ``8 * j + 2 * t + l``."""
    J: gl.constexpr = COLUMNS // 8
    LEVELS: gl.constexpr = 6 if COLUMNS == 128 else 7
    x = accumulator.reshape([4, 2, 8, J, 4, 2]).permute((0, 2, 4, 3, 1, 5))
    parts = (x.reshape([4, 8, 4, COLUMNS // 2]),)
    for _ in gl.static_range(LEVELS):
        halves = ()
        for i in gl.static_range(len(parts)):
            halves = halves + cut(parts[i])
        parts = halves
    out = ()
    for i in gl.static_range(len(parts)):
        out = out + (parts[i].reshape([4, 8, 4]),)
    return out


@gluon.jit
def place_of_thread(LAYOUT: gl.constexpr, COLUMNS: gl.constexpr):
    """Row ``r`` of a thread's first number within 64, and ``t``."""
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))[:, None] + gl.full((64, COLUMNS), 0, gl.int32, LAYOUT)
    columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))[None, :] + gl.full(
        (64, COLUMNS), 0, gl.int32, LAYOUT
    )
    return numbers_of_threads(rows, COLUMNS)[0], numbers_of_threads(columns, COLUMNS)[0] // 2


@gluon.jit
def numbers_of_columns(buffer, j, like):
    """Of a number for each column, in shared memory as ``[columns / 2, 2]``, a thread's for ``8 * j + 2 * t`` and the next."""
    L: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1]], lane_bases=[[1, 0], [2, 0], [0, 0], [0, 0], [0, 0]], warp_bases=[[0, 0], [0, 0]], block_bases=[],
        shape=[4, 2],
    )  # fmt: skip
    SINGLE: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, like.type.layout))
    left, right = gl.split(buffer.slice(4 * j, 4, 0).load(L))
    left = gl.expand_dims(gl.expand_dims(gl.convert_layout(left, SINGLE, assert_trivial=True), 0), 0)
    right = gl.expand_dims(gl.expand_dims(gl.convert_layout(right, SINGLE, assert_trivial=True), 0), 0)
    return gl.broadcast(left, like)[0], gl.broadcast(right, like)[0]


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def sum_of_threads(x):
    """Of a single number of each thread of a warpgroup. (Triton's own ``sum`` is not Gluon's where the interpreter is on.)"""
    return gl.reduce(gl.reduce(gl.reduce(x, 2, add), 1, add), 0, add)


@gluon.jit
def pack(low, high, DTYPE: gl.constexpr):
    """Two fp32 numbers, rounded to a 16-bit type, in one word."""
    ASM: gl.constexpr = PACK_BF16 if DTYPE == gl.bfloat16 else PACK_FP16
    return gl.inline_asm_elementwise(ASM, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpack(word, DTYPE: gl.constexpr):
    """The two 16-bit numbers of a word in fp32."""
    ASM: gl.constexpr = UNPACK_BF16 if DTYPE == gl.bfloat16 else UNPACK_FP16
    return gl.inline_asm_elementwise(ASM, "=&f,=&f,r", [word], dtype=(gl.float32, gl.float32), is_pure=True, pack=1)


@gluon.jit
def load_chunk(address, inside):
    """Four words, 16 bytes, from an address of their own for each thread; NaN if not ``inside``."""
    return gl.inline_asm_elementwise(
        LOAD_CHUNK, "=&r,=&r,=&r,=&r,l,r", [address, inside.to(gl.int32)],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def transposed(words, t):
    """Of columns ``8 * t`` to ``8 * t + 7`` of a row in thread ``t`` those that :func:`store_transposed` takes, and back."""
    return gl.inline_asm_elementwise(
        TRANSPOSE, "=&r,=&r,=&r,=&r,r,r,r,r,r", [words[0], words[1], words[2], words[3], t],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_transposed(words, t, address, inside):
    """``words``: four of each thread, for the columns ``8 * j + 2 * t`` and ``8 * j + 2 * t + 1`` of a row, ``j`` from 0 to 3.
    Thread ``t`` stores columns ``8 * t`` to ``8 * t + 7`` at its 16-byte aligned ``address``, if ``inside``."""
    gl.inline_asm_elementwise(
        STORE_TRANSPOSED, "=r,r,r,r,r,r,l,r", [words[0], words[1], words[2], words[3], t, address, inside.to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
