"""The rooms of the package stand one above the other: imports go down, those inside functions too, and never in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    "hints", "tables", "reference", "launch", "lang", "ops", "seeds", "calls", "idle_arguments", "functional", "config", "nn",
    "distributed", "range_statistics", "samples", "analysis", "calibrate", "surroundings", "coverage", "convert", "summary",
    "restore", "optim", "inference", "aihwkit_bridge", "integrations", "lightning", "tuning", "testing", "verify", "version", "",
)  # fmt: skip
"""From the ground up; each imports only what stands before it. The last one is the package's own face."""


def files() -> dict[str, Path]:
    """Every module of the package by its name; ``reference`` lies beside it in a checkout."""
    found = {}
    for folder, prefix in ((ROOT / "triton_analog", "triton_analog"), (ROOT / "reference", "triton_analog.reference")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((prefix, *(part for part in parts if part != "__init__")))] = path
    return found


FILES = files()


def imported(name: str) -> Iterator[str]:
    """The modules of the package that ``name`` imports, wherever it does so."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(FILES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            below = [f"{module}.{alias.name}" for alias in node.names]
            yield from (one for one in below if one in FILES)
            if module in FILES and any(one not in FILES for one in below):
                yield module


def room(name: str) -> str:
    return name.partition(".")[2].partition(".")[0]


def test_every_module_is_on_a_floor():
    assert {room(name) for name in FILES} == set(FLOORS)


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_go_down(name):
    """An operation may import the reference, which runs on a CPU; nothing below the layers knows a config."""
    for other in imported(name):
        assert FLOORS.index(room(other)) <= FLOORS.index(room(name)), f"{name} imports {other}"


def test_nothing_below_asks_the_packages_face():
    """Which imports everything: a room is imported by its own name."""
    for name, path in FILES.items():
        if room(name):
            assert not re.search(r"^\s*from triton_analog import\b", path.read_text("utf-8"), re.MULTILINE), name


def test_there_is_no_circle():
    graph = {name: {other for other in imported(name) if other != name} for name in FILES}
    TopologicalSorter(graph).prepare()  # raises where there is one, and names it


def test_the_reference_imports_torch_alone():
    for name, path in FILES.items():
        if room(name) == "reference":
            assert not re.search(
                r"^\s*(from|import) (triton|triton_analog)\b", path.read_text("utf-8"), re.MULTILINE
            ), name


def test_the_readme_names_the_floors():
    readme = (ROOT / "README.md").read_text("utf-8")
    (line,) = re.findall(r"^Floors, from the ground up: (.+)$", readme, re.MULTILINE)
    assert re.findall(r"`(\w+)`", line) == [floor for floor in FLOORS if floor]
