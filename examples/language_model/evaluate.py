"""Perplexity of the original and of what was trained: as it is, and on simulated chips, chip after chip.

    python evaluate.py --teacher out/teacher --text out/text --trained out/trained --adapters out/adapters --out out/found.json

Chips are programmed seed by seed, each with all models, so that every model has met the same chips when --minutes are over. The
same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import generate
import numpy as np
import student
import teacher
import texts
import torch
from data import pack, read
from torch import Tensor, nn
from tqdm import tqdm

from triton_analog.inference import AnalogFoundationNoiseModel, PCMLikeNoiseModel, program

ROWS = {
    "original": "(a) original, digital; only its weights on chips",
    "calibrated": "(b) original on tiles, calibrated ranges",
    "8 bits": "(c) original, 8-bit weights and activations",
    "trained": "(d) trained for tiles",
    "adapters": "(e) original on tiles, digital adapters trained",
}
NO_NOISE, POLYNOMIAL, OVER_TIME = "no noise", "chip polynomial", "PCM"
PCM = {"PCM, 1 s": 1.0, "PCM, 1 day": 86400.0, "PCM, 1 year": 365 * 86400.0}
"""Seconds since the end of programming."""
OWN = "own samples"

Numbers = dict[str, float]
"""Perplexity by text."""


@torch.no_grad()
def perplexities(model: nn.Module, corpora: dict[str, Tensor], batch: int) -> Numbers:
    """Of each text ``[n, length]``; in bf16 on a GPU."""
    device = next(model.parameters()).device
    found = {}
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for name, tokens in corpora.items():
            losses = [model(input_ids=part, labels=part).loss * len(part) for part in tokens.split(batch)]
            found[name] = math.exp(torch.stack(losses).sum().item() / len(tokens))
    return found


def held_out(tokenizer: Any, text: Path, length: int, most: int) -> dict[str, Tensor]:
    """At most ``most`` sequences ``[n, length]`` of each text that nobody is trained on."""
    parts = {name: pack(texts.held_out(documents()), tokenizer, length) for name, documents in texts.CORPORA.items()}
    parts[OWN] = np.load(text / generate.HELD_OUT)
    spread = {
        name: part[np.linspace(0, len(part) - 1, min(most, len(part)), dtype=int)] for name, part in parts.items()
    }
    return {name: torch.from_numpy(part.astype(np.int64)) for name, part in spread.items() if len(part)}


def models(given: argparse.Namespace, base: Any, batches: list[Tensor]) -> dict[str, Any]:
    """What is compared, by the names of :data:`ROWS`."""
    found = {
        "original": student.only_weights(base),
        "calibrated": student.calibrated(base, batches),
        "8 bits": student.eight_bits(base),
    }
    for name, folder in (("trained", given.trained), ("adapters", given.adapters)):
        if folder is not None:
            checkpoint = checkpoints.latest(folder)
            if checkpoint is None:
                raise SystemExit(f"--{name}: {folder} holds no checkpoint; run train.py first")
            found[name] = restored(checkpoint, base)
    return {name: model.eval() for name, model in found.items()}


def restored(checkpoint: Path, base: Any) -> Any:
    """The student of ``checkpoint``."""
    options = checkpoints.progress_of(checkpoint)["options"]
    model = student.trainable(base, options["start_up"])
    if options["adapters"]:
        model = student.with_adapters(model, options["adapters"])
    checkpoints.load_model(checkpoint, model)
    return model


def plan(chips: int, chips_over_time: int) -> list[tuple[str, int]]:
    """Kinds of chips and their seeds, in the order of the evaluation."""
    wanted = {POLYNOMIAL: chips, OVER_TIME: chips_over_time}
    seeds = range(max(wanted.values()))
    return [(NO_NOISE, 0), *((kind, seed) for seed in seeds for kind, number in wanted.items() if seed < number)]


def readings(model: Any, kind: str, seed: int) -> Iterator[tuple[str, Any]]:
    """What computes, by the name of the condition."""
    if kind == NO_NOISE:
        yield kind, model
    elif kind == POLYNOMIAL:
        yield kind, program(model, AnalogFoundationNoiseModel(), seed, compensation="none")
    else:
        chip = program(model, PCMLikeNoiseModel(), seed)
        for name, seconds in PCM.items():
            yield name, chip.drift_to(seconds)


def last_of(kind: str) -> str:
    """The last condition that :func:`readings` gives."""
    return kind if kind != OVER_TIME else list(PCM)[-1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", required=True, help="folder of the model, or its name on the Hub")
    add("--text", type=Path, required=True, help="folder of generate.py")
    add("--trained", type=Path, help="folder of train.py")
    add("--adapters", type=Path, help="folder of train.py --adapters")
    add("--out", type=Path, required=True, help="the numbers, as JSON")
    add("--length", type=int, default=1024, help="tokens of a sequence")
    add("--sequences", type=int, default=16, help="of each text, at most")
    add("--batch", type=int, default=8, help="sequences at a time")
    add("--chips", type=int, default=10, help="seeds of the chip polynomial")
    add("--chips-over-time", type=int, default=3, help="seeds of phase-change memory, each at three times")
    add("--minutes", type=float, default=math.inf, help="stop in time, and keep what is there (default: no limit)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)

    stop = time.monotonic() + 60 * given.minutes
    base, tokenizer = teacher.load(given.teacher)
    base.to(given.device)
    calibration = read([given.text], tokenizer, given.length).batch(0, given.batch, seed=0).to(given.device)
    corpora = {
        name: tokens.to(given.device)
        for name, tokens in held_out(tokenizer, given.text, given.length, given.sequences).items()
    }
    settings = {
        "teacher": given.teacher,
        "length": given.length,
        "sequences": {name: len(tokens) for name, tokens in corpora.items()},
    }
    found: dict[str, Any] = {"settings": settings, "rows": {}}
    if given.out.exists():
        found = json.loads(given.out.read_text("utf-8"))
        if found["settings"] != settings:
            raise SystemExit(
                f"--out: {given.out} has numbers of other settings, {found['settings']}; take another file"
            )
    given.out.parent.mkdir(parents=True, exist_ok=True)

    compared = models(given, base, [calibration])
    todo = [(name, *chip) for chip in plan(given.chips, given.chips_over_time) for name in compared]
    for name, kind, seed in tqdm(todo, desc="evaluating", unit="chip"):
        row = found["rows"].setdefault(name, {})
        if len(row.get(last_of(kind), [])) > seed:
            continue
        if time.monotonic() > stop:
            print("out of time; the same command goes on")
            given.out.write_text(json.dumps(found, indent=1), "utf-8")
            break
        seen = {
            condition: perplexities(model, corpora, given.batch)
            for condition, model in readings(compared[name], kind, seed)
        }
        for condition, numbers in seen.items():
            row.setdefault(condition, []).append(numbers)
        given.out.write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
