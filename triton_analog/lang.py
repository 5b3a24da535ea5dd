"""Small device functions the kernels share. They take values, not pointers, and mirror ``reference`` formula by formula."""

import triton
import triton.language as tl
from triton import knobs
from triton.language import target_info
from triton.runtime.jit import constexpr_function

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
TINY = tl.constexpr(2.0**-100)
WEIGHT_STREAM = tl.constexpr(0)
OUTPUT_STREAM = tl.constexpr(1)
ROUNDING_STREAM = tl.constexpr(2**30 - 2)
INPUT_STREAM = tl.constexpr(2**30 - 1)

# PTX for NVIDIA GPUs, with a plain path beside its use.
MULTIPLY_WIDE = tl.constexpr("{ .reg .u64 t; mul.wide.u32 t, $2, $3; mov.b64 {$1, $0}, t; }")
# 1 + the 20 low bits / 2**23 is turned into u = 1 - bits / 2**20, 1 + the 23 high bits / 2**23 into an angle. The radius is
# sqrt(-log2 u); a factor of POLAR_UNIT makes it that of normals.
POLAR = tl.constexpr("""{ .reg .b32 bits; .reg .f32 u, angle;
    lop3.b32 bits, $3, 0x000FFFFF, 0x3F800000, 0xEA; mov.b32 u, bits; fma.rn.ftz.f32 u, u, 0fC1000000, 0f41100000;
    lg2.approx.ftz.f32 u, u; abs.f32 u, u; sqrt.approx.ftz.f32 $0, u;
    shr.u32 bits, $3, 9; or.b32 bits, bits, 0x3F800000; mov.b32 angle, bits; mul.ftz.f32 angle, angle, 0f40C90FDB;
    cos.approx.ftz.f32 $1, angle; sin.approx.ftz.f32 $2, angle; }""")
POLAR_UNIT = tl.constexpr(1.1774100225154747)  # sqrt(2 ln 2)

# How an input range is given: none, one number per slice, or one per slice and row.
NO_RANGE = tl.constexpr(0)
STATIC_RANGE = tl.constexpr(1)
DYNAMIC_RANGE = tl.constexpr(2)


@constexpr_function
def is_nvidia():
    """Whether the kernel is being compiled for an NVIDIA GPU."""
    return not knobs.runtime.interpret and target_info.is_cuda()


@triton.jit
def slice_bounds(s, K, S, ALIGNED: tl.constexpr):
    """First column and width of slice ``s`` when ``K`` columns are cut into ``S``; ``ALIGNED`` as ``launch.aligned``."""
    base = K // S
    if ALIGNED:  # lets the compiler load 16 bytes at a time
        return tl.multiple_of(s * base, 16), tl.multiple_of(base, 16)
    extra = K % S
    return s * base + tl.minimum(s, extra), base + (s < extra).to(tl.int32)


