"""Training steps of the student on tiles and of a digital one, in turns: tokens per second, and peak memory on a GPU.

python throughput.py --teacher out/teacher --out out/throughput.json --way graph --precision bf16
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import layout
import student
import teacher
import torch
import train
from step import EAGER_STEPS, WAYS, Step
from torch import Tensor

ROUNDS = 5
"""In each, both take their turn."""


def waiting(step: Step, tokens: Tensor, steps: int) -> float:
    """Seconds that ``steps`` take, the device's work included."""
    begin = time.perf_counter()
    for _ in range(steps):
        step(tokens, 1e-6)
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak_of(work: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """What ``work`` gives, and the bytes that it took at most, on a GPU."""
    if device.type != "cuda":
        return work(), None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    done = work()
    return done, torch.cuda.max_memory_allocated() - before


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", required=True, help="folder of the model, or its name on the Hub")
    add("--out", type=Path, required=True, help="the numbers, as JSON")
    add("--batch", type=int, default=8, help="sequences in a step")
    add("--length", type=int, default=1024, help="tokens of a sequence")
    add("--steps", type=int, default=10, help="of a turn")
    add("--precision", choices=["fp32", "bf16"], default="fp32")
    add("--checkpointing", action="store_true")
    add("--way", choices=WAYS, default="python")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)

    place = layout.Layout(None, torch.device(given.device))
    train.check(given, place)
    base, _ = teacher.load(given.teacher)
    students = {"digital": copy.deepcopy(base).train(), "analog": student.trainable(base, start_up=1)}
    tokens = torch.randint(base.config.vocab_size, (given.batch, given.length)).to(place.device)
    base.to(place.device)
    steps: dict[str, Step] = {}
    peaks: dict[str, int | None] = {}
    for name, trained in students.items():

        def begin(trained: Any = trained) -> Step:
            step = train.assemble(given, trained, base, place)
            waiting(step, tokens, EAGER_STEPS + 1)
            return step

        steps[name], peaks[name] = peak_of(begin, place.device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            seconds[name].append(waiting(step, tokens, given.steps))
    speeds = {name: given.steps * tokens.numel() / median(own) for name, own in seconds.items()}
    found = {
        "way": given.way, "precision": given.precision, "batch": given.batch, "length": given.length,
        "device": torch.cuda.get_device_name() if tokens.is_cuda else "CPU",
        "tokens_per_second": speeds, "ratio": speeds["analog"] / speeds["digital"], "peak_bytes": peaks,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
