"""What ``matmul.finish_slice`` does, on single numbers of a consumer's threads (SEMANTICS 3)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language import PropagateNan

from triton_analog.lang import DYNAMIC_RANGE, OUTPUT_STREAM, POLAR_UNIT, TINY
from triton_analog.ops.hopper.noise import philox, polar
from triton_analog.ops.hopper.registers import numbers_of_columns, pack, store_transposed

ALL = gl.constexpr(PropagateNan.ALL)
MAGIC = gl.constexpr(12582912.0)
"""1.5 * 2**23: added and taken away again, it rounds half to even."""


@gluon.jit
def clamp(v, bound):
    """``v`` within ``+-bound``; NaN stays NaN."""
    bound = gl.full_like(v, 0.0) + bound
    return gl.minimum(gl.maximum(v, -bound, propagate_nan=ALL), bound, propagate_nan=ALL)


@gluon.jit
def store_mask(mask_ptr, passed, s, first_n, m, t, M, N):
    """One row's word of a thread for 128 columns. ``passed`` has the first column in its highest bit."""
    saturated = ~gl.inline_asm_elementwise("brev.b32 $0, $1;", "=r,r", [passed], dtype=gl.int32, is_pure=True, pack=1)
    row = (s * gl.cdiv(N, 128) + first_n // 128).to(gl.int64) * M + m
    gl.store(mask_ptr + row * 4 + t, saturated, mask=m < gl.where(first_n < N, M, 0))


@gluon.jit
def fetch_coefficients(
    buffers, coefficient_ptr, s, first_n, S, columns, NOISE: gl.constexpr, FIRST: gl.constexpr, COLUMNS: gl.constexpr
):
    """One slice's factors of product and noise, and the step, into a consumer's shared memory: from there a thread reads them
    as it goes, where loads from global memory would have to be kept in registers."""
    n = first_n + gl.arange(0, COLUMNS, layout=gl.BlockedLayout([2], [32], [4], [0]))
    at = coefficient_ptr + s * columns + n
    PAIRS: gl.constexpr = [COLUMNS // 2, 2]
    buffers.index(FIRST + 0).store(gl.load(at).reshape(PAIRS))
    if NOISE:
        buffers.index(FIRST + 1).store((gl.load(at + S * columns) * POLAR_UNIT).reshape(PAIRS))
    buffers.index(FIRST + 2).store(gl.load(at + 2 * S * columns).reshape(PAIRS))


@gluon.jit
def fetch_deviations(
    buffers, range_ptr, noise_wmax_ptr, first_n, N, S, noise_columns, sigma, FIRST: gl.constexpr, COLUMNS: gl.constexpr
):
    """The deviation of the noises of all slices together, for static ranges, where :func:`fetch_coefficients` leaves one's."""
    n = first_n + gl.arange(0, COLUMNS, layout=gl.BlockedLayout([2], [32], [4], [0]))
    variance = n.to(gl.float32) * 0.0
    for s in range(S):
        wmax = gl.load(noise_wmax_ptr + s * noise_columns + n % noise_columns, mask=n < N, other=0.0).to(gl.float32)
        deviation = sigma * gl.abs(gl.load(range_ptr + s).to(gl.float32)) * wmax
        variance += deviation * deviation
    buffers.index(FIRST + 1).store((gl.sqrt(variance) * POLAR_UNIT).reshape([COLUMNS // 2, 2]))


@gluon.jit
def load_seed(seed_ptr, PLACED: gl.constexpr):
    """The generator's keys, and what the counters of a tensor's first element are."""
    seed = gl.load(seed_ptr).to(gl.uint64, bitcast=True)
    keys = (seed & 0xFFFFFFFF).to(gl.uint32), (seed >> 32).to(gl.uint32)
    if PLACED:
        row, column, plane = gl.load(seed_ptr + 1), gl.load(seed_ptr + 2), gl.load(seed_ptr + 3)
        return keys, ((row // 2).to(gl.uint32), (column // 4).to(gl.uint32), plane.to(gl.uint32))
    else:
        return keys, (0, 0, 0)


@gluon.jit
def range_of_row(range_ptr, s, m, M):
    """Magnitude of a dynamic range; 0 beyond the rows."""
    return gl.abs(gl.load(range_ptr + s * M + m, mask=m < M, other=0.0).to(gl.float32))


@gluon.jit
def inverse(r):
    """``1 / r``, 0 where the range is 0."""
    is_zero = r < TINY
    return gl.where(is_zero, 0.0, 1.0 / gl.where(is_zero, 1.0, r))


@gluon.jit
def finish_columns(
    products, sums, passed, ranges, inverses, buffers, counters, m, t, out_q_max,
    MODE: gl.constexpr, DAC: gl.constexpr, NOISE: gl.constexpr, BOUND: gl.constexpr, ADC: gl.constexpr, MASK: gl.constexpr,
    FIRST: gl.constexpr, G: gl.constexpr,
):  # fmt: skip
    """:func:`finish_slice` for columns ``16 * G`` to ``16 * G + 15``, whose numbers ``products`` and ``sums`` are."""
    limit = gl.floor(t * 0.0 + out_q_max) + 0.5
    upper, lower = passed
    out = ()
    for j in gl.static_range(2):
        if BOUND:
            factors = numbers_of_columns(buffers.index(FIRST), 2 * G + j, t)
            steps = numbers_of_columns(buffers.index(FIRST + 2), 2 * G + j, t)
        if NOISE:
            if j == 0:
                row, column, plane, stream, key0, key1 = counters
                words = philox(row, column + 4 * G, plane, stream, key0, key1)
            radius0, cosine0, sine0 = polar(words[2 * j])
            radius1, cosine1, sine1 = polar(words[2 * j + 1])
            deviations = numbers_of_columns(buffers.index(FIRST + 1), 2 * G + j, t)
            radii = (radius0 * deviations[0], radius1 * deviations[1])
            directions = (cosine0, cosine1, sine0, sine1)
        for h in gl.static_range(2):
            for l in gl.static_range(2):
                v = products[4 * j + 2 * h + l]
                if BOUND:
                    v *= factors[l]
                    if MODE == DYNAMIC_RANGE and not DAC:
                        v *= inverses[h]
                if NOISE:
                    v += radii[l] * directions[2 * h + l]
                if ADC:
                    v = (v + MAGIC) - MAGIC
                    # Negative, its highest bit set, where the converter passes; NaN is positive.
                    passes = (gl.abs(v) - limit).to(gl.uint32, bitcast=True) >> 31
                    v = clamp(v, out_q_max) * steps[l]
                elif BOUND:
                    passes = gl.where(gl.abs(v) <= steps[l], 1, 0).to(gl.uint32)
                    v = clamp(v, steps[l])
                if MASK and h == 0:
                    upper = (upper << 1) | passes
                if MASK and h == 1:
                    lower = (lower << 1) | passes
                if BOUND:
                    if MODE == DYNAMIC_RANGE:
                        v *= ranges[h]
                    v += sums[4 * j + 2 * h + l]
                out = out + (v,)
    return out, (upper, lower)


@gluon.jit
def finish_slice(
    products, sums, ranges, buffers, seed, mask_ptr, s, first_n, m, t, M, N, out_q_max,
    MODE: gl.constexpr, DAC: gl.constexpr, NOISE: gl.constexpr, BOUND: gl.constexpr, ADC: gl.constexpr, MASK: gl.constexpr,
    FIRST: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """``sums`` plus what one slice's ``products`` become; both as :func:`numbers_of_threads` orders them. ``ranges`` are those of
    the thread's two rows, of which ``m`` is the first. Without ``BOUND``: ``products`` with the noise of all slices."""
    counters = (m, t, s, s, 0, 0)
    if NOISE:
        keys, place = seed[0], seed[1]
        row = (m // 16 * 8 + m % 8).to(gl.uint32) + place[0]
        column = (first_n // 4 + t).to(gl.uint32) + place[1]
        counters = (row, column, row * 0 + place[2] + s, row * 0 + OUTPUT_STREAM, keys[0], keys[1])
    inverses = (0.0, 0.0)
    if MODE == DYNAMIC_RANGE and not DAC:
        inverses = (inverse(ranges[0]), inverse(ranges[1]))
    out = ()
    nothing = t.to(gl.uint32) * 0
    for g in gl.static_range(COLUMNS // 16):
        if g % 8 == 0:
            passed = (nothing, nothing)
        new = sums[8 * g : 8 * g + 8]
        if N > g - COLUMNS:  # always; without, the compiler works on all columns at once and runs out of registers
            new, passed = finish_columns(
                products[8 * g : 8 * g + 8], new, passed, ranges, inverses, buffers, counters, m, t, out_q_max,
                MODE, DAC, NOISE, BOUND, ADC, MASK, FIRST, g,
            )  # fmt: skip
        out = out + new
        if MASK and g % 8 == 7:
            store_mask(mask_ptr, passed[0], s, first_n + 16 * (g - 7), m, t, M, N)
            store_mask(mask_ptr, passed[1], s, first_n + 16 * (g - 7), m + 8, t, M, N)
    return out


@gluon.jit
def store_rows(
    sums, bias_ptr, y_ptr, first_n, m, t, M, N, BIAS: gl.constexpr, WIDE: gl.constexpr, COLUMNS: gl.constexpr
):
    """The ``sums`` with the bias, rounded. ``WIDE``: rows of ``y`` are multiples of 16 bytes."""
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    row = y_ptr + m.to(gl.int64) * N
    for g in gl.static_range(COLUMNS // 32):
        upper = ()
        lower = ()
        for j in gl.static_range(4 * g, 4 * g + 4):
            n = first_n + 8 * j + 2 * t
            v = (sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3])
            if BIAS:
                bias0 = gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
                bias1 = gl.load(bias_ptr + n + 1, mask=n + 1 < N, other=0.0).to(gl.float32)
                v = (v[0] + bias0, v[1] + bias1, v[2] + bias0, v[3] + bias1)
            if WIDE:
                upper = upper + (pack(v[0], v[1], DTYPE),)
                lower = lower + (pack(v[2], v[3], DTYPE),)
            else:
                for h in gl.static_range(2):
                    for l in gl.static_range(2):
                        inside = (m + 8 * h < M) & (n + l < N)
                        gl.store(row + 8 * h * N + n + l, v[2 * h + l].to(DTYPE), mask=inside)
        if WIDE:
            n = first_n + 32 * g + 8 * t
            store_transposed(upper, t, row + n, (m < M) & (n < N))
            store_transposed(lower, t, row + 8 * N + n, (m + 8 < M) & (n < N))
