"""A student learns to do on analog tiles what its teacher does: the recipe of Analog Foundation Models (arXiv 2505.09663).

    python train.py --teacher out/teacher --data out/text --out out/trained --steps 2000
    python train.py ... --data my.txt more.txt                plain text in place of the teacher's
    python train.py ... --adapters 16 --steps 200             digital adapters beside a frozen model on tiles
    torchrun --nproc-per-node 8 train.py ...                  several processes, of whole models
    torchrun --nproc-per-node 8 train.py ... --layout fsdp    or of sharded ones

The same command goes on from the last checkpoint in --out: a training that was killed ends as one that was not. (torchrun, not
Accelerate, as FSDP2 and all else then runs and is tested on CPUs too, and steps stay plain enough for a CUDA graph.)
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoints
import layout
import recipe
import student
import teacher
import torch
from data import Sequences, read
from journal import Journal
from step import WAYS, Step
from torch import Tensor

from triton_analog import analyze

CALIBRATION = 8
"""Batches that the ranges below adapters are calibrated on."""
MAY_CHANGE = ("minutes", "save_every", "analyze_every", "out", "device", "layout", "way")
"""Options that do not change what is learned, up to rounding."""


def build(given: argparse.Namespace, base: Any, batches: list[Tensor]) -> Any:
    """The student of these options."""
    if given.adapters:
        return student.with_adapters(student.calibrated(base, batches), given.adapters)
    return student.trainable(base, given.start_up)


def assemble(given: argparse.Namespace, trained: Any, base: Any, place: layout.Layout) -> Step:
    """The step of ``trained`` and its optimizer, and of ``base``, its teacher. Both are moved and spread."""
    narrow = torch.bfloat16 if given.precision == "bf16" else torch.float32
    if given.checkpointing:
        trained.gradient_checkpointing_enable({"use_reentrant": False})
    trained = place.spread(trained, narrow)
    base = place.spread(base.to(narrow).requires_grad_(False), narrow)
    optimizer = recipe.optimizer_for(trained, capturable=given.way.endswith("graph"))
    return Step(trained, base, optimizer, given.precision == "bf16" and place.kind != "fsdp", given.way)


def check(given: argparse.Namespace, place: layout.Layout) -> None:
    """Options that cannot go together.

    Raises:
        SystemExit: there are some.
    """
    if given.way.endswith("graph") and (place.kind is not None or place.device.type != "cuda"):
        raise SystemExit(f"--way: got {given.way}; graphs are for one process on a GPU, take python or compiled")


def check_same(given: argparse.Namespace, before: dict[str, Any], checkpoint: Path) -> None:
    """``given`` is what ``checkpoint`` was trained with.

    Raises:
        SystemExit: it is not.
    """
    now = options_of(given)
    if others := [f"--{name} {before[name]}" for name in now if before[name] != now[name]]:
        raise SystemExit(f"{checkpoint} was trained with {', '.join(others)}; take those, or another --out")


def options_of(given: argparse.Namespace) -> dict[str, Any]:
    """What decides about the result, as JSON has it."""
    named = {name: value for name, value in vars(given).items() if name not in MAY_CHANGE}
    return named | {"data": [str(path) for path in given.data]}


def numbers_of_layers(model: Any, batch: Tensor, autocast: bool) -> dict[str, float]:
    """What every layer does on its tiles, and its input range. All processes take part."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
        found = analyze(model, [batch], forward=lambda model, tokens: model(input_ids=tokens), verbose=False)
    ranges = {f"analog/{layer.name}/input_range": layer.slices[0].input_range for layer in found.layers}
    return found.scalars() | {name: value for name, value in ranges.items() if value is not None}


