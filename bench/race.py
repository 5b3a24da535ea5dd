"""Who may be timed, and how: the gate in front of the race, turns that interleave, and medians with their spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Any]
Turn = Callable[[], float]
"""One turn of a contender: seconds per step."""

ROUNDING = 1e-10
"""Truth is fp64: a tensor this small beside the largest one is zero in theory."""

LEAST_TURN = 5e-3
"""A turn on the CPU repeats short steps until it lasts this long, in seconds."""

# ---- The gate --------------------------------------------------------------------------------------------------------


class WrongResultError(Exception):
    """What a contender computes is not what the reference computes."""


def distance(given: Tensor, truth: Tensor) -> float:
    """Of two tensors with as many elements, relative to the second's norm; infinite where the first is not finite.

    By norm: a value on the edge between two quantization steps may go either way.
    """
    if given.numel() != truth.numel():
        return float("inf")
    given, truth = given.detach().double().cpu().flatten(), truth.detach().double().cpu().flatten()
    off = ((given - truth).norm() / truth.norm().clamp_min(1e-30)).item()
    return off if off == off else float("inf")


def disagreements(given: Mapping[str, Tensor], truth: Mapping[str, Tensor], tolerance: float) -> dict[str, str]:
    """What differs by more than ``tolerance``, by name.

    Names that only one of the two has are not compared, nor gradients that are zero but for rounding (of the bias of an
    attention's keys): of those only rounding could differ.
    """
    sizes = {name: value.double().norm().item() for name, value in truth.items()}
    least = ROUNDING * max(sizes.values(), default=0.0)
    found = {name: distance(given[name], truth[name]) for name in truth if name in given and sizes[name] >= least}
    return {name: f"{name} off by {off:.1%}" for name, off in found.items() if off > tolerance}


@dataclass
class Gate:
    """What the gate says of a contender: :class:`WrongResultError` for a wrong result, unless the defect is known of it."""

    known: frozenset[str] = frozenset()
    defects: list[str] = field(default_factory=list)

    def refuse(self, found: Mapping[str, str]) -> None:
        wrong = [text for name, text in found.items() if name.rpartition(".")[2] not in self.known]
        if wrong:
            raise WrongResultError("; ".join(wrong))
        self.defects += found.values()


# ---- The race --------------------------------------------------------------------------------------------------------


def host_turn(step: Step, clock: Callable[[], float] = time.perf_counter) -> Turn:
    """Time by ``clock`` of ``step``, which does not return before its work is done."""
    step()
    start = clock()
    step()
    repeats = max(1, round(LEAST_TURN / max(clock() - start, 1e-9)))

    def turn() -> float:
        start = clock()
        for _ in range(repeats):
            step()
        return (clock() - start) / repeats

    return turn


def returning_turn(step: Step, repeats: int = 20) -> Turn:
    """Time until ``step`` returns, whose work on the GPU may still be going on; so few repeats do not fill its queue."""
    for _ in range(3):
        step()

    def turn() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        taken = time.perf_counter() - start
        torch.cuda.synchronize()
        return taken / repeats

    return turn


def waiting_turn(step: Step, repeats: int = 3) -> Turn:
    """Wall-clock time of ``step`` where the GPU's work is waited for at the end of the turn."""

    def turn() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    return turn


def event_turn(step: Step, repeats: int = 5) -> Turn:
    """Time between CUDA events around whole iterations: what a user sees, host overhead included."""
    for _ in range(3):
        step()

    def turn() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    return turn


def device_seconds(step: Step, repeats: int = 10) -> float:
    """The GPU's own time of ``step``: its queue is filled behind a pause in which the host gets ahead."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # in clocks: some 0.1 s
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def kernel_turn(step: Step) -> Turn:
    """Triton's ``do_bench``: the L2 cache is emptied before each call."""
    from triton.testing import do_bench

    return lambda: do_bench(step, warmup=5, rep=15, return_mode="median") / 1e3


def take_turns(turns: Mapping[str, Turn], seconds: float, least: int = 5, most: int = 30) -> dict[str, list[float]]:
    """A B A B: one turn of each contender in each round, so that whatever slows the machine down slows all of them.

    At least ``least`` rounds, then as many as fit into ``seconds``, at most ``most``. The first round only warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in turns}
    start = time.perf_counter()
    for i in range(most + 1):
        if i > least and time.perf_counter() - start > seconds:
            break
        for name, turn in turns.items():
            times[name].append(turn())
    return {name: all_of_them[1:] for name, all_of_them in times.items()}


def spread(values: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values * 3
    first, _, third = quantiles(values, n=4, method="inclusive")
    return [first, median(values), third]


def ratios(times: Mapping[str, list[float]], name: str) -> dict[str, list[float]]:
    """The time of ``name`` as a multiple of every other's, round by round: quartiles of the quotients."""
    return {
        other: spread([a / b for a, b in zip(times[name], theirs, strict=True)])
        for other, theirs in times.items()
        if other != name
    }
