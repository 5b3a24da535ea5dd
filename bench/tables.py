"""Results as tables: what all of them have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

OURS, IDEAL = "triton_analog", "torch.nn"

Record = dict[str, Any]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def by_workload(record: Record, suites: Sequence[str]) -> dict[tuple[str, str], dict[str, Record]]:
    """Results by group and workload, then by contender."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for result in record["results"]:
        if result["suite"] in suites:
            found.setdefault((result["group"], result["workload"]), {})[result["contender"]] = result
    return found


def multiple(result: Record | None, of: str) -> str:
    """The time as a multiple of another's with its quartiles; or why there is none."""
    if result is None:
        return ""
    if result["status"] != "ok":
        return result["status"]
    if of == result["contender"]:
        return "1"
    if of not in result["ratios"]:
        return ""
    first, middle, third = result["ratios"][of]
    mark = " *" if result["defects"] else ""
    return f"{middle:.2f} ({first:.2f} to {third:.2f}){mark}"
