"""Weights clamped to their own standard deviations in one launch, against one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.operations import Race
from triton_analog import reference
from triton_analog.ops.clip import clip_batches

WEIGHTS, SIGMA = 4, 2.5


def _race(weights: list[Tensor], channel_dim: int | None, race: Race) -> None:
    """Each contender clips weights of its own, as its training would: again and again."""
    sigmas = [SIGMA] * len(weights)
    ours, plain, clamped = ([weight.clone() for weight in weights] for _ in range(3))
    batches = clip_batches(ours, sigmas, [channel_dim] * len(weights))
    dims = None if channel_dim is None else 1 - channel_dim

    def op() -> Tensor:
        for batch in batches:
            batch.run()
        return ours[0]

    def one_by_one() -> Tensor:
        reference.clip(plain, sigmas, channel_dim)
        return plain[0]

    def torch_clamp() -> Tensor:
        for weight in clamped:
            bound = SIGMA * weight.std(dim=dims, keepdim=True)
            weight.copy_(torch.minimum(torch.maximum(weight, -bound), bound))
        return clamped[0]

    race({"op": op, "reference": one_by_one, "torch": torch_clamp}, inputs=weights)


def bench_clip(size: int, normal: Callable[..., Tensor], race: Race) -> None:
    """By the deviation of each channel."""
    _race([normal(size, size) for _ in range(WEIGHTS)], 0, race)


def bench_clip_whole(size: int, normal: Callable[..., Tensor], race: Race) -> None:
    """By one deviation for each weight."""
    _race([normal(size, size) for _ in range(WEIGHTS)], None, race)
