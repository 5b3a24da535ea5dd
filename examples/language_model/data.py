"""Sequences of tokens: from shards on the disk or from texts, in an order that is a function of the seed alone."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Sequences:
    """Sequences of equal length. Shards stay on the disk until a sequence is asked for.

    Args:
        parts: Arrays ``[n, length]`` of tokens.
    """

    def __init__(self, parts: list[np.ndarray]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.ends = np.cumsum([len(part) for part in self.parts])
        self.order = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, number: int) -> np.ndarray:
        part = int(np.searchsorted(self.ends, number, side="right"))
        return self.parts[part][number - self.ends[part]]  # from the end of its part, as a negative index

    def batch(self, first: int, count: int, seed: int) -> Tensor:
        """``count`` sequences ``[count, length]`` from place ``first`` of an endless order that visits all, epoch by epoch."""
        places = (divmod(place, len(self)) for place in range(first, first + count))
        rows = [self[self.order(seed, epoch)[place]] for epoch, place in places]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(len(self))


def pack(text: str, tokenizer: Any, length: int) -> np.ndarray:
    """A text as sequences ``[n, length]``; what does not fill the last one is left out."""
    tokens = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=np.int32)
    return tokens[: len(tokens) // length * length].reshape(-1, length)


def shards_of(folder: Path) -> list[Path]:
    """What :mod:`generate` has written, but for what it held out."""
    return sorted(folder.glob("[0-9]*.npy"))


def read(paths: Iterable[Path], tokenizer: Any, length: int) -> Sequences:
    """The sequences of folders of shards and of plain text files.

    Raises:
        SystemExit: there are none, or shards are not of ``length``.
    """
    parts = []
    for path in paths:
        if path.is_dir():
            parts += [np.load(shard, mmap_mode="r") for shard in shards_of(path)]
        else:
            parts.append(pack(path.read_text("utf-8"), tokenizer, length))
    found = Sequences(parts)
    if len(found) == 0:
        raise SystemExit(
            f"--data: {', '.join(map(str, paths))} hold no sequence of {length} tokens; run generate.py first"
        )
    if lengths := {part.shape[1] for part in found.parts} - {length}:
        raise SystemExit(f"--length: {length}, but the sequences on the disk have {lengths.pop()} tokens")
    return found