@triton.jit
def slice_of(k, K, S):
    """The slice that holds column ``k``, elementwise."""
    base = K // S
    extra = K % S
    border = extra * (base + 1)
    return tl.where(k < border, k // (base + 1), extra + (k - border) // base)


@triton.jit
def clamp(v, bound):
    """``v`` within ``+-bound``; NaN stays NaN, as in torch."""
    bound = tl.zeros_like(v) + bound
    return tl.clamp(v, -bound, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_even(v):
    """Round half to even for ``|v| < 2**22``, by two full-rate additions."""
    magic = 12582912.0  # 1.5 * 2**23: one unit in the last place is 1
    return (v + magic) - magic


@triton.jit
def steps_per_unit(bound, q_max):
    """``q_max / bound``, correctly rounded; 0 for a zero bound, NaN for NaN."""
    is_zero = bound < TINY
    return tl.where(is_zero, 0.0, tl.div_rn(q_max + tl.zeros_like(bound), tl.where(is_zero, 1.0, bound)))


@triton.jit
def step_of(bound, q_max):
    """``bound / q_max``, correctly rounded: one step of the grid in the units of ``bound``."""
    return tl.div_rn(bound, q_max + tl.zeros_like(bound))


@triton.jit
def to_steps(v, bound, q_max):
    """``v`` as an integer number of steps in ``-q_max .. q_max`` (clamped, then rounded: the DAC and weight rule)."""
    return round_even(clamp(v * steps_per_unit(bound, q_max), q_max))


@triton.jit
def to_random_steps(v, bound, q_max, u):
    """As :func:`to_steps`, but rounded up with the probability of the fraction; ``u`` is uniform between 0 and 1."""
    steps = clamp(v * steps_per_unit(bound, q_max), q_max)
    down = tl.floor(steps)
    return down + (u < steps - down).to(tl.float32)


@triton.jit
def convert(v, bound, q_max, QUANTIZE: tl.constexpr):
    """The ADC: ``v`` rounded (if ``QUANTIZE``), then clamped to ``bound``; and where the clamp acted."""
    if QUANTIZE:
        q = round_even(v * steps_per_unit(bound, q_max))  # rounds coarsely beyond 2**22, where the clamp acts anyway
        return clamp(q, q_max) * step_of(bound, q_max), (tl.abs(q) <= q_max) == 0
    return clamp(v, bound), (tl.abs(v) <= bound) == 0


@triton.jit
def join_halves(bits, SHIFT: tl.constexpr):
    """The first element of the last dimension and, shifted, its second."""
    low, high = tl.split(bits)
    return low | (high << SHIFT)


@triton.jit
def pack_bits(flags, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``flags [ROWS, COLS]`` as ``[ROWS, 4]`` words of ``COLS / 4`` bits, ``COLS`` a multiple of 32 up to 128.

    Column ``32 * p + 16 * g + 8 * h + 2 * t + l`` is bit ``8 * p + 4 * g + 2 * h + l`` of word ``t``: the columns that one
    thread of a tensor core's accumulator holds, so that packing moves nothing between threads.

    Halves are joined instead of summed over: Triton 3.6 sums wrongly where the lanes of a sum are not neighbours.
    """
    bits = flags.to(tl.int32).reshape(ROWS, COLS // 32, 2, 2, 4, 2)
    bits = join_halves(bits, 1).permute(0, 1, 2, 4, 3)
    bits = join_halves(bits, 2).permute(0, 1, 3, 2)
    bits = join_halves(bits, 4)
    if COLS == 128:
        bits = join_halves(bits.reshape(ROWS, 2, 2, 4).permute(0, 1, 3, 2), 8)
        bits = join_halves(bits.permute(0, 2, 1), 16)
    elif COLS == 64:
        bits = join_halves(bits.permute(0, 2, 1), 8)
    return bits.reshape(ROWS, 4)


@triton.jit
def cast(v, DTYPE: tl.constexpr):
    """fp32 ``v`` rounded to the nearest even value of ``DTYPE``. The interpreter would truncate to bf16."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = v.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        v = tl.where(v == v, rounded, v)
    return v.to(DTYPE)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in fp32, for int8 in int32. The interpreter keeps bf16 as raw integers, so there the rounded values are
    widened first."""
    if a.dtype == tl.int8:
        return tl.dot(a, b, acc, out_dtype=tl.int32)
    elif INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def polar(word):
    """Radius, cosine and sine of a uint32 tensor: the radius from its 20 low bits, the angle from its 23 high bits."""
    if is_nvidia():
        radius, cosine, sine = tl.inline_asm_elementwise(
            POLAR, "=f,=f,=f,r", [word], dtype=(tl.float32, tl.float32, tl.float32), is_pure=True, pack=1
        )
        return radius * POLAR_UNIT, cosine, sine
    else:
        u = 1.0 - (word & 0xFFFFF).to(tl.float32) * 9.5367431640625e-07  # 2**-20: (0, 1]
        radius = tl.sqrt(-2.0 * tl.log(u))
        # The nearest of the four axes, and the angle from it, at most half of the quarter turn between two: short polynomials
        # then give sine and cosine to fp32 rounding without a range reduction.
        turn = word + 0x20000000
        axis = turn >> 30
        f = ((turn >> 9) & 0x1FFFFF).to(tl.float32) * 4.76837158203125e-07 - 0.5  # 2**-21
        t = f * f
        along = (((0.00090362807 * t - 0.02086007) * t + 0.2536692) * t - 1.2337005) * t + 1.0
        across = (((-0.004602149 * t + 0.07968022) * t - 0.6459635) * t + 1.5707963) * f
        swap = (axis & 1) != 0
        cosine = tl.where(swap, across, along)
        sine = tl.where(swap, along, across)
        return radius, tl.where((axis == 1) | (axis == 2), -cosine, cosine), tl.where(axis >= 2, -sine, sine)


@triton.jit
def multiply_wide(a, FACTOR: tl.constexpr):
    """High and low word of the product of uint32 ``a`` and ``FACTOR``."""
    factor = tl.full((1, 1), FACTOR, tl.uint32)
    if is_nvidia():
        # One instruction instead of two. As 64-bit arithmetic it would be one too, but Triton then thinks the generator too
        # dear to compute in the layout of its user and sends the numbers through shared memory.
        return tl.inline_asm_elementwise(
            MULTIPLY_WIDE, "=r,=r,r,r", [a, factor], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1
        )
    else:
        return tl.umulhi(a, factor), a * factor


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-7 (Salmon et al. 2011): four uint32 words per counter; the counter's words broadcast."""
    for _ in tl.static_range(7):
        a_high, a_low = multiply_wide(c0, 0xD2511F53)
        b_high, b_low = multiply_wide(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def one_of_pair(word, is_lower):
    """The first of a word's two normals, or the second."""
    radius, cosine, sine = polar(word)
    return radius * tl.where(is_lower, sine, cosine)


@triton.jit
def load_seed(seed_ptr, PLACED: tl.constexpr):
    """The seed, and the first row, column and plane of the tensor in the seed's field: 0 unless ``PLACED``."""
    if PLACED:
        return tl.load(seed_ptr), tl.load(seed_ptr + 1), tl.load(seed_ptr + 2), tl.load(seed_ptr + 3)
    else:
        return tl.load(seed_ptr), 0, 0, 0


@triton.jit
def halves_of(seed):
    """Low and high word of a seed: the generator's keys."""
    key = seed.to(tl.uint64, bitcast=True)
    return (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def words_of_tile(seed, row, col, plane, STREAM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Four words for each counter of the elements from ``(row, col)`` on, ``[ROWS // 2, COLS // 4]``; of fewer than 16 rows
    ``[ROWS, COLS // 4]``.

    Row and column enter the first two rounds separately, which leaves those one-dimensional.
    """
    k0, k1 = halves_of(seed)
    c1 = (col // 4 + tl.arange(0, COLS // 4)).to(tl.uint32)[None, :]
    c2 = (tl.zeros((1, 1), tl.int32) + plane).to(tl.uint32)
    c3 = tl.full((1, 1), STREAM, tl.uint32)
    if ROWS >= 16:
        c0 = row // 2 + tl.arange(0, ROWS // 2)
    else:
        m = row + tl.arange(0, ROWS)
        c0 = m // 16 * 8 + m % 8
    return philox(c0.to(tl.uint32)[:, None], c1, c2, c3, k0, k1)


@triton.jit
def lower_rows(row, ROWS: tl.constexpr):
    """Which of fewer than 16 rows from ``row`` on are in the lower half of their group, ``[ROWS, 1]``."""
    return ((row + tl.arange(0, ROWS)) // 8 % 2 != 0)[:, None]


@triton.jit
def normal_tile(seed, row, col, plane, STREAM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Standard normals for the logical elements from ``(row, col)`` on; ``col`` and ``COLS`` are multiples of 16, and so is
    ``row`` unless there are fewer ``ROWS``.

    One counter ``(row of a group, column group, plane, stream)`` gives the eight numbers of 16 rows and 16 columns that one
    thread of a tensor core's accumulator holds, so the reordering at the end only renames registers. A tile of fewer than 16
    rows uses half of them.
    """
    w0, w1, w2, w3 = words_of_tile(seed, row, col, plane, STREAM, ROWS, COLS)
    if ROWS >= 16:
        r0, cosine0, sine0 = polar(w0)
        r1, cosine1, sine1 = polar(w1)
        r2, cosine2, sine2 = polar(w2)
        r3, cosine3, sine3 = polar(w3)
        upper = tl.join(tl.join(r0 * cosine0, r1 * cosine1), tl.join(r2 * cosine2, r3 * cosine3))
        lower = tl.join(tl.join(r0 * sine0, r1 * sine1), tl.join(r2 * sine2, r3 * sine3))
        z = tl.join(upper, lower).reshape(ROWS // 16, 8, COLS // 16, 4, 2, 2, 2)
        return z.permute(0, 6, 1, 2, 5, 3, 4).reshape(ROWS, COLS)
    else:
        is_lower = lower_rows(row, ROWS)
        z = tl.join(
            tl.join(one_of_pair(w0, is_lower), one_of_pair(w1, is_lower)),
            tl.join(one_of_pair(w2, is_lower), one_of_pair(w3, is_lower)),
        )
        return z.reshape(ROWS, COLS // 16, 4, 2, 2).permute(0, 1, 4, 2, 3).reshape(ROWS, COLS)


@triton.jit
def between(half):
    """The middle of part ``half`` of ``2**16`` equal parts of 0 .. 1."""
    return (half.to(tl.float32) + 0.5) * 1.52587890625e-05  # 2**-16


@triton.jit
def uniform_tile(seed, row, col, plane, STREAM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Numbers between 0 and 1 for the elements from ``(row, col)`` on, with the counters and words of :func:`normal_tile`: the
    upper eight rows have the low half of a word, the lower the high one."""
    w0, w1, w2, w3 = words_of_tile(seed, row, col, plane, STREAM, ROWS, COLS)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    if ROWS >= 16:
        halves = tl.join(words & 0xFFFF, words >> 16).reshape(ROWS // 16, 8, COLS // 16, 4, 2, 2, 2)
        return between(halves.permute(0, 6, 1, 2, 5, 3, 4).reshape(ROWS, COLS))
    else:
        words = words.reshape(ROWS, COLS // 16, 4, 2, 2).permute(0, 1, 4, 2, 3).reshape(ROWS, COLS)
        return between(tl.where(lower_rows(row, ROWS), words >> 16, words & 0xFFFF))


@triton.jit
def uniform_at(seed, m, n, plane, STREAM: tl.constexpr):
    """The numbers of :func:`uniform_tile` at rows ``m [ROWS, 1]`` and columns ``n [1, COLS]``, anywhere; ``plane`` is
    ``[1, COLS]``. Eight times the work."""
    k0, k1 = halves_of(seed)
    c0 = (m // 16 * 8 + m % 8).to(tl.uint32)
    c1 = (n // 16 * 4 + n % 8 // 2).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, plane.to(tl.uint32), tl.full((1, 1), STREAM, tl.uint32), k0, k1)
    is_odd, is_right = n % 2 != 0, n // 8 % 2 != 0
    word = tl.where(is_right, tl.where(is_odd, w3, w2), tl.where(is_odd, w1, w0))
    return between(tl.where((m // 8) % 2 != 0, word >> 16, word & 0xFFFF))
