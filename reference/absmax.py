"""Largest magnitude per slice and row (SEMANTICS 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import wide
from .slicing import iter_slices


def absmax(x: Tensor, slices: int) -> Tensor:
    """``max |x[n, k in s]|`` of ``x [N, K]``: ``[S, N]``, fp32 (fp64 for fp64)."""
    parts = iter_slices(x, slices)
    return torch.stack([wide(torch.maximum(part.amax(dim=-1), -part.amin(dim=-1))) for part in parts])
