"""Largest magnitude per slice and row (SEMANTICS 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import wide
from .slicing import iter_slices


def absmax(x: Tensor, slices: int) -> Tensor:
    """``max |x[n, k in s]|`` of ``x [N, K]``: ``[S, N]``, fp32 (fp64 for fp64)."""
    return torch.stack([wide(part.abs().amax(dim=-1)) for part in iter_slices(x, slices)])
