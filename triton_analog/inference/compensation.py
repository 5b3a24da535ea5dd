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


def unit_of(wmax: Tensor) -> Tensor:
    """What the readout of each slice is in units of, ``[S, 1]``: the largest of ``wmax [S, N]``."""
    return wmax.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def readout(tile: Tensor, unit: Tensor, compensation: Compensation) -> Tensor:
    """Mean magnitude of each slice of ``tile [N, K]`` in units of ``unit [S, 1]``, as one input after the other would read it:
    ``[S, 1]``, or ``[S, N]`` per column of the tile, which is one output."""
    over = (0, 2) if compensation == "global" else 2
    means = []
    for x in _stacks(tile, len(unit)):
        total = torch.linalg.vector_norm(x, 1, dim=over, dtype=unit.dtype)
        count = x.shape[2] * (x.shape[0] if compensation == "global" else 1)
        means.append((total[:, None] if compensation == "global" else total.T) / count)
    return ((means[0] if len(means) == 1 else torch.cat(means)) / unit).clamp(min=LEAST)


def scale_slices(tile: Tensor, factors: Tensor) -> None:
    """Multiply each slice of ``tile [N, K]`` in place by ``factors [S, 1]`` or ``[S, N]``."""
    stacks = _stacks(tile, len(factors))
    for x, factor in zip(stacks, factors.T.chunk(len(stacks), 1), strict=True):
        x.mul_(factor[:, :, None])
