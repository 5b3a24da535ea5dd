"""Which configuration an operation runs in. Nothing is timed here, and a file is read once in a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from math import log2
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch

from triton_analog.launch import environment, plan, store
from triton_analog.launch.devices import hardware
from triton_analog.launch.fingerprint import is_stale
from triton_analog.launch.space import Problem, Space, forced_config
from triton_analog.launch.store import Entry, Key, Table
from triton_analog.launch.tape import untaped

Config = TypeVar("Config")
Level = Literal["exact", "nearest", "same architecture", "formula"]

REACH = 2.0
"""Powers of two that all sizes together may lie off: an entry for 4096 rows serves 1024 to 16384."""


@dataclass(frozen=True)
class Choice(Generic[Config]):
    """A configuration, and why it was chosen."""

    config: Config
    level: Level
    entry: Entry | None = None
    path: Path | None = None


def distance(first: Key, second: Key) -> float:
    """How far the sizes are apart, in powers of two; infinite where anything else differs."""
    sizes = dict(second.sizes)
    if (first.dtype, first.flags) != (second.dtype, second.flags) or {name for name, _ in first.sizes} != set(sizes):
        return float("inf")
    return sum(abs(log2(max(size, 1) / max(sizes[name], 1))) for name, size in first.sizes)


@cache
def tables(op: str) -> tuple[tuple[Path, Table], ...]:
    """Every tuning file of an operation, of all devices, in search order."""
    found = []
    for directory in store.search_path(environment.tuning_directory()):
        for path in sorted(directory.glob(f"*/{op}.json")):
            table = store.read(path)
            if table is not None and table.op == op:
                found.append((path, table))
    return tuple(found)


def _usable(space: Space[Config], problem: Problem) -> Iterator[tuple[Level, float, int, Choice[Config]]]:
    """Every entry within reach, with what orders them: the level, then the distance, then whether it was measured."""
    key, strict = space.key(problem), environment.strict_tuning()
    for path, table in tables(space.op):
        same_device = table.device == problem.hardware.name
        if not same_device and table.target != problem.hardware.target:
            continue
        for entry in table.entries:
            apart = distance(key, entry.key)
            if apart > REACH or (strict and is_stale(space, entry)):
                continue
            config = space.accepts(problem, entry.config)
            if config is not None:
                level: Level = "same architecture" if not same_device else "exact" if apart == 0 else "nearest"
                yield level, apart, entry.origin == "model", Choice(config, level, entry, path)


_ORDER = {"exact": 0, "nearest": 1, "same architecture": 2}


def explain(space: Space[Config], problem: Problem) -> Choice[Config]:
    """The configuration for a problem: an entry of this device, of a similar problem on it, of a device of the same
    architecture, or the formula's. Among equals the search order decides."""
    found = sorted(_usable(space, problem), key=lambda one: (_ORDER[one[0]], one[1], one[2]))
    return found[0][-1] if found else Choice(space.formula(problem), "formula")


class FirstUse(NamedTuple):
    """Tuning on first use. It runs the operations, so it stands above them and hands itself to :func:`tune_by`."""

    can_tune: Callable[[], bool]
    """Whether something may be timed now."""
    settle: Callable[[Space[Any], Problem, torch.device, Any, bool], Any]
    """The configuration for a problem on a device, given the one that was found and whether that one was measured."""


_first_use: FirstUse | None = None


def tune_by(first_use: FirstUse) -> None:
    """Let ``first_use`` find configurations where the user asks for it (``TRITON_ANALOG_AUTOTUNE=1``)."""
    global _first_use
    _first_use = first_use


@lru_cache(maxsize=4096)
def _choose(space: Space[Config], problem: Problem, device: torch.device | None) -> Config:
    choice = explain(space, problem)
    if device is None:
        return choice.config
    assert _first_use is not None
    measured = choice.level == "exact" and choice.entry is not None and choice.entry.origin == "measured"
    with untaped():
        return _first_use.settle(space, problem, device, choice.config, measured)


@cache
def _autotune() -> bool:
    return environment.autotune()


def _device_to_tune_on(device: torch.device) -> torch.device | None:
    return device if _autotune() and _first_use is not None and _first_use.can_tune() else None


def choose(
    space: Space[Config], device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], flags: tuple[bool, ...] = ()
) -> Config:
    """The configuration to launch with. Cached: about a microsecond."""
    config = forced_config(space)
    if config is None:
        config = _choose(space, Problem(hardware(device), dtype, sizes, flags), _device_to_tune_on(device))
    return config


def forget() -> None:
    """Read files and environment again at the next lookup, and use what is found."""
    plan.forget()
    tables.cache_clear()
    _choose.cache_clear()
    _autotune.cache_clear()
