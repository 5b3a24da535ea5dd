"""Drift compensation: what a tile gives is scaled, digitally, by how much it has lost since it was programmed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from triton_analog.reference import slice_widths

Compensation = Literal["none", "global", "per_column"]
COMPENSATIONS = ("none", "global", "per_column")
LEAST = 1e-4
"""Smallest readout, in units of the largest weight; AIHWKIT's."""


def readout(tile: Tensor, wmax: Tensor, compensation: Compensation) -> Tensor:
    """Mean magnitude of each slice of ``tile [N, K]`` in units of ``wmax [S, N]``, as one input after the other would read it:
    ``[S, 1]``, or ``[S, N]`` per column of the tile, which is one output."""
    parts = tile.split(slice_widths(tile.shape[1], len(wmax)), 1)
    rows = torch.stack([part.abs().mean(1, dtype=wmax.dtype) for part in parts])
    largest = wmax.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    if compensation == "global":
        rows = rows.mean(1, keepdim=True)
    return (rows / largest).clamp(min=LEAST)


def scale_slices(tile: Tensor, factors: Tensor) -> None:
    """Multiply each slice of ``tile [N, K]`` in place by ``factors [S, 1]`` or ``[S, N]``."""
    for part, factor in zip(tile.split(slice_widths(tile.shape[1], len(factors)), 1), factors, strict=True):
        part.mul_(factor[:, None])
