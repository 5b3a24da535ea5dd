"""Tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as Grid

from triton_analog.launch.lookup import Choice
from triton_analog.launch.space import Problem, Space, as_values
from triton_analog.launch.store import Entry, Key
from triton_analog.tuning.inspect import Report

REPORT_COLUMNS = {
    "op": "op",
    "variant": "variant",
    "kernel": "kernel",
    "target": "target",
    "dtype": "dtype",
    "registers": "registers",
    "spilled": "spilled_bytes",
    "shared": "shared_bytes",
    "tensor core": "tensor_core_instructions",
    "instructions": "instructions",
    "hottest loop": "hottest_loop",
    "occupancy": "occupancy",
}
"""Heading and the report's field."""


def console(stderr: bool = False) -> Console:
    """As wide as it has to be where the output is not a terminal: a file or a pipe cuts nothing off. Text is printed as it
    is: a file's name may hold brackets and colons."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 10_000
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def _grid(headings: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool], folds: bool) -> Grid:
    grid = Grid(box=None, pad_edge=False)
    for i, heading in enumerate(headings):
        # Where there is not enough room words go on in the next line, and numbers stay whole.
        least = max((len(row[i]) for row in rows), default=0) if numeric[i] else None
        justify: Any = "right" if numeric[i] else "left"
        grid.add_column(heading, justify=justify, no_wrap=not folds, overflow="fold", min_width=least)
    for row in rows:
        grid.add_row(*row)
    return grid


def _print(headings: Sequence[str], rows: Sequence[Sequence[Any]], below: int | None = None) -> None:
    """Text to the left, numbers to the right. In a terminal that is too narrow cells are folded, and the column ``below`` comes
    below the table, each of its texts once."""
    numeric = [bool(rows) and isinstance(rows[0][i], (int, float)) for i in range(len(headings))]
    texts = [[f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    out = console()
    grid = _grid(headings, texts, numeric, folds=False)
    unlimited = out.options.update(max_width=10_000)
    if Measurement.get(out, unlimited, grid).maximum <= out.width:
        out.print(grid)
        return
    kept = [i for i in range(len(headings)) if i != below]
    lines = [[row[i] for i in kept] for row in texts]
    out.print(_grid([headings[i] for i in kept], lines, [numeric[i] for i in kept], folds=True))
    if below is not None:
        for text in dict.fromkeys(row[below] for row in texts if row[below]):
            out.print(f"{headings[below]}: {text}", soft_wrap=True)


def _sizes(key: Key) -> str:
    return ", ".join(f"{name} {size}" for name, size in key.sizes)


def _config(values: dict[str, int | bool]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def print_reports(reports: Sequence[Report]) -> None:
    """What the compiler made of the kernels."""
    _print(list(REPORT_COLUMNS), [[getattr(report, field) for field in REPORT_COLUMNS.values()] for report in reports])


def print_gains(found: Sequence[tuple[str, Entry]]) -> None:
    """Entries beside what the formula's configuration takes."""
    rows = [
        [
            op, entry.key.dtype, _sizes(entry.key), ", ".join(entry.key.flags), entry.formula_microseconds,
            entry.microseconds, f"{entry.formula_microseconds / entry.microseconds:.2f} x", f"{entry.spread:.1%}",
            entry.origin, _config(entry.config),
        ]
        for op, entry in found
    ]  # fmt: skip
    _print(
        ["op", "dtype", "sizes", "flags", "formula us", "best us", "gain", "spread", "origin", "configuration"], rows
    )


def print_choices(choices: Sequence[tuple[Space[Any], Problem, Choice[Any]]]) -> None:
    """What would be used for problems, and why."""
    rows = []
    for space, problem, choice in choices:
        key, entry = space.key(problem), choice.entry
        found = "" if entry is None else f"{_sizes(entry.key)}, {entry.origin}, {entry.source.get('date', '')}"
        config = _config(as_values(choice.config))
        rows.append(
            [space.op, key.dtype, _sizes(key), ", ".join(key.flags), config, choice.level, found, choice.path or ""]
        )
    _print(["op", "dtype", "sizes", "flags", "configuration", "why", "entry", "file"], rows, below=7)
