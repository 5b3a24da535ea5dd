"""How results are shown: as tables of text, with rich where that is installed, plainly where it is not; and as JSON."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from io import StringIO
from typing import Any


class ShownAsTable:
    """What prints as a table of its :meth:`rows`, with names to the left and numbers to the right."""

    def headings(self) -> tuple[str, ...]:
        """Of the columns."""
        raise NotImplementedError(f"{type(self).__name__} must define headings")

    def rows(self) -> Iterable[tuple[str, ...]]:
        """Lines of as many cells."""
        raise NotImplementedError(f"{type(self).__name__} must define rows")

    def legend(self) -> str:
        """What stands below the table."""
        return ""

    def table(self, *, width: int | None = None, **choice: Any) -> Any:
        """A table for rich, of the lines that ``rows(**choice)`` gives. Needs rich, ``pip install 'triton-analog[analysis]'``.

        Names go on in the next line, behind a dot if there is one, where they are too long for ``width`` (None: that of the
        terminal, or 80); numbers never do.
        """
        from rich.table import Table
        from rich.text import Text

        lines = [self.headings(), *self.rows(**choice)]
        others = sum(2 + max(len(line[i]) for line in lines) for i in range(1, len(lines[0])))
        room = (width or shutil.get_terminal_size().columns) - others
        grid = Table(box=None, pad_edge=False)
        for i, heading in enumerate(lines[0]):
            grid.add_column(heading, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
        for name, *numbers in lines[1:]:
            grid.add_row(Text(_broken(name, room)), *map(Text, numbers))
        return grid

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        yield self.table(width=options.max_width)
        yield Text(self.legend())

    def __str__(self) -> str:
        """The table, as wide as the terminal (80 columns where there is none)."""
        try:
            from rich.console import Console
        except ImportError:
            return _plainly(self.headings(), list(self.rows()), self.legend())
        out = StringIO()
        width = shutil.get_terminal_size().columns
        Console(file=out, width=width, highlight=False, markup=False, emoji=False).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _broken(name: str, room: int) -> str:
    """``name`` in lines of ``room`` letters, as far as its dots allow it."""
    at = name.rfind(".", 0, max(room, 1))
    return name if len(name) <= room or at < 0 else f"{name[: at + 1]}\n{_broken(name[at + 1 :], room)}"


def _plainly(headings: tuple[str, ...], rows: list[tuple[str, ...]], legend: str) -> str:
    lines = [headings, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    shown = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([*shown, *filter(None, [legend])])


def to_json(found: Any) -> str:
    """``found`` as JSON; numbers that are not finite, which JSON does not know, are null."""
    return json.dumps(_finite(found), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
