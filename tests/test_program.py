"""SEMANTICS 10: what devices hold after programming and after a time, in the units of the weight."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import all_dtypes, all_views, needs_interpreter, randn, seed_of, viewed
from torch import Tensor

from triton_analog import launch, ops, reference
from triton_analog.reference.program import DEVICE_STREAM

ROWS, FEATURES, KNOTS = 21, 45, 9
AGED = {"log2_time": 3.0, "read": 4.0, "moment": 7}
MOVED = AGED | {"shift": -0.5, "spread": 0.25, "g_min": 1.0, "lowest": 1.0, "highest": 24.0}
STUCK = AGED | {"stuck_low": -1.0, "stuck_high": 1.5}
CELLS = [("pair", (1.0,)), ("pair", (1.0, 2.5)), ("single", (1.0,)), ("signed", (1.0,))]
every_cell = pytest.mark.parametrize(("cell", "significances"), CELLS, ids=["pair", "two pairs", "single", "signed"])


def curves(device: torch.device) -> Tensor:
    """Deviation of programming, mean and deviation of the exponent, read factor: each another line of sqrt(r)."""
    x = torch.linspace(0, 1, KNOTS)
    return torch.stack([0.5 + x, 0.1 - 0.05 * x, 0.02 + 0.01 * x, 0.05 - 0.03 * x], 1).to(device)


def operands(slices: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    w = randn(ROWS, FEATURES, device=device, dtype=dtype)
    return w, ops.absmax(w, slices)


def formula(weight: float, wmax: float, place: tuple[int, int], seed: Tensor, cell: str, significances, **at) -> float:
    """One cell, in Python's own numbers."""
    at = {"g_min": 0.0, "g_max": 25.0, "log2_time": 0.0, "read": 0.0, "shift": 0.0, "spread": 0.0, "lowest": 0.0,
          "highest": math.inf, "stuck_low": -math.inf, "stuck_high": math.inf, "moment": 0} | at  # fmt: skip
    table = curves(torch.device("cpu")).double()

    def law(column: int, g: float) -> float:
        x = math.sqrt(min(max(g / at["g_max"], 0.0), 1.5) / 1.5) * (KNOTS - 1)
        i = min(int(x), KNOTS - 2)
        return float(table[i, column] + (x - i) * (table[i + 1, column] - table[i, column]))

    def normal(device: int, kind: int, plane: int = 0) -> float:
        m, n = place
        return float(reference.noise(seed, m + 1, n + 1, stream=DEVICE_STREAM + 8 * device + kind, plane=plane)[m, n])

    def holds(device: int, g: float) -> float:
        def within(v: float) -> float:
            return min(max(v, at["lowest"]), at["highest"])

        held = now = max(g + law(0, g) * normal(device, 0), min(at["lowest"], 0.0))
        now *= 2 ** (-at["log2_time"] * abs(law(1, g) + law(2, g) * normal(device, 1)))
        now += at["shift"] + at["spread"] * normal(device, 2)
        now = within(now + abs(now) * law(3, held) * at["read"] * normal(device, 3, at["moment"]))
        z = normal(device, 4)
        return at["g_min"] if z < at["stuck_low"] else at["g_max"] if z > at["stuck_high"] else now

    span = at["g_max"] - at["g_min"]
    full = sum(significances) * span
    v = weight / wmax * full
    if cell == "signed":
        return math.copysign(holds(0, abs(v)), v) / full * wmax
    if cell == "single":
        return (2 * (holds(0, (v + full) / 2 + at["g_min"]) - at["g_min"]) - full) / full * wmax
    total, below = 0.0, 0.0
    for p, f in enumerate(significances):
        plus, minus = (min(max((max(side, 0.0) - below) / f, 0.0), span) + at["g_min"] for side in (v, -v))
        total += f * (holds(2 * p, plus) - holds(2 * p + 1, minus))
        below += f * span
    return total / full * wmax


@every_cell
@pytest.mark.parametrize("at", [{}, AGED, MOVED, STUCK], ids=["programmed", "aged", "moved", "stuck"])
def test_every_device_follows_the_laws(cell, significances, at, backend, device):
    w, wmax = operands(2, device)
    seed = seed_of(5, device)
    out = ops.program(w, wmax, seed, curves(device), cell=cell, significances=significances, **at)
    places = [(0, 0), (3, 22), (3, 23), (20, 44), (7, 30)]  # slices are 23 and 22 wide
    found = [float(out[place]) for place in places]
    wanted = [
        formula(float(w[m, n]), float(wmax[int(n >= 23), m]), (m, n), seed.cpu(), cell, significances, **at)
        for m, n in places
    ]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-4)


@all_dtypes
@every_cell
def test_without_noise_the_weight_is_what_it_was(cell, significances, dtype, backend, device):
    w, wmax = operands(3, device, dtype)
    out = ops.program(w, wmax, seed_of(1, device), curves(device) * 0, cell=cell, significances=significances)
    assert out.dtype == dtype
    torch.testing.assert_close(out, w)


@needs_interpreter
@every_cell
def test_kernel_and_reference_give_the_same_numbers(cell, significances):
    cpu = torch.device("cpu")
    w, wmax = operands(2, cpu)
    everything = MOVED | STUCK | {"cell": cell, "significances": significances}
    found = []
    for name in ("kernel", "reference"):
        with launch.backend(name):
            found.append(ops.program(w, wmax, seed_of(-3), curves(cpu), **everything))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@all_views
