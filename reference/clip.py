"""Weights clamped to a number of their own standard deviations (SEMANTICS 4)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from .grid import wide


def clip(weights: Sequence[Tensor], sigmas: Sequence[float], channel_dim: int | None = None) -> None:
    """Clamp each weight in place to ``sigma`` unbiased deviations of itself, or of each index of ``channel_dim``."""
    for weight, sigma in zip(weights, sigmas, strict=True):
        dims = [dim for dim in range(weight.ndim) if dim != channel_dim]
        if weight.numel() == 0 or prod(weight.shape[dim] for dim in dims) < 2:
            continue  # a single number has no deviation
        bound = sigma * wide(weight).std(dim=dims, keepdim=True)
        weight.clamp_(-bound, bound)
