"""Read noise of the weights in evaluation: what each forward sees of a weight that is read once for it (SEMANTICS 10)."""

from __future__ import annotations

from math import inf, sqrt

import torch
from torch import Tensor

import triton_analog.ops as ops
from triton_analog.calls import draw_seed
from triton_analog.config import IOParameters, WeightNoiseType
from triton_analog.reference.program import LARGEST

ROOM = 4.0
"""Largest magnitude that is read, in units of the scale: programming may miss upwards."""


def largest_of_slices(wmax: Tensor, groups: int) -> Tensor:
    """The largest of ``wmax [S, N]`` over the outputs of each slice and group, for each output: ``[S, N]``."""
    parts = wmax.unflatten(1, (groups, -1))
    return parts.amax(2, keepdim=True).expand_as(parts).flatten(1)


def reads(io: IOParameters) -> bool:
    """Whether weights are read with noise in evaluation."""
    return io.w_noise > 0 and io.w_noise_type is not WeightNoiseType.NONE


def read(tile: Tensor, scale: Tensor, io: IOParameters) -> Tensor:
    """``tile [N, K]`` with fresh noise of deviation ``w_noise * scale``, or ``w_noise * sqrt(abs(tile) * scale)`` for PCM.

    ``scale [S, N]`` is what a largest conductance stands for. One read and one write of the tile, by the operation that
    programs chips: a cell whose one number with a sign is written anew. Its curve is a straight line of the root of the
    conductance, which two knots hold exactly.
    """
    spread, first = io.w_noise / ROOM, io.w_noise / ROOM
    if io.w_noise_type is WeightNoiseType.PCM_READ:
        first, spread = 0.0, io.w_noise * sqrt(LARGEST / ROOM)
    curves = torch.linspace(first, spread, 2, dtype=torch.float32, device=tile.device)[:, None].expand(2, 4)
    seed = draw_seed(tile.device)
    return ops.program(tile, ROOM * scale, seed, curves, cell="signed", g_max=1.0, lowest=-inf)
