"""What is wrong with tuning files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triton_analog.launch import named_hardware, store
from triton_analog.launch.fingerprint import is_stale
from triton_analog.launch.space import Space
from triton_analog.launch.store import Entry, Table
from triton_analog.tuning.spaces import spaces


def _of_entry(space: Space[Any], table: Table, entry: Entry) -> str | None:
    try:
        problem = space.problem(named_hardware(table.device, table.target), entry.key)
    except ValueError as error:
        return f"unknown: {error}; it is skipped, delete it"
    if space.accepts(problem, entry.config) is None:
        return f"unknown: {entry.key}: {entry.config} is not in the space of {space.op}; it is skipped, sweep again"
    if is_stale(space, entry):
        return f"stale: {entry.key}: the kernels changed since; it is still used, sweep again for a better one"
    return None


def _place(directory: Path, table: Table) -> Path | None:
    """Where sweeps keep such a table; None if it names no GPU's folder."""
    try:
        return store.table_path(directory, table.device, table.op)
    except ValueError:
        return None


def audit(directory: Path) -> Iterator[tuple[Path, str]]:
    """Every tuning file below ``directory`` that is damaged or in a wrong place, every entry that is not used, and every stale
    one."""
    for path in sorted(directory.glob("*/*.json")):
        for finding in store.problems(path):
            yield path, f"damaged: {finding}; repair or delete it, or sweep again"
        table = store.read(path)
        if table is None:
            continue
        space = spaces().get(table.op)
        if space is None:
            yield path, f"unknown: {table.op!r} is not an operation of this version; it is skipped, delete it"
            continue
        place = _place(directory, table)
        remedy = "delete it" if place is None else f"move it to {place}"
        if path.stem != table.op:
            yield path, f"misplaced: it holds {table.op} for {table.device!r}; it is skipped, {remedy}"
            continue
        if path != place:
            yield path, f"misplaced: it is used for {table.device!r}, but no sweep replaces it; {remedy}"
        for entry in table.entries:
            fault = _of_entry(space, table, entry)
            if fault is not None:
                yield path, fault
