"""Text that lies on any machine: licences, and the documentation strings of Python's own library."""

from __future__ import annotations

import ast
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT = 5
"""Every fifth document is kept from training."""


def licences() -> list[str]:
    """Of the system, or else of the packages that are installed."""
    files = [path for path in sorted(Path("/usr/share/common-licenses").glob("*")) if not path.is_symlink()]
    files = files or sorted(Path(sysconfig.get_paths()["purelib"]).glob("*.dist-info/**/LICEN[CS]E*"))
    return list(dict.fromkeys(path.read_text("utf-8", errors="replace") for path in files))


def docstrings() -> list[str]:
    """One document for each module."""
    return [text for path in sorted(Path(os.__file__).parent.glob("*.py")) if (text := "\n\n".join(_strings_of(path)))]


def _strings_of(path: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text


CORPORA = {"licences": licences, "docstrings": docstrings}


def held_out(documents: list[str]) -> str:
    return "\n\n".join(documents[::HELD_OUT])


def for_training(documents: list[str]) -> str:
    return "\n\n".join(text for number, text in enumerate(documents) if number % HELD_OUT)
