"""What a device does, as curves over its conductance: where they are sampled, and the functions they are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from triton_analog.reference.program import LARGEST

KNOTS = 1024
"""Enough that a straight line between two knots is off by less than ``1e-4`` of the laws here."""


def knots() -> Tensor:
    """Relative conductances, fp64 ``[KNOTS]``: dense near 0, where the laws are steep, and beyond 1, as programming may miss."""
    return LARGEST * (torch.arange(KNOTS, dtype=torch.float64) / (KNOTS - 1)) ** 2


def polynomial(coefficients: Sequence[float], r: Tensor) -> Tensor:
    """``sum_i c_i r**i``"""
    total = torch.zeros_like(r)
    for c in reversed(coefficients):
        total = total * r + c
    return total


def logarithmic(factor: float, offset: float, lowest: float, highest: float, r: Tensor) -> Tensor:
    """``factor ln r + offset`` within ``lowest .. highest``"""
    return (factor * r.clamp(min=1e-30).log() + offset).clamp(lowest, highest)


def interpolated(at: Sequence[float], values: Sequence[float], g: Tensor) -> Tensor:
    """Straight lines between ``values`` at the ascending ``at``; constant beyond them."""
    x, y = torch.tensor(at, dtype=g.dtype), torch.tensor(values, dtype=g.dtype)
    i = torch.searchsorted(x, g.contiguous()).clamp(1, len(x) - 1)
    share = ((g - x[i - 1]) / (x[i] - x[i - 1])).clamp(0, 1)
    return y[i - 1] + share * (y[i] - y[i - 1])
