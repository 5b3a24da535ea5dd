"""A metric of a model on many chips and after many times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from math import isfinite, nan, prod
from numbers import Integral, Real
from statistics import stdev
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from triton_analog.inference.chip import Chip, ReadNoise, check_programmable, program
from triton_analog.inference.compensation import Compensation
from triton_analog.inference.noise_model import DAY, NoiseModel
from triton_analog.tables import to_json

HOUR, YEAR = 3600.0, 365 * DAY
Metric = Callable[[Any], Any]


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found."""

    metric: str
    """Name of the metric."""
    noise_model: str
    """The noise model, with its fields."""
    ideal: float
    """The metric of the model itself, without a chip."""
    times: tuple[float, ...]
    """Seconds since the end of programming."""
    seeds: tuple[int, ...]
    """Of the chips."""
    values: tuple[tuple[float, ...], ...]
    """The metric of each chip (first index) after each time."""

    @property
    def means(self) -> tuple[float, ...]:
        """Over the chips, after each time; infinite or NaN where a chip's metric is."""
        return tuple(sum(values) / len(values) for values in zip(*self.values, strict=True))

    @property
    def deviations(self) -> tuple[float, ...]:
        """From chip to chip, after each time (unbiased; 0 for one chip); NaN where a chip's metric is not finite."""
        return tuple(map(_deviation, zip(*self.values, strict=True)))

    def to_json(self) -> str:
        """Everything, with means and deviations, as JSON; null where a number is infinite or NaN, which JSON does not know."""
        return to_json(asdict(self) | {"means": self.means, "deviations": self.deviations})

    def __str__(self) -> str:
        """A table: mean and deviation over the chips after each time."""
        head = f"{self.metric} on {len(self.seeds)} chip{'s' * (len(self.seeds) != 1)}"
        rows = [("without a chip", f"{self.ideal:.4g}", "")]
        found = zip(self.times, self.means, self.deviations, strict=True)
        rows += [(f"after {duration(time)}", f"{mean:.4g}", f"+- {deviation:.2g}") for time, mean, deviation in found]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}} {c:<{widths[2]}}".rstrip() for a, b, c in rows]
        return "\n".join([head, *lines])

    def plot(self, path: Any) -> None:
        """Save a picture: mean, deviation and every chip over time, beside the model without a chip.

        Needs matplotlib, ``pip install 'triton-analog[bench]'``.
        """
        from matplotlib.figure import Figure

        axes = (figure := Figure(figsize=(5, 3.5), layout="constrained")).subplots()
        at = [max(time, 1.0) for time in self.times]
        axes.axhline(self.ideal, color="gray", linestyle="--", label="without a chip")
        for values in self.values:
            axes.plot(at, values, color="C0", alpha=0.2, linewidth=0.8)
        # A mean without a deviation, which NaN is, keeps its point.
        spread = [deviation if isfinite(deviation) else 0.0 for deviation in self.deviations]
        axes.errorbar(at, self.means, spread, color="C0", marker="o", capsize=3, label="mean of the chips")
        axes.set_xscale("log")
        axes.set_xticks(at, [duration(time) for time in self.times])
        axes.set_xlabel("time since programming")
        axes.set_ylabel(self.metric)
        axes.legend()
        figure.savefig(path, dpi=150)


def _deviation(values: tuple[float, ...]) -> float:
    if len(values) < 2:
        return 0.0
    return stdev(values) if all(map(isfinite, values)) else nan


