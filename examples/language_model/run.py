"""The recipe from start to end, command after command; what is done already is not done again.

    python run.py small                                          two blocks of SmolLM2, on two CPU cores
    python run.py whole --minutes 4 --writing-minutes 2          SmolLM2-135M on a GPU, as long as there is time

It prints the commands that it runs; each can be run by itself, and has --help.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import generate
import prepare
import recipe
import report
import throughput
import torch
import train


@dataclass(frozen=True)
class Size:
    """Options of the commands."""

    prepare: str
    generate: str
    step: str
    """Of a training step, also where its speed is measured."""
    rates: str
    adapters: str
    evaluate: str
    steps: int | None
    """None: as many as take the minutes, by the speed that was measured."""


SIZES = {
    "small": Size(
        prepare="--blocks 2 --vocabulary 2048 --steps 150 --batch 8 --length 64",
        generate="--tokens 48e3 --length 64 --batch 256 --held-out 16",
        step="--length 64",
        rates="--learning-rate 5e-4",
        adapters="--adapters 16 --learning-rate 2e-3",
        evaluate="--length 64 --batch 16 --chips 3 --chips-over-time 1",
        steps=200,
    ),
    "check": Size(
        prepare="--blocks 2 --vocabulary 512 --steps 10 --batch 4 --length 32",
        generate="--tokens 2e3 --length 32 --batch 32 --held-out 8",
        step="--length 32 --batch 4",
        rates="--learning-rate 5e-4",
        adapters="--adapters 4 --learning-rate 2e-3",
        evaluate="--length 32 --batch 16 --chips 2 --chips-over-time 1",
        steps=20,
    ),
    "whole": Size(
        prepare="",
        generate="--tokens 30e6 --batch 2048",
        step="--precision bf16 --way graph",
        rates="--learning-rate 2e-4",
        adapters="--adapters 16 --learning-rate 1e-3",
        evaluate="",
        steps=None,
    ),
}
HELP = "small: two blocks of SmolLM2, ten minutes on two cores; check: the same in one, which says nothing; whole: all of it"
FIT = 0.85
"""Share of the minutes that steps are to take."""
START_UP = 5
"""Input ranges start up in a fifth of the steps, where the recipe's own number of batches is more."""
ADAPTERS = 10
"""Adapters are trained in a tenth of the steps."""


def do(command: Callable[[list[str]], Any], *parts: object) -> None:
    """Run a command in this process, and let go of its memory."""
    arguments = " ".join(map(str, parts)).split()
    file = Path(sys.modules[command.__module__].__file__ or "").name
    print(f"\npython {file} {' '.join(arguments)}", flush=True)
    command(arguments)
    gc.collect()
    if torch.cuda.is_available():
        torch.compiler.reset()
        torch.cuda.empty_cache()


def steps_in(minutes: float, speed: Path) -> int:
    """Training steps that fit into ``minutes``, by what :mod:`throughput` has measured."""
    if math.isinf(minutes):
        raise SystemExit("--minutes: how long to train the weights is needed for this size, or --steps")
    found = json.loads(speed.read_text("utf-8"))
    per_second = found["tokens_per_second"]["analog"] / (found["batch"] * found["length"])
    return max(ADAPTERS, int(FIT * 60 * minutes * per_second))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("size", choices=SIZES, help=HELP)
    add("--model", help="folder or name of another model than SmolLM2-135M")
    add("--out", type=Path, help="folder of everything (default: out/recipe-SIZE)")
    add("--results", type=Path, help="folder of tables and pictures (default: OUT/results)")
    add("--writing-minutes", type=float, default=math.inf, help="for the text (default: no limit)")
    add("--minutes", type=float, default=math.inf, help="for the training of the weights (default: no limit)")
    add("--evaluation-minutes", type=float, default=math.inf, help="for chips (default: no limit)")
    add("--steps", type=int, help="of the training (default: the size's, or what fits into --minutes)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)

    size, out = SIZES[given.size], given.out or Path("out") / f"recipe-{given.size}"
    folder, text, speed = out / "teacher", out / "text", out / "throughput.json"
    on = f"--device {given.device}"
    do(prepare.main, size.prepare, f"--model {given.model}" if given.model else "", "--out", folder)
    do(generate.main, size.generate, "--teacher", folder, "--out", text, "--minutes", given.writing_minutes, on)
    if not speed.exists():
        do(throughput.main, size.step, "--teacher", folder, "--out", speed, on)
    steps = given.steps or size.steps or steps_in(given.minutes, speed)
    common = f"{size.step} --teacher {folder} --data {text} --minutes {given.minutes} {on}"
    start_up = min(recipe.START_UP, steps // START_UP)
    do(train.main, common, size.rates, "--steps", steps, "--start-up", start_up, "--out", out / "trained")
    do(train.main, common, size.adapters, "--steps", steps // ADAPTERS, "--out", out / "adapters")
    do(
        evaluate.main, size.evaluate, "--teacher", folder, "--text", text, "--trained", out / "trained", "--adapters",
        out / "adapters", "--out", out / "evaluation.json", "--minutes", given.evaluation_minutes, on,
    )  # fmt: skip
    do(report.main, "--from", out, "--out", given.results or out / "results")


if __name__ == "__main__":
    main()
