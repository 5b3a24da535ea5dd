"""What is written down of a race."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.peers.base import UnsupportedError
from bench.race import WrongResultError, ratios, spread

RESULTS = "results.json"


@dataclass
class Result:
    """One contender on one workload. Without a time its ``status`` says why: FAILED, absent, unsupported or not run."""

    suite: str
    group: str
    workload: str
    size: int
    contender: str
    status: str = "ok"
    detail: str = ""
    dtype: str = ""
    defects: list[str] = field(default_factory=list)
    """Wrong results that are known of this contender and did not keep it from being timed."""
    seconds: list[float] = field(default_factory=list)
    """First quartile, median, third quartile of a step."""
    rounds: int = 0
    ratios: dict[str, list[float]] = field(default_factory=dict)
    """Quartiles of this contender's time as a multiple of each other's, round by round."""
    gflop_s: float | None = None
    gb_s: float | None = None
    """Of the bytes that have to be moved, not of those that are."""
    intensity: float | None = None
    """FLOP per byte that has to be moved."""
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    predicted_peak_bytes: int | None = None
    """By the formulas of :mod:`bench.memory`, for forward and backward of a linear layer."""
    launches: int | None = None
    allocations: int | None = None
    python_calls: int | None = None
    """Calls of Python's functions in a step; ``c_calls`` are those of C's."""
    c_calls: int | None = None
    device_seconds: float | None = None
    """The GPU's own time of a step, where ``seconds`` are the host's."""
    first_seconds: float | None = None
    """Of the first step, compilation included."""


def failed(result: Result, error: Exception) -> Result:
    if isinstance(error, UnsupportedError):
        result.status, result.detail = "unsupported", str(error)
    elif isinstance(error, WrongResultError):
        result.status, result.detail = "FAILED", str(error)
    else:
        result.status, result.detail = "FAILED", f"{type(error).__name__}: {str(error).strip()[:400]}"
    return result


def fill_times(found: dict[str, Result], times: dict[str, list[float]]) -> None:
    for name, values in times.items():
        found[name].seconds, found[name].rounds = spread(values), len(values)
        found[name].ratios = ratios(times, name)
