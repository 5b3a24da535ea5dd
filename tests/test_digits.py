"""The example in ``examples/digits.py``, run as a user runs it, in a small setting."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from helpers import needs_interpreter

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits.py"
LEVELS = [0, 2, 5, 10, 15, 20]


def run(folder: Path, *args: str) -> str:
    # Without the interpreter, which the test session may have asked for: the example chooses by itself.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(EXAMPLE), "--quiet", *args]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_hardware_aware_training_keeps_the_accuracy(tmp_path: Path) -> None:
    printed = run(tmp_path, "--epochs", "8", "--seeds", "5", "--out", "plots/digits.png")
    rows = re.findall(r"^ +(\d+)% +([\d.]+) \+- ([\d.]+) +([\d.]+) \+- ([\d.]+)$", printed, re.MULTILINE)
    table = {int(level): [float(number) for number in numbers] for level, *numbers in rows}
    assert list(table) == LEVELS
    plain, _, aware, _ = table[0]
    assert plain > 90
    assert aware > 90
    plain, _, aware, _ = table[20]
    assert aware > plain + 2, printed  # 4.8 to 11.5 points for ten training seeds
    assert (tmp_path / "plots" / "digits.png").read_bytes().startswith(b"\x89PNG")


@needs_interpreter
def test_kernels_train_as_the_reference_does(tmp_path: Path) -> None:
    printed = run(tmp_path, "--kernels", "--steps", "5")
    assert len(re.findall(r"^ +\d+ +[\d.]+ +[\d.]+ +[\d.e+-]+$", printed, re.MULTILINE)) == 5
    assert "largest relative difference" in printed
