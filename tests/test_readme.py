"""The README's Python examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text("utf-8"), re.DOTALL)


def test_the_examples_are_found():
    assert len(BLOCKS) == 8


@pytest.mark.parametrize(
    "block", BLOCKS, ids=["basic", "conversion", "calibration", "saving", "attaching", "chip", "aihwkit", "functional"]
)
def test_example_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "export_to_aihwkit" in block:
        pytest.importorskip(
            "aihwkit", reason="aihwkit is an optional peer: pip install --only-binary :all: --no-deps aihwkit==1.1.0"
        )
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    if "loss" in names:
        assert names["loss"] < 1
