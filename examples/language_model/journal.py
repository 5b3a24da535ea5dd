"""What a training reports: a progress bar, lines of JSON, and TensorBoard where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

FILE = "log.jsonl"


class Journal:
    """Of a training in ``folder`` that goes on after ``step`` steps; what was written of later ones is forgotten.

    With ``silent`` there is none.
    """

    def __init__(self, folder: Path, step: int, steps: int, silent: bool) -> None:
        self.silent = silent
        self.bar = tqdm(total=steps, initial=step, desc="training", unit="step", disable=silent)
        self.board: Any = None
        if silent:
            return
        folder.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in entries(folder) if entry["step"] <= step]
        (folder / FILE).write_text("".join(json.dumps(entry) + "\n" for entry in kept), "utf-8")
        self.file = (folder / FILE).open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        """One line: ``kind`` is ``"training"`` or ``"analysis"``."""
        if self.silent:
            return
        print(json.dumps({"kind": kind, "step": step, **numbers}), file=self.file, flush=True)
        if kind == "training":
            self.bar.set_postfix_str(f"loss {numbers['loss']:.4f}, {numbers['tokens_per_second']:.0f} tokens/s")
        if self.board is not None:
            for name, number in numbers.items():
                self.board.add_scalar(name if "/" in name else f"{kind}/{name}", number, step)

    def advance(self) -> None:
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
        if not self.silent:
            self.file.close()
        if self.board is not None:
            self.board.close()


def entries(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines that were written in ``folder``, of one kind or of all; one that was cut off is none."""
    file = folder / FILE
    lines = file.read_text("utf-8").split("\n")[:-1] if file.exists() else []
    return [entry for entry in map(json.loads, lines) if kind in (None, entry["kind"])]