def test_any_memory_layout(view, backend, device):
    w, wmax = operands(2, device)
    arguments = seed_of(5, device), curves(device)
    plain = ops.program(w, wmax, *arguments, **AGED)
    torch.testing.assert_close(ops.program(viewed(w, view), wmax, *arguments, **AGED), plain, rtol=1e-6, atol=1e-6)


def test_a_part_of_a_weight_is_that_part_of_the_chip(backend, device):
    w, wmax = operands(1, device)
    arguments = seed_of(5, device), curves(device)
    whole = ops.program(w, wmax, *arguments, **AGED)
    part = ops.program(w[:5, :32], wmax[:, :5], *arguments, **AGED)
    torch.testing.assert_close(part, whole[:5, :32], rtol=1e-6, atol=1e-6)


def test_times_share_their_devices_and_not_their_readings(backend, device):
    w, wmax = operands(1, device)
    arguments = seed_of(5, device), curves(device)

    def at(log2_time: float, read: float, moment: int) -> Tensor:
        return ops.program(w, wmax, *arguments, log2_time=log2_time, read=read, moment=moment)

    assert torch.equal(at(2.0, 0.0, 1), at(2.0, 0.0, 2))
    assert torch.equal(at(2.0, 3.0, 1), at(2.0, 3.0, 1))
    assert not torch.equal(at(2.0, 3.0, 1), at(2.0, 3.0, 2))


def test_a_reading_with_a_seed_of_its_own_is_another_reading_of_the_same_devices(backend, device):
    w, wmax = operands(1, device)
    arguments = seed_of(5, device), curves(device)
    assert torch.equal(
        ops.program(w, wmax, *arguments, read_seed=seed_of(5, device), **AGED), ops.program(w, wmax, *arguments, **AGED)
    )
    one, other = (ops.program(w, wmax, *arguments, read_seed=seed_of(s, device), **AGED) for s in (6, 7))
    assert not torch.equal(one, other)
    still = AGED | {"read": 0.0}
    assert torch.equal(
        ops.program(w, wmax, *arguments, read_seed=seed_of(6, device), **still),
        ops.program(w, wmax, *arguments, **still),
    )


@pytest.mark.parametrize("columns", [1, ROWS])
def test_a_gain_multiplies_what_is_held(columns, backend, device):
    w, wmax = operands(2, device)
    arguments, gain = (seed_of(5, device), curves(device)), torch.rand(2, columns, device=device) + 0.5
    plain = ops.program(w, wmax, *arguments, **AGED)
    expected = torch.cat([plain[:, :23] * gain[0, :, None], plain[:, 23:] * gain[1, :, None]], 1)
    torch.testing.assert_close(ops.program(w, wmax, *arguments, gain=gain, **AGED), expected, rtol=1e-6, atol=1e-6)


def test_one_scale_for_a_slice(backend, device):
    w, wmax = operands(2, device)
    largest = wmax.amax(1, keepdim=True)
    arguments = seed_of(5, device), curves(device)
    expected = ops.program(w, largest.expand_as(wmax), *arguments, **AGED)
    torch.testing.assert_close(ops.program(w, largest, *arguments, **AGED), expected, rtol=1e-6, atol=1e-6)


def test_zero_and_nan(backend, device):
    w = torch.zeros(3, 40, device=device)
    w[1] = math.nan
    out = ops.program(w, w.abs().amax(1)[None], seed_of(5, device), curves(device), **AGED)
    assert not out[0].any()  # a column without weights has no scale
    assert out[1].isnan().all()


BAD = [
    ({"cell": "triple"}, "cell: got 'triple'"),
    ({"significances": ()}, "significances: got"),
    ({"significances": (1.0, -1.0)}, "significances: got"),
    ({"cell": "signed", "significances": (1.0, 2.0)}, "one alone unless cell is 'pair'"),
    ({"g_min": 25.0}, "g_min, g_max: got 25.0 and 25.0"),
    ({"log2_time": -1.0}, "log2_time: got -1.0"),
    ({"read": math.nan}, "read: got nan"),
    ({"spread": -0.1}, "spread: got -0.1"),
    ({"shift": math.inf}, "shift: got inf"),
    ({"lowest": 2.0, "highest": 1.0}, "lowest: got 2.0"),
    ({"stuck_low": 1.0, "stuck_high": 0.0}, "stuck_low: got 1.0"),
    ({"moment": 2**31}, "moment: got 2147483648"),
    ({"curves": torch.zeros(1, 4)}, "curves: got torch.float32"),
    ({"curves": torch.zeros(8, 4).double()}, "curves: got torch.float64"),
    ({"wmax": torch.ones(2, 3)}, "wmax: got shape"),
    ({"gain": torch.ones(1, 1)}, "gain: got shape"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_what_makes_no_sense_is_refused_by_name(change, message):
    w, wmax = operands(2, torch.device("cpu"))
    given = {"wmax": wmax, "curves": curves(torch.device("cpu"))} | change
    with pytest.raises(ValueError, match=message):
        ops.program(w, given.pop("wmax"), seed_of(1), given.pop("curves"), **given)
