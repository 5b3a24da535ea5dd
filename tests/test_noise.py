"""SEMANTICS 9: one counter-based normal field, a function of seed, stream, plane, row and column."""

import math
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from helpers import seed_of

from triton_analog import ops, reference
from triton_analog.lang import normal_tile
from triton_analog.ops.noise import NoiseConfig, launch_noise
from triton_analog.reference.noise import philox as reference_philox

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF, -1234567890123456789]
SIDE = 2048
SAMPLES = SIDE * SIDE
SIGMAS = 5
"""A statistic may be this many standard errors from its expectation."""


# ---- The generator, written again for one element at a time -----------------------------------------------------------


def philox(counter, key):
    """Philox-4x32-10 of Salmon et al. (2011), on Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = product1 >> 32 ^ c1 ^ k0, product1 % 2**32, product0 >> 32 ^ c3 ^ k1, product0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def box_muller(radius_word, angle_word):
    """Radius from an fp32 uniform in (0, 1]; the angle from a sign bit, an axis bit and 30 bits of a quarter turn."""
    u = float(np.float32(np.float32(radius_word) * np.float32(2**-32)) + np.float32(2**-33))
    quarter = angle_word % 2**30
    angle = (quarter - 2**30 * (quarter >= 2**29)) * math.pi / 2**31
    radius = math.sqrt(-2 * math.log(u))
    big = radius * math.cos(angle) * (-1 if angle_word >> 31 else 1)
    small = radius * math.sin(angle)
    return (small, big) if angle_word >> 30 & 1 else (big, small)


def element(seed, m, n, stream, plane):
    """Element ``(m, n)`` of the field, from the documented counter and lane."""
    counter = (4 * (n // 16) + n % 8 // 2, m, plane, stream)
    words = philox(counter, (seed % 2**32, seed // 2**32 % 2**32))
    lanes = [*box_muller(*words[:2]), *box_muller(*words[2:])]
    return lanes[2 * (n // 8 % 2) + n % 2]


KNOWN_ANSWERS = [  # Random123's kat_vectors: counter word, key word, output
    (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (0xFFFFFFFF, 0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
]


@pytest.mark.parametrize(("word", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(word, key, answer):
    assert philox((word,) * 4, (key,) * 2) == answer
    counter = [np.array([word], dtype=np.uint64)] * 4
    (w0, w2), (w1, w3) = reference_philox(key << 32 | key, *counter)
    assert tuple(int(w[0]) for w in (w0, w1, w2, w3)) == answer


@pytest.mark.parametrize("seed", SEEDS)
def test_every_element_has_its_documented_counter_and_lane(seed, backend, device):
    stream, plane, rows, cols = 2**32 - 1, 2**31 - 1, 3, 37
    field = ops.noise(seed_of(seed, device), rows, cols, stream=stream, plane=plane).cpu()
    expected = [[element(seed, m, n, stream, plane) for n in range(cols)] for m in range(rows)]
    off = (field - torch.tensor(expected)).abs()
    if backend == "kernel" and device.type == "cuda":  # the hardware's logarithm is off where the radius is small
        assert off.max() <= 6e-4
        assert (off > 4e-6).sum() <= 2
    else:
        assert off.max() <= 2e-6


@triton.jit
def tile_kernel(seed_ptr, origin_ptr, out_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    row, col = tl.load(origin_ptr), tl.load(origin_ptr + 1)
    z = normal_tile(tl.load(seed_ptr), row, col, 3, 1, ROWS, COLS)
    tl.store(out_ptr + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :], z)


@pytest.mark.parametrize("row", [0, 2**31 - 1, 2**31, 2**32 - 2])
@pytest.mark.parametrize("col", [0, 2**31 - 16, 2**31, 2**34 - 16])
def test_rows_and_columns_beyond_32_bits(row, col, device):
    field = torch.full((2, 16), torch.nan, device=device)
    tile_kernel[(1,)](seed_of(-5, device), torch.tensor([row, col], device=device), field, ROWS=2, COLS=16)
    expected = [[element(-5, row + m, col + n, 1, 3) for n in range(16)] for m in range(2)]
    torch.testing.assert_close(field.cpu(), torch.tensor(expected), atol=2e-6, rtol=0)


# ---- One field on every backend and launch ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (37, 45), (65, 16)])
def test_a_larger_field_contains_the_smaller(shape, backend, device):
    seed = seed_of(7, device)
    rows, cols = shape
    larger = ops.noise(seed, 70, 50)
    assert torch.equal(ops.noise(seed, rows, cols), larger[:rows, :cols])


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("config", [NoiseConfig(16, 16), NoiseConfig(1, 128, num_warps=1), NoiseConfig(64, 32)])
def test_blocks_do_not_change_the_field(config, backend, device):
    fields = [launch_noise(seed_of(7, device), 37, 45, stream=5, plane=2, config=c) for c in (None, config)]
    assert torch.equal(*fields)


def test_chunks_do_not_change_the_reference(monkeypatch):
    field = reference.noise(seed_of(7), 61, 75)
    monkeypatch.setattr(sys.modules[reference.noise.__module__], "_COUNTERS_PER_CHUNK", 100)
    assert torch.equal(reference.noise(seed_of(7), 61, 75), field)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_fields(shape, backend, device):
    assert ops.noise(seed_of(1, device), *shape).shape == shape


# ---- The distribution: the reference alone, which the kernels equal -----------------------------------------------------


def square_field(seed, **which):
    return reference.noise(seed_of(seed), SIDE, SIDE, **which).double()


@pytest.fixture(scope="module")
def field():
    return square_field(42)


def assert_expected(statistic, expectation, standard_error):
    assert abs(float(statistic) - expectation) < SIGMAS * standard_error


@pytest.mark.parametrize(("power", "moment", "variance"), [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)])
def test_moments_are_the_normal_law_s(power, moment, variance, field):
    assert_expected((field**power).mean(), moment, math.sqrt(variance / SAMPLES))


@pytest.mark.parametrize("lane", range(16))
def test_every_column_of_a_group_is_standard_normal(lane, field):
    column = field[:, lane::16]
    assert_expected(column.mean(), 0, math.sqrt(1 / column.numel()))
    assert_expected((column**2).mean(), 1, math.sqrt(2 / column.numel()))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("bound", [0, 0.5, 1, 2, 3, 4, 4.5])
def test_tails_are_the_normal_law_s(bound, sign, field):
    share = math.erfc(bound / math.sqrt(2)) / 2
    assert_expected((sign * field > bound).double().mean(), share, math.sqrt(share * (1 - share) / SAMPLES))


def test_no_value_is_infinite_or_beyond_the_documented_radius(field):
    assert field.abs().max() < 6.78


OTHER_FIELDS = {
    "next column": lambda z: z.roll(1, 1),
    "next pair": lambda z: z.roll(2, 1),
    "other half of the group": lambda z: z.roll(8, 1),
    "next group": lambda z: z.roll(16, 1),
    "next row": lambda z: z.roll(1, 0),
    "next plane": lambda z: square_field(42, plane=1),
    "next stream": lambda z: square_field(42, stream=3),
    "next seed": lambda z: square_field(43),
    "previous seed": lambda z: square_field(41),
    "negated seed": lambda z: square_field(-42),
    "next high word": lambda z: square_field(42 + 2**32),
    "sign bit": lambda z: square_field(42 - 2**63),
}


@pytest.mark.parametrize("other", OTHER_FIELDS.values(), ids=OTHER_FIELDS)
def test_fields_and_neighbours_are_uncorrelated(other, field):
    second = other(field)
    assert (second != field).double().mean() > 0.999
    assert_expected((field * second).mean(), 0, math.sqrt(1 / SAMPLES))
    assert_expected(((field**2 - 1) * (second**2 - 1)).mean(), 0, math.sqrt(4 / SAMPLES))


def test_lanes_of_one_counter_are_uncorrelated(field):
    """Columns 0, 1, 8, 9 of a group of 16 come from one draw of four words."""
    groups = field.reshape(SIDE, SIDE // 16, 16)
    lanes = torch.stack([groups[:, :, n].flatten() for n in (0, 1, 8, 9)])
    for samples in (lanes, (lanes**2 - 1) / math.sqrt(2)):
        correlation = samples @ samples.T / samples.shape[1]
        assert (correlation - torch.eye(4)).triu(1).abs().max() < SIGMAS / math.sqrt(samples.shape[1])