def evaluate(
    model: nn.Module,
    metric: Metric,
    *,
    noise_model: NoiseModel,
    times: Sequence[float] = (1.0, HOUR, DAY, YEAR),
    seeds: int | Sequence[int] = 10,
    compensation: Compensation = "global",
    per_channel: bool = True,
    read_noise: ReadNoise = "time",
    verbose: bool = True,
) -> Evaluation:
    """Program chip after chip with ``model``, let time pass, and take ``metric`` of each.

    Args:
        model: With analog layers; it is left as it is. It is in evaluation mode while its own metric is taken.
        metric: A function of a model that gives one number, also as a tensor or an array: accuracy, loss, perplexity.
        noise_model: Of the devices.
        times: Seconds since the end of programming.
        seeds: Of the chips, or their number.
        compensation, per_channel, read_noise: As :func:`program` takes them. Where forwards draw noise of their own,
            ``torch.manual_seed`` before the call makes it the same again.
        verbose: Show a progress bar, if tqdm is installed (``pip install 'triton-analog[calibration]'``).

    Raises:
        TypeError: ``metric`` gives no number, or an argument is something else.
        ValueError: ``model`` has no analog layers, or a time is not one that ``noise_model`` knows, or there twice. All before
            anything runs.
    """
    chosen = _seeds(seeds)
    if isinstance(times, str) or not isinstance(times, Iterable):
        raise TypeError(f"times: got {times!r}; several numbers of seconds are needed, such as (1.0, 3600.0)")
    times = tuple(times)
    if not times:
        raise ValueError("times: none given; seconds since the end of programming are needed")
    if not callable(metric):
        raise TypeError(f"metric: got {type(metric).__name__}; a function of a model that gives a number is needed")
    check_programmable(model, noise_model, chosen[0], compensation, per_channel, read_noise)
    for time in times:
        noise_model.check_time(time)
    if len(set(times)) < len(times):
        raise ValueError(f"times: got {times}; each must be another, as equal times are the same reading")
    ideal = _ideal(model, metric)
    values: list[tuple[float, ...]] = []
    with _progress(len(chosen) * len(times), verbose) as bar:
        for seed in chosen:
            chip = program(
                model, noise_model, seed, compensation=compensation, per_channel=per_channel, read_noise=read_noise
            )
            found = []
            try:
                for time in times:
                    found.append(_number(metric, chip.drift_to(time)))
                    bar.update()
            finally:
                chip.release()  # before the next one is made: only one at a time
            values.append(tuple(found))
    name = getattr(metric, "__name__", type(metric).__name__)
    return Evaluation(name, repr(noise_model), ideal, tuple(map(float, times)), chosen, tuple(values))


def _seeds(seeds: Any) -> tuple[int, ...]:
    """The seeds of so many chips, or those that were given.

    Raises:
        ValueError: something else, none, or one of them twice.
    """
    given = range(seeds) if isinstance(seeds, Integral) and not isinstance(seeds, bool) else seeds
    chosen = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
    if not chosen or not all(isinstance(seed, Integral) and not isinstance(seed, bool) for seed in chosen):
        raise ValueError(f"seeds: got {seeds!r}; a number of chips >= 1, or their seeds, are needed")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds: got {seeds!r}; each must be another, as equal seeds are the same chip")
    return tuple(map(int, chosen))


def _progress(steps: int, shown: bool) -> Any:
    """A progress bar, or where there is none to show what takes its calls."""
    if shown:
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            return tqdm(total=steps, desc="evaluating chips", unit="reading")
    return nullcontext(SimpleNamespace(update=lambda: None))


def duration(seconds: float) -> str:
    """A time as one would say it: ``1 s``, ``2 days``."""
    for unit, name in ((YEAR, "year"), (DAY, "day"), (HOUR, "hour")):
        if seconds >= unit:
            count = f"{seconds / unit:.3g}"
            return f"{count} {name}{'s' * (count != '1')}"
    return f"{seconds:.3g} s"


def _ideal(model: nn.Module, metric: Metric) -> float:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _number(metric, model)
    finally:
        for module, mode in modes:
            module.training = mode


def _number(metric: Metric, model: Chip | nn.Module) -> float:
    with torch.no_grad():
        found = metric(model)
    if isinstance(found, (Tensor, np.ndarray)) and prod(found.shape) == 1:
        found = found.item()
    if isinstance(found, bool) or not isinstance(found, Real):
        raise TypeError(f"metric: it gave {found!r}; one number is needed, such as an accuracy")
    return float(found)
