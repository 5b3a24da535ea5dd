"""What is wrong with tuning files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triton_analog.launch import Hardware
from triton_analog.tuning import store
from triton_analog.tuning.fingerprint import is_stale
from triton_analog.tuning.space import Space, spaces
from triton_analog.tuning.store import Entry, Table


def _of_entry(space: Space[Any], table: Table, entry: Entry) -> str | None:
    capability = int(table.target[3:]) if table.target.startswith("sm_") else 0
    try:
        problem = space.problem(Hardware(table.device, table.target, capability), entry.key)
    except ValueError as error:
        return f"unknown: {error}"
    if space.accepts(problem, entry.config) is None:
        return f"unknown: {entry.key}: {entry.config} is not in the space of {space.op}; it is skipped"
    if is_stale(space, entry):
        return f"stale: {entry.key}: the kernels changed since; it is still used, sweep again for a better one"
    return None


def audit(directory: Path) -> Iterator[tuple[Path, str]]:
    """Every tuning file below ``directory`` that is damaged, every entry that is not used, and every stale one."""
    for path in sorted(directory.glob("*/*.json")):
        for finding in store.problems(path):
            yield path, f"damaged: {finding}"
        table = store.read(path)
        if table is None:
            continue
        space = spaces().get(table.op)
        if space is None or path != store.table_path(directory, table.device, table.op):
            yield path, f"unknown: {table.op!r} for {table.device!r} is not looked for here; it is skipped"
            continue
        for entry in table.entries:
            fault = _of_entry(space, table, entry)
            if fault is not None:
                yield path, fault
