"""Devices hold what AIHWKIT's noise models of the same name say: moments of more than a million devices per conductance."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from helpers import seed_of
from torch import Tensor

from triton_analog import inference, ops

SIDE = 1024
ERRORS = 5
"""A moment may be this many standard errors from AIHWKIT's."""
DAY = 86400.0
DRIFT = {"g_lst": [0.0, 10.0, 25.0], "nu_mean_lst": [0.08, 0.05, 0.04], "nu_std_lst": [0.02, 0.01, 0.015]}

TWINS = {
    "PCMLikeNoiseModel": {},
    "PCMLikeNoiseModel, other scales": {
        "g_max": 30.0, "prog_noise_scale": 0.5, "read_noise_scale": 2.0, "drift_scale": 1.5, "t_0": 10.0, "t_read": 1e-6,
    },
    "CustomDriftPCMLikeNoiseModel": DRIFT,
    "HermesNoiseModel": {},
    "HermesNoiseModel, one device": {"num_devices": 1},
    "StateIndependentNoiseModel": {},
    "ReRamWan2022NoiseModel": {},
    "ReRamCMONoiseModel": {},
    "ReRamCMONoiseModel, coarse": {"acceptance_range": 2},
}  # fmt: skip


def ours(name: str, arguments: dict) -> inference.NoiseModel:
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    return getattr(inference, name.partition(",")[0])(**given)


def theirs(aihwkit, name: str, arguments: dict):
    name = name.partition(",")[0]
    modules = [import_module(f"aihwkit.inference.noise.{module}") for module in ("pcm", "reram", "custom", "hermes")]
    kind = next(getattr(module, name) for module in modules if hasattr(module, name))
    if name == "CustomDriftPCMLikeNoiseModel":
        return kind(arguments)
    return kind(**arguments)


def conductances(model: inference.NoiseModel, r: float, time: float | None) -> Tensor:
    """Of the devices of more than a million cells that hold the weight ``r``: the difference of a pair, or the single one."""
    w = torch.full((SIDE, SIDE), 2 * r - 1 if model.CELL == "single" else r)
    out = ops.program(w, torch.ones(1, SIDE), seed_of(11), **model.at(time)).double()
    if model.CELL == "single":
        return (out + 1) / 2 * (model.g_max - model.g_min) + model.g_min
    return out * (model.g_max - model.g_min)


def expected(model, kind: inference.NoiseModel, r: float, time: float | None) -> Tensor:
    def holds(g: float) -> Tensor:
        target = torch.full((SIDE * SIDE,), g)
        now = model.apply_programming_noise_to_conductance(target.clone())
        if time is not None:
            now = model.apply_drift_noise_to_conductance(now, model.generate_drift_coefficients(target), time)
        return now.double()

    g = kind.g_min + r * (kind.g_max - kind.g_min)
    return holds(g) if kind.CELL == "single" else holds(g) - holds(kind.g_min)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("time", [None, DAY], ids=["programmed", "after a day"])
@pytest.mark.parametrize("r", [0.0, 0.03, 0.4, 1.0])
@pytest.mark.parametrize("name", TWINS)
def test_moments_are_those_of_aihwkit(name, r, time, aihwkit):
    kind = ours(name, TWINS[name])
    found, wanted = conductances(kind, r, time), expected(theirs(aihwkit, name, TWINS[name]), kind, r, time)
    n = found.numel()
    off = found.mean() - wanted.mean()
    assert abs(off) <= ERRORS * math.sqrt((found.var() + wanted.var()) / n)
    spreads = [((x - x.mean()) ** 2) for x in (found, wanted)]
    error = math.sqrt(sum(float(s.var()) for s in spreads) / n)
    assert abs(spreads[0].mean() - spreads[1].mean()) <= ERRORS * error


# ---- Models without a twin ------------------------------------------------------------------------------------------


def test_a_device_of_ones_own_is_a_few_polynomials():
    kind = inference.PolynomialNoiseModel(
        g_max=40.0, prog_coeff=(0.5, 1.0), drift_mean_coeff=(0.05,), drift_std_coeff=(), read_coeff=(0.01,)
    )
    programmed = conductances(kind, 0.5, None)
    assert programmed.std() == pytest.approx(math.hypot(1.0, 0.5 * math.sqrt(0.5 - 0.5 / math.pi)), rel=5e-3)
    drifted = conductances(kind, 1.0, DAY)
    minus = 0.5 / math.sqrt(2 * math.pi)  # the mean of what a device at 0 holds
    assert drifted.mean() == pytest.approx((40 - minus) * (DAY / 20 + 1) ** -0.05, rel=1e-3)


