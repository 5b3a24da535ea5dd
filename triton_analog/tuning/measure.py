"""The fastest configuration for a problem, found by running them."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache
from statistics import median, quantiles
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.testing import do_bench_cudagraph

from triton_analog.launch import backend
from triton_analog.launch.fingerprint import code_hash, space_hash
from triton_analog.launch.space import Config, Problem, Space, as_values, forced
from triton_analog.launch.store import Entry
from triton_analog.tuning.cases import Call, call_of
from triton_analog.tuning.compiling import worth_timing
from triton_analog.tuning.inspect import TARGETS
from triton_analog.tuning.processes import Processes

FINALISTS = 3
ROUNDS = 5
"""In which the finalists and the formula's configuration take turns."""
WORTH_IT = 1.02
"""Times the formula's configuration has to be slower to be replaced: less is within the noise of a timing."""
TOLERANCE = 1e-2
"""Share of the norm of a result, or of its integers: a value at the edge between two steps may go either way."""


class NothingRuns(RuntimeError):
    """No configuration of a problem ran and agreed with the reference."""


def tensors(result: Any) -> list[Tensor]:
    """What an operation returned, flat."""
    return [result] if isinstance(result, Tensor) else [t for t in result if t.numel() > 0]


def agrees(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether a configuration computes what the reference does, up to roundings that are decided the other way."""
    if [(t.shape, t.dtype) for t in actual] != [(t.shape, t.dtype) for t in expected]:
        return False
    for a, b in zip(actual, expected, strict=True):
        if not b.is_floating_point():
            if (a != b).double().mean() > TOLERANCE:
                return False
        elif not (a.double() - b.double()).norm() <= TOLERANCE * b.double().norm():  # NaN does not
            return False
    return True


def microseconds(call: Call, device: torch.device) -> list[float]:
    """Times of a call. On a GPU out of a CUDA graph, so that the host does not count."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return [1e3 * ms for ms in do_bench_cudagraph(call, rep=10, return_mode="all")]
    times = []
    for _ in range(2):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return times


@contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """Operands that are the same each time, and the user's generators left as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


@cache
def _nvidia_driver() -> str:
    """Its version; it comes with the tool that tells."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _machine(problem: Problem, device: torch.device) -> dict[str, str | int]:
    if device.type != "cuda":
        return {"processor": platform.processor() or platform.machine()}
    facts: dict[str, str | int] = {
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        "runtime": str(torch.version.cuda or torch.version.hip),
    }
    if problem.hardware.capability:
        facts["driver"] = _nvidia_driver()
        facts["ptxas"] = get_ptxas_version(problem.hardware.capability).split()[-1]
    return facts


def source(space: Space[Any], problem: Problem, device: torch.device) -> dict[str, str | int]:
    """What an entry was measured with."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "triton": triton.__version__,
        "torch": torch.__version__,
        **_machine(problem, device),
        "code": code_hash(space),
        "space": space_hash(space),
    }


def _runs(space: Space[Config], config: Config, call: Call, expected: Sequence[Tensor]) -> bool:
    """Whether a configuration starts and agrees with the reference."""
    try:
        with forced(space, config), backend("kernel"):
            return agrees(tensors(call()), expected)
    except Exception:  # whatever the compiler or the driver raises, this one cannot run here
        return False


def neighbours(space: Space[Config], problem: Problem, config: Config) -> list[Config]:
    """The candidates that differ from ``config`` in one field, and in the number of warps besides: a tile of another size
    may want another."""
    values = as_values(config)

    def is_near(other: Config) -> bool:
        others = as_values(other)
        return sum(others[name] != values[name] for name in values.keys() - {"num_warps"}) <= 1

    return [other for other in space.candidates(problem) if is_near(other)]


def _search(
    space: Space[Config], problem: Problem, time: Callable[[Sequence[Config]], dict[Config, float]]
) -> dict[Config, float]:
    """Times of configurations on the way from the formula's to one that is faster than all its neighbours.

    A few dozen instead of the thousand of a product's space.
    """
    best = space.formula(problem)
    tried: set[Config] = set()
    times: dict[Config, float] = {}
    while True:
        new = [config for config in neighbours(space, problem, best) if config not in tried]
        tried.update(new)
        times |= time(new)
        fastest = min(times, key=times.__getitem__, default=best)
        if fastest == best or not new:
            return times
        best = fastest


def tune(
    space: Space[Config],
    problem: Problem,
    device: torch.device,
    candidates: Sequence[Config] | None = None,
    processes: Processes | None = None,
) -> Entry:
    """Check candidates by the reference, time them, and let the best take turns with the formula's configuration.

    Args:
        candidates: All to try; None searches from the formula's configuration to ever faster :func:`neighbours`.
        processes: To compile candidates in, all of a round at once; those that spill more than the formula's or do not fit
            are not timed. None compiles each when it is run.

    Raises:
        NothingRuns: No candidate ran and agreed with the reference.
        torch.OutOfMemoryError: The operands do not fit.
    """
    formula = space.formula(problem)
    with _own_random_numbers(device):
        call = call_of(space, problem, device)
    with backend("reference"), torch.autocast(device.type, enabled=False):  # which would round its products
        expected = tensors(call())
    given = 0

    def times(config: Config) -> list[float]:
        with forced(space, config), backend("kernel"):
            return microseconds(call, device)

    def time_each(configs: Sequence[Config]) -> dict[Config, float]:
        nonlocal given
        given += len(configs)
        if processes is not None and problem.hardware.target in TARGETS:
            configs = worth_timing(space, problem, configs, processes)
        return {config: median(times(config)) for config in configs if _runs(space, config, call, expected)}

    ranked = _search(space, problem, time_each) if candidates is None else time_each(candidates)
    if not ranked:
        raise NothingRuns(
            f"{space.op}, {space.key(problem)}: none of {given} configurations ran and agreed with the reference"
        )
    finalists = sorted(ranked, key=ranked.__getitem__)[:FINALISTS]
    if formula not in finalists and formula in ranked:
        finalists.append(formula)
    taken: list[list[float]] = [[] for _ in finalists]
    for _ in range(ROUNDS):
        for config, own in zip(finalists, taken, strict=True):
            own += times(config)
    medians = [median(own) for own in taken]
    best = min(range(len(finalists)), key=medians.__getitem__)
    base = finalists.index(formula) if formula in finalists else best
    if medians[base] < WORTH_IT * medians[best]:
        best = base
    first, _, third = quantiles(taken[best], n=4)
    return Entry(
        space.key(problem), as_values(finalists[best]), "measured", medians[best], medians[base],
        (third - first) / medians[best], source(space, problem, device),
    )  # fmt: skip
