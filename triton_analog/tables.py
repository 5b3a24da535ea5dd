"""Tables of text: with rich where that is installed, plainly where it is not."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
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

    def table(self, **choice: Any) -> Any:
        """A table for rich, of the lines that ``rows(**choice)`` gives. Needs rich, ``pip install 'triton-analog[analysis]'``."""
        from rich.table import Table
        from rich.text import Text

        grid = Table(box=None, pad_edge=False)
        for i, heading in enumerate(self.headings()):
            # Names that are too long go on in the next line; numbers never do.
            grid.add_column(heading, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
        for row in self.rows(**choice):
            grid.add_row(*map(Text, row))
        return grid

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        return Group(self.table(), Text(self.legend()))

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


def _plainly(headings: tuple[str, ...], rows: list[tuple[str, ...]], legend: str) -> str:
    lines = [headings, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    shown = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([*shown, *filter(None, [legend])])
