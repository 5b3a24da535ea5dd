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


def _stacks(tile: Tensor, slices: int) -> list[Tensor]:
    """``tile [N, K]`` as ``[N, slices, width]``, in one piece where all slices are equally wide: large models have thousands."""
    if tile.shape[1] % slices == 0:
        return [tile.unflatten(1, (slices, -1))]
    return [part[:, None] for part in tile.split(slice_widths(tile.shape[1], slices), 1)]


def readout(tile: Tensor, wmax: Tensor, compensation: Compensation) -> Tensor:
    """Mean magnitude of each slice of ``tile [N, K]`` in units of ``wmax [S, N]``, as one input after the other would read it:
    ``[S, 1]``, or ``[S, N]`` per column of the tile, which is one output."""
    stacks = _stacks(tile, len(wmax))
    rows = torch.cat([torch.linalg.vector_norm(x, 1, dim=2, dtype=wmax.dtype).T / x.shape[2] for x in stacks])
    largest = wmax.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    if compensation == "global":
        rows = rows.mean(1, keepdim=True)
    return (rows / largest).clamp(min=LEAST)


def scale_slices(tile: Tensor, factors: Tensor) -> None:
    """Multiply each slice of ``tile [N, K]`` in place by ``factors [S, 1]`` or ``[S, N]``."""
    stacks = _stacks(tile, len(factors))
    for x, factor in zip(stacks, factors.T.chunk(len(stacks), 1), strict=True):
        x.mul_(factor[:, :, None])