def run(given: argparse.Namespace, place: layout.Layout) -> None:
    """From the last checkpoint to the end, or to the end of the time."""
    stop = time.monotonic() + 60 * given.minutes
    base, tokenizer = teacher.load(given.teacher)
    data: Sequences = read(given.data, tokenizer, given.length)
    base.to(place.device)
    batches = [data.batch(number * given.batch, given.batch, given.seed) for number in range(CALIBRATION)]
    torch.manual_seed(given.seed)
    trained = build(given, base, [batch.to(place.device) for batch in batches])
    step = assemble(given, trained, base, place)

    found = checkpoints.latest(given.out)
    progress = {"step": 0, "losses": 0.0, "seconds": 0.0}
    if found is not None:
        progress = checkpoints.progress_of(found)
        check_same(given, progress["options"], found)
        checkpoints.load(found, step.student, step.optimizer)
        step.losses.fill_(progress["losses"])
    journal = Journal(given.out, progress["step"], given.steps, silent=place.rank > 0)
    begun = time.monotonic() - progress["seconds"]

    def save(steps: int) -> None:
        now = {"step": steps, "losses": place.mean(step.losses), "seconds": time.monotonic() - begun}
        checkpoints.save(given.out, step.student, step.optimizer, now | {"options": options_of(given)}, place.rank == 0)

    last_line = time.monotonic(), progress["step"]
    for number in range(progress["step"], given.steps):
        if number == given.start_up:
            step.start_up_is_over(trained)
        torch.manual_seed((given.seed << 32) + number)  # processes differ all the same
        place_in_data = (number * place.ranks + place.rank) * given.batch
        step(
            data.batch(place_in_data, given.batch, given.seed),
            recipe.learning_rate(number, given.steps, given.learning_rate),
        )
        journal.advance()
        done, at_end = number + 1, number + 1 == given.steps
        out_of_time = False
        if done % given.log_every == 0 or at_end:
            loss = place.mean(step.losses) / (done % given.log_every or given.log_every)
            step.losses.zero_()
            now = time.monotonic()
            speed = (done - last_line[1]) * given.batch * given.length * place.ranks / (now - last_line[0])
            last_line = now, done
            journal.write("training", done, {
                "tokens": done * given.batch * given.length * place.ranks, "loss": loss,
                "learning_rate": recipe.learning_rate(number, given.steps, given.learning_rate),
                "seconds": now - begun, "tokens_per_second": speed,
            })  # fmt: skip
            out_of_time = place.first_says(now > stop)
        if done % given.analyze_every == 0 or at_end:
            tokens = batches[0][:1].to(place.device)
            journal.write("analysis", done, numbers_of_layers(trained, tokens, step.autocast))
        if done % given.save_every == 0 or at_end or out_of_time:
            save(done)
        if out_of_time and not at_end:
            print(f"out of time after {done} of {given.steps} steps; the same command goes on")
            break
    journal.close()
    place.wait()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", required=True, help="folder of the model, or its name on the Hub")
    add("--data", type=Path, nargs="+", required=True, help="folders of generate.py and plain text files")
    add("--out", type=Path, required=True, help="folder of checkpoints and logs")
    add("--steps", type=int, default=2000)
    add("--batch", type=int, default=8, help="sequences of a process in a step")
    add("--length", type=int, default=1024, help="tokens of a sequence")
    add("--learning-rate", type=float, default=1e-4, help="the largest")
    add("--start-up", type=int, default=recipe.START_UP, help="batches that input ranges learn from")
    add(
        "--adapters",
        type=int,
        default=0,
        metavar="RANK",
        help="train digital LoRA beside frozen tiles (default: weights)",
    )
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: computed so; parameters stay in fp32")
    add("--checkpointing", action="store_true", help="compute activations again in the backward, which saves memory")
    add("--layout", choices=layout.KINDS, default="ddp", help="below torchrun: whole models, or sharded ones")
    add("--way", choices=WAYS, default="python", help="who starts the kernels; a graph is fastest")
    add("--minutes", type=float, default=math.inf, help="save and stop in time (default: no limit)")
    add("--save-every", type=int, default=500, help="steps")
    add("--log-every", type=int, default=10, help="steps")
    add("--analyze-every", type=int, default=250, help="steps between two looks at ranges and saturation of each layer")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    place = layout.layout_of(given.layout, given.device)
    check(given, place)
    try:
        run(given, place)
    finally:
        place.end()


if __name__ == "__main__":
    main()
