"""What is built of a checkout: all of it, and without a word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def files(folder: Path, pattern: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob(pattern)}


def test_a_build_holds_every_module_and_table_and_warns_of_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", "import setuptools; setuptools.setup()", "-q", "build_py"]
    shell = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # it says so
    built = subprocess.run(
        [*command, "--build-lib", str(tmp_path)], cwd=ROOT, env=shell, capture_output=True, text=True, timeout=100
    )
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    package = tmp_path / "triton_analog"
    ours = files(ROOT / "triton_analog", "*.py") | {f"reference/{name}" for name in files(ROOT / "reference", "*.py")}
    assert files(package, "*.py") == ours
    assert (package / "py.typed").is_file()
    assert files(package / "tuning_cache", "*") == {
        name for name in files(ROOT / "tuning_cache", "*") if not name.endswith(".md")
    }
