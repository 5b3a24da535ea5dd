"""``python -m triton_analog.tuning inspect --target sm_90``: the compiler's numbers for every kernel, without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from triton_analog.tuning.inspect import DTYPES, OPS, TARGETS, Failure, Report, inspect

COLUMNS = {
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


def _table(reports: Sequence[Report]) -> str:
    """Text to the left, numbers to the right."""
    rows = [list(COLUMNS), *([getattr(report, field) for field in COLUMNS.values()] for report in reports)]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    numeric = [isinstance(cell, int) for cell in rows[-1]]
    return "\n".join(
        "  ".join(f"{cell:>{w}}" if n else f"{cell:<{w}}" for cell, w, n in zip(row, widths, numeric, strict=True))
        for row in rows
    )


def _line(failure: Failure) -> str:
    kernel = failure.kernel or "before any kernel"
    return f"error: {failure.op} ({failure.variant}), {kernel}, {failure.target}, {failure.dtype}: {failure.error}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 if a kernel did not compile."""
    parser = argparse.ArgumentParser(prog="python -m triton_analog.tuning", description=__doc__)
    command = parser.add_subparsers(required=True).add_parser("inspect", help="compile and report")
    command.add_argument(
        "--target", required=True, action="append", choices=[*TARGETS, "all"], help="may be given several times"
    )
    command.add_argument("--op", action="append", choices=OPS, help="instead of all; may be given several times")
    command.add_argument(
        "--dtype", action="append", choices=DTYPES, help="storage dtype (default: bf16); may be given several times"
    )
    command.add_argument("--jobs", type=int, help="processes that compile (default: the number of CPUs)")
    command.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    options = parser.parse_args(arguments)

    targets = list(TARGETS) if "all" in options.target else options.target
    try:
        reports, failures = inspect(options.op or OPS, targets, options.dtype or ["bf16"], options.jobs)
    except (ValueError, RuntimeError) as error:
        command.error(str(error))
    if options.json:
        print(json.dumps([asdict(report) for report in reports], indent=1, default=str))
    else:
        print(_table(reports))
    for failure in failures:
        print(_line(failure), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
