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

# PTX for NVIDIA GPUs, with a plain path beside its use.
MULTIPLY_WIDE = tl.constexpr("{ .reg .u64 t; mul.wide.u32 t, $2, $3; mov.b64 {$1, $0}, t; }")

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
def minus_two_log(u):
    """``-2 ln u`` for ``u`` in ``(0, 1]``; never negative."""
    if is_nvidia():  # the hardware's: one instruction instead of twelve, off by at most 2**-22 where u is near 1
        log2 = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)
        return tl.abs(1.3862943611198906 * log2)
    else:
        return -2.0 * tl.log(u)


@triton.jit
def box_muller(w0, w1):
    """Two standard normals from two uint32 tensors: radius from the first word, angle from the second.

    The top bit of ``w1`` is a sign, the next swaps the axes, the other thirty are the angle within a quarter turn, so that
    two short polynomials give sine and cosine to fp32 rounding without a range reduction.
    """
    u = w0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2**-32, 2**-33: (0, 1]
    radius = tl.sqrt(minus_two_log(u))
    f = (w1 << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    t = f * f
    sine = (((-0.004602149 * t + 0.07968022) * t - 0.6459635) * t + 1.5707963) * f
    cosine = (((0.00090362807 * t - 0.02086007) * t + 0.2536692) * t - 1.2337005) * t + 1.0
    signed = (radius.to(tl.uint32, bitcast=True) ^ (w1 & 0x80000000)).to(tl.float32, bitcast=True)
    big = signed * cosine
    small = radius * sine
    swap = (w1 & 0x40000000) != 0
    return tl.where(swap, small, big), tl.where(swap, big, small)


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
    """Philox-4x32-10 (Salmon et al. 2011): four uint32 words per counter; the counter's words broadcast."""
    for _ in tl.static_range(10):
        a_high, a_low = multiply_wide(c0, 0xD2511F53)
        b_high, b_low = multiply_wide(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def normal_tile(seed, row, col, plane, STREAM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Standard normals for the logical elements from ``(row, col)`` on; ``col`` and ``COLS`` are multiples of 16.

    One counter ``(column group, row, plane, stream)`` gives the four columns of a row that one thread of a tensor core's
    accumulator holds, so the reordering at the end only renames registers. Column and row enter the first two rounds
    separately, which leaves those rounds one-dimensional.
    """
    key = seed.to(tl.uint64, bitcast=True)
    c0 = (col // 4 + tl.arange(0, COLS // 4)).to(tl.uint32)[None, :]
    c1 = (row + tl.arange(0, ROWS)).to(tl.uint32)[:, None]
    c2 = (tl.zeros((1, 1), tl.int32) + plane).to(tl.uint32)
    c3 = tl.full((1, 1), STREAM, tl.uint32)
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    z = tl.join(tl.join(z0, z1), tl.join(z2, z3)).reshape(ROWS, COLS // 16, 4, 2, 2)
    return z.permute(0, 1, 4, 2, 3).reshape(ROWS, COLS)
