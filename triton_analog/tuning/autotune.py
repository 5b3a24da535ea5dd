"""Tuning on first use: ``TRITON_ANALOG_AUTOTUNE=1``."""

from __future__ import annotations

import json
import sys
import threading
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from triton_analog.launch import Hardware, environment, store
from triton_analog.launch.space import Config, Problem, Space, as_values
from triton_analog.launch.store import Entry, Key, Table, TuningWarning
from triton_analog.tuning.measure import tune


def results_directory() -> Path:
    """Where results are kept: ``$TRITON_ANALOG_TUNING_DIR``, else the user's cache.

    Raises:
        OSError: there is neither.
    """
    return store.results_directory(environment.tuning_directory())


@cache
def _say_once(text: str) -> None:
    warnings.warn(text, TuningWarning, stacklevel=4)


def keep(space: Space[Any], problem: Problem, entry: Entry) -> None:
    """Add an entry to the user's files; a disk that is full or read-only costs the entry and nothing else."""
    hardware = problem.hardware
    try:
        directory = results_directory()
    except OSError as error:
        _say_once(f"tuned configurations are not kept: {error}")
        return
    try:
        store.add(directory, Table(space.op, hardware.name, hardware.target, (entry,)))
    except (OSError, ValueError) as error:
        warnings.warn(f"the tuned configuration of {space.op} was not kept: {error}", TuningWarning, stacklevel=2)


def _tune_and_keep(space: Space[Any], problem: Problem, device: torch.device) -> Entry | None:
    print(f"triton_analog: tuning {space.op} for {space.key(problem)}", file=sys.stderr)
    try:
        entry = tune(space, problem, device)
    except RuntimeError as error:  # nothing runs, no memory, no CUDA graph: the formula serves
        warnings.warn(f"{space.op} was not tuned: {error}", TuningWarning, stacklevel=2)
        return None
    keep(space, problem, entry)
    return entry


_one_at_a_time = threading.RLock()  # reentrant: an operation may look up another one's configuration
_found: dict[tuple[str, Hardware, Key], Entry | None] = {}
"""By this process, failures too: neither other numbers of rows with the same key nor a disk that keeps nothing tune again."""


def _tuned(space: Space[Config], problem: Problem, device: torch.device) -> Config | None:
    name = space.op, problem.hardware, space.key(problem)
    if name not in _found:
        _found[name] = _tune_and_keep(space, problem, device)
    entry = _found[name]
    return None if entry is None else space.accepts(problem, entry.config)


PATIENCE = timedelta(days=1)
"""With a rank that tunes, instead of the minutes that the job allows its collectives. If it dies, the launcher ends all."""


def _agreed(space: Space[Config], problem: Problem, find: Callable[[], Config]) -> Config | None:
    """What the first rank to get here finds: the others take it. None if it was interrupted.

    They wait for nothing but that rank's tuning, so ranks that do different work (pipelines) do not block each other.
    """
    board = distributed.distributed_c10d._get_default_store()
    name = f"triton_analog/{space.op}/{problem.hardware.name}/{space.key(problem)}"
    if board.add(f"{name}/claims", 1) == 1:
        config = None
        try:
            config = find()
        finally:
            board.set(name, json.dumps(None if config is None else as_values(config)))
        return config
    board.wait([name], PATIENCE)
    values = json.loads(board.get(name))
    return None if values is None else space.accepts(problem, values)


def settle(space: Space[Config], problem: Problem, device: torch.device, found: Config, measured: bool) -> Config:
    """The best configuration of a problem: ``found`` if it was measured, or measured here and now and kept in the user's
    files; ``found`` again if that failed. The ranks of a distributed job settle on the same one."""

    def find() -> Config:
        return found if measured else _tuned(space, problem, device) or found

    together = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    with _one_at_a_time:  # the backward runs in threads, and one that waits for a rank blocks the board for the others
        return (_agreed(space, problem, find) or found) if together else find()