@pytest.mark.parametrize("g", [0.5, 20.0, 100.0, 180.0])
def test_the_published_polynomial_of_a_chip(g):
    kind = inference.AnalogFoundationNoiseModel()
    low = 2.940e-5 * g**3 - 3.716e-3 * g**2 + 0.22420 * g + 2.5797
    high = 1.2330e-5 * g**3 - 3.0550e-3 * g**2 + 0.24535 * g + 2.1103
    wanted = 0.0 if g < 0.6 else low if g <= 52.5 else high
    assert conductances(kind, g / 180, DAY).std() == pytest.approx(wanted, rel=5e-3)


def test_noise_of_a_share_of_the_largest_weight():
    assert conductances(inference.AdditivePerChannelNoiseModel(std=0.05), -0.3, DAY).std() == pytest.approx(
        1.25, rel=5e-3
    )


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.0), (0.0, 0.2), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_the_stated_share_of_devices_is_stuck(low, high):
    kind = inference.PolynomialNoiseModel(prog_coeff=(1e-3,), stuck_at_min=low, stuck_at_max=high)
    found = conductances(kind, 0.4, DAY)  # the other device of each pair is stuck as often, from 0
    for at, wanted in ((0.0, low * (1 - high) + high * high), (25.0, high * (1 - high))):
        share = ((found - at).abs() < 0.02).double().mean()
        assert share == pytest.approx(wanted, abs=ERRORS * math.sqrt(0.25 / found.numel()))


NEGATIVE = [
    (inference.PCMLikeNoiseModel, {"prog_coeff": (0.1, -1.0)}, r"programming_std: is -0\.9 at 25 uS"),
    (inference.PolynomialNoiseModel, {"prog_coeff": (1.0,), "drift_std_coeff": (0.1, -0.4)}, r"drift_std: is -0\.3"),
    (inference.PolynomialNoiseModel, {"prog_coeff": (1.0,), "read_coeff": (math.nan,)}, "read_factor: is nan"),
    (inference.PCMLikeNoiseModel, {"g_max": -1.0}, r"g_max: got -1\.0"),
    (inference.PCMLikeNoiseModel, {"g_min": 25.0}, r"g_min: got 25\.0; it must be below g_max"),
    (inference.PCMLikeNoiseModel, {"t_0": 0.0}, r"t_0: got 0\.0"),
    (inference.PCMLikeNoiseModel, {"drift_scale": math.inf}, "drift_scale: got inf"),
    (inference.PCMLikeNoiseModel, {"f_lst": ()}, "f_lst: got"),
    (inference.PCMLikeNoiseModel, {"f_lst": 1.0}, r"f_lst: got 1\.0; several numbers"),
    (inference.PolynomialNoiseModel, {"prog_coeff": 0.2}, r"prog_coeff: got 0\.2; several numbers"),
    (inference.ReRamCMONoiseModel, {"f_lst": (1.0, 2.0)}, "has one device a cell"),
    (inference.PCMLikeNoiseModel, {"stuck_at_min": 0.6, "stuck_at_max": 0.6}, "more than 1"),
    (inference.HermesNoiseModel, {"num_devices": 3}, "num_devices: got 3; allowed are 1 and 2"),
    (inference.HermesNoiseModel, {"g_max": 30.0}, r"measured up to 20\.7"),
    (inference.ReRamCMONoiseModel, {"acceptance_range": 1}, "allowed are 0.2 and 2"),
    (inference.CustomDriftPCMLikeNoiseModel, DRIFT | {"g_lst": (0.0, 10.0, 20.0)}, "g_lst: .* must span"),
    (inference.CustomDriftPCMLikeNoiseModel, DRIFT | {"g_lst": (10.0, 0.0, 25.0)}, "g_lst: .* ascending"),
    (inference.CustomDriftPCMLikeNoiseModel, DRIFT | {"nu_mean_lst": (0.1,)}, "nu_mean_lst: .* as many numbers"),
    (inference.CustomDriftPCMLikeNoiseModel, DRIFT | {"nu_std_lst": (0.1, -0.1, 0.1)}, "drift_std: is -0"),
    (inference.PolynomialNoiseModel, {"prog_coeff": (math.inf,)}, "programming_std: is (inf|nan) at"),
    (
        inference.PolynomialNoiseModel,
        {"prog_coeff": (0.1,), "drift_mean_coeff": (math.nan,)},
        "drift_mean: is not finite",
    ),
    (inference.CustomDriftPCMLikeNoiseModel, DRIFT | {"nu_mean_lst": (0.1, math.nan, 0.1)}, "drift_mean: is not"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), NEGATIVE, ids=[message for *_, message in NEGATIVE])
def test_a_device_that_cannot_be_is_refused_by_name(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@pytest.mark.parametrize("given", [1.0, torch.ones(3)], ids=["number", "shape"])
def test_a_law_that_gives_no_curve_is_refused_by_name(given):
    class Own(inference.PCMLikeNoiseModel):
        def drift_mean(self, r):
            return given

    with pytest.raises(
        TypeError, match=r"Own.drift_mean: gave (float|shape \(3,\)); a tensor of the shape of r is needed"
    ):
        Own()
