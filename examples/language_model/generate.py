"""The text to learn from, which the teacher writes itself: sampled from the first token on, at temperature 1.

    python generate.py --teacher out/teacher --out out/text --tokens 20e6
    python generate.py ... --minutes 2                 stops in time, and keeps what it has
    torchrun --nproc-per-node 8 generate.py ...        one share of the shards for each process

The folder fills with shards, each a function of the seed and its number: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import teacher
import torch
from data import shards_of
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import Cache, DynamicLayer

HELD_OUT = "held-out.npy"
SETTINGS = "settings.json"


class InPlaceLayer(DynamicLayer):
    """Keys and values in memory that is taken once; transformers' own layer copies all of them for each token."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        begin = self.get_seq_length()
        if not self.is_initialized:
            self._memory = [new.new_empty(*new.shape[:2], self._length, new.shape[3]) for new in (keys, values)]
            self.is_initialized = True
        end = begin + keys.shape[2]
        for memory, new in zip(self._memory, (keys, values), strict=True):
            memory[:, :, begin:end] = new
        self.keys, self.values = (memory[:, :, :end] for memory in self._memory)
        return self.keys, self.values


def draw(logits: Tensor, top: int, generator: torch.Generator) -> Tensor:
    """One token ``[B, 1]`` for each row of ``logits [B, V]``, from the ``top`` likeliest (0: from all).

    By exponential clocks: the first to ring. ``torch.multinomial`` would wait for the device.
    """
    if top > 0:
        logits, tokens = logits.topk(min(top, logits.shape[1]))
    chances = logits.float().softmax(-1)
    first = (chances / torch.empty_like(chances).exponential_(generator=generator)).argmax(-1, keepdim=True)
    return tokens.gather(1, first) if top > 0 else first


@torch.inference_mode()
def write(
    model: Any, begin: int, count: int, length: int, top: int, seed: int, stop: float = math.inf
) -> Tensor | None:
    """``count`` sequences ``[count, length]`` that begin with token ``begin``; None where the clock passed ``stop`` meanwhile.

    As in the recipe, a sequence goes on after an end of text.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    tokens = torch.full((count, length), begin, device=model.device)
    cache = Cache(layers=[InPlaceLayer(length) for _ in range(model.config.num_hidden_layers)])
    for place in range(1, length):
        last = tokens[:, place - 1 : place]
        logits = model(input_ids=last, past_key_values=cache, use_cache=True).logits[:, -1]
        tokens[:, place : place + 1] = draw(logits, top, generator)
        if time.monotonic() > stop:
            return None
    return tokens


def save(path: Path, tokens: Tensor) -> None:
    """Whole, or not at all."""
    with (part := path.with_suffix(".part")).open("wb") as file:
        np.save(file, tokens.cpu().numpy().astype(np.int32))
    part.replace(path)


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """The folder is empty, or was begun with these settings.

    Raises:
        SystemExit: it was begun with others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SETTINGS
    if file.exists():
        before = json.loads(file.read_text("utf-8"))
        if others := [f"{name} {before.get(name)}" for name in settings if before.get(name) != settings[name]]:
            raise SystemExit(f"--out: {folder} was begun with {', '.join(others)}; take those, or another folder")
    file.write_text(json.dumps(settings, indent=1), "utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of the model, or its name on the Hub")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--tokens", type=float, default=20e6, help="to write in all (default: %(default).0f)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence (the paper: 4096)")
    parser.add_argument("--batch", type=int, default=1024, help="sequences at a time, which make a shard")
    parser.add_argument(
        "--top", type=int, default=50, help="likeliest tokens to draw from, 0 for all; the paper has both"
    )
    parser.add_argument("--held-out", type=int, default=64, help="sequences that are kept for evaluation")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop in time (default: no limit)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)

    stop = time.monotonic() + 60 * given.minutes
    names = ("teacher", "length", "batch", "top", "held_out", "seed")
    check_settings(given.out, {name: getattr(given, name) for name in names})
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    device = torch.device(given.device, int(os.environ.get("LOCAL_RANK", "0")) if given.device == "cuda" else None)
    model, tokenizer = teacher.load(given.teacher, torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.to(device)

    shards = math.ceil(given.tokens / (given.batch * given.length))
    wanted = [(HELD_OUT, given.held_out)] + [(f"{number:05}.npy", given.batch) for number in range(shards)]
    longest = 0.0
    with tqdm(total=len(wanted), desc="writing text", unit="shard", disable=rank > 0) as bar:
        for number, (name, count) in enumerate(wanted):
            if number % ranks == rank and not (given.out / name).exists():
                begin = time.monotonic()
                if begin + longest > stop:
                    break
                seed = (given.seed << 32) + number
                tokens = write(model, tokenizer.bos_token_id, count, given.length, given.top, seed, stop)
                if tokens is None:
                    break
                save(given.out / name, tokens)
                longest = max(longest, time.monotonic() - begin)
                bar.set_postfix_str(f"{count * given.length / (time.monotonic() - begin):.0f} tokens/s")
            bar.update()
    written = len(shards_of(given.out)) * given.batch * given.length
    print(f"{written / 1e6:.2f} million tokens in {given.out}")


if __name__ == "__main__":
    main()
