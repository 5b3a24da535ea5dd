"""Sliced moments and standard deviation (SEMANTICS 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import wide
from .slicing import iter_slices


def moments(x: Tensor, slices: int, active: Tensor | None = None) -> Tensor:
    """``[S, 3]``: count, mean and sum of squared deviations of every slice of ``x [M, K]``; zeros where not ``active [S]``."""
    if active is not None and active.device.type == "cpu" and not active.any():
        return wide(x).new_zeros(slices, 3)
    rows = []
    for part in iter_slices(x, slices):
        pivot = wide(part[0, 0])  # a constant slice has no deviation, whatever its mean is rounded to
        distance = wide(part) - pivot
        mean = distance.mean()
        m2 = (distance - mean).square_().sum()
        rows.append(torch.stack([torch.full_like(mean, part.numel()), pivot + mean, m2]))
    out = torch.stack(rows)
    return out if active is None else torch.where(active[:, None], out, 0.0)


def merge_moments(parts: Tensor) -> Tensor:
    """``[S, 3]`` moments of the union of the samples behind ``parts [P, S, 3]`` (Chan et al. 1979)."""
    count, mean, m2 = parts.unbind(-1)
    total = count.sum(0)
    merged = mean[0] + (count * (mean - mean[0])).sum(0) / total.clamp(min=1)  # equal means merge to the same, exactly
    return torch.stack([total, merged, (m2 + count * (mean - merged) ** 2).sum(0)], dim=-1)


def std_of(moments: Tensor) -> Tensor:
    """Unbiased standard deviation ``[S]`` from ``moments [S, 3]``; 0 for fewer than two samples."""
    count, _, m2 = moments.unbind(-1)
    return torch.where(count > 1, (m2 / (count - 1).clamp(min=1)).sqrt(), 0.0)


def std(x: Tensor, slices: int) -> Tensor:
    """Unbiased standard deviation ``[S]`` of every slice of ``x [M, K]``."""
    return std_of(moments(x, slices))
