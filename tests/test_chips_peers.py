"""Accuracy on simulated chips over time: the digits network here, and the same tiles programmed and aged by AIHWKIT."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from triton_analog import export_to_aihwkit
from triton_analog.inference import PCMLikeNoiseModel, evaluate

sys.path.append(str(Path(__file__).parent.parent / "examples"))

CHIPS = 50
TIMES = (1.0, 86400.0, 365 * 86400.0)
ERRORS = 4
"""A mean over the chips, and the logarithm of their variance, may be this many standard errors from AIHWKIT's."""


@pytest.fixture(scope="module")
def digits() -> Iterator[Any]:
    """The network of the example on tiles of 32 inputs with 8-bit converters, and its accuracy as a metric."""
    import digits as example

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are small, and the network is the same one on every machine
    torch.manual_seed(0)
    data = example.load_data()
    trained, optimizer = example.plain()
    example.train((trained, optimizer), data, 150, SimpleNamespace(update=lambda: None))
    model = example.map_to_tiles(trained, data).eval()

    def accuracy(one: Any) -> Tensor:
        return (one(data.test_x).argmax(1) == data.test_y).float().mean() * 100

    yield SimpleNamespace(model=model, accuracy=accuracy)
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compensation", ["global", "none"])
def test_accuracy_over_time_is_that_of_aihwkits_simulation(compensation, digits, aihwkit):
    ours = evaluate(
        digits.model, digits.accuracy, noise_model=PCMLikeNoiseModel(), times=TIMES, seeds=CHIPS, verbose=False,
        compensation=compensation, per_channel=False,  # one scale for a tile, as its export has
    )  # fmt: skip
    chip, values = export_to_aihwkit(digits.model).eval(), []
    for tile in chip.analog_tiles():
        if compensation == "none":
            tile.rpu_config.drift_compensation = None
    with torch.no_grad():
        for _ in range(CHIPS):
            chip.program_analog_weights()
            values.append([])
            for time in TIMES:
                chip.drift_analog_weights(time)
                values[-1].append(float(digits.accuracy(chip)))
    theirs = torch.tensor(values)
    assert digits.accuracy(digits.model) > 90
    for mean, deviation, other in zip(ours.means, ours.deviations, theirs.unbind(1), strict=True):
        error = math.hypot(deviation, float(other.std())) / math.sqrt(CHIPS)
        assert abs(mean - float(other.mean())) <= ERRORS * error, (ours.means, theirs.mean(0))
        spread = abs(2 * math.log(deviation / float(other.std())))
        assert spread <= ERRORS * math.sqrt(2 * 2 / (CHIPS - 1)), (ours.deviations, theirs.std(0))
    if compensation == "none":
        assert ours.means[-1] < ours.means[0] - 0.5  # a year is seen
