"""The Python examples of the README and of the pages in docs run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
NEEDS = {"export_to_aihwkit": "aihwkit", "peft": "peft", "transformers": "transformers", "accelerate": "accelerate"}
"""What a block names, and the package that it needs."""


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


README = dict(
    zip(
        ["basic", "conversion", "calibration", "saving", "attaching", "chip", "aihwkit", "functional"],
        blocks(ROOT / "README.md"),
        strict=True,
    )
)
PAGES = {
    f"{page.stem} {i}": block for page in sorted((ROOT / "docs").glob("*.md")) for i, block in enumerate(blocks(page))
}


@pytest.mark.parametrize("block", [*README.values(), *PAGES.values()], ids=[*README, *PAGES])
def test_example_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "cuda" in block and not torch.cuda.is_available():
        pytest.skip("it needs a GPU")
    for word, package in NEEDS.items():
        if word in block:
            pytest.importorskip(package, reason=f"{package} is an optional peer: make test-peers installs it")
    names: dict = {}
    exec(compile(block, "example", "exec"), names)
    if "loss" in names:
        assert names["loss"] < 1
