"""Weights as the devices of a chip hold them: programmed, and drifted for a time (SEMANTICS 10)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .noise import noise
from .slicing import slice_widths

DEVICE_STREAM = 2**30
"""Device ``d`` of a cell draws from the streams ``DEVICE_STREAM + 8 * d`` and up: programming, drift, spread, read, stuck."""
PROGRAMMING, DRIFT, SPREAD, READ, STUCK = range(5)
CELLS = ("pair", "single", "signed")
LARGEST = 1.5
"""Where the curves end, in units of ``g_max``: programming may miss upwards."""
TINY = 2.0**-100


def curve_at(curves: Tensor, r: Tensor, column: int) -> Tensor:
    """Curve ``column`` of ``curves [knots, 4]`` at ``r``: straight lines between the knots ``LARGEST * (i / (knots - 1))**2``."""
    knots = len(curves)
    position = (r.nan_to_num(0.0).clamp(0.0, LARGEST) / LARGEST).sqrt() * (knots - 1)
    i = position.to(torch.int64).clamp(max=knots - 2)
    first, second = curves[:, column][i], curves[:, column][i + 1]
    return first + (position - i) * (second - first)


def program(
    weight: Tensor,
    wmax: Tensor,
    seed: Tensor,
    curves: Tensor,
    read_seed: Tensor | None,
    gain: Tensor | None,
    cell: str,
    significances: Sequence[float],
    g_min: float,
    g_max: float,
    log2_time: float,
    read: float,
    shift: float,
    spread: float,
    lowest: float,
    highest: float,
    stuck_low: float,
    stuck_high: float,
    moment: int,
) -> Tensor:
    N, K = weight.shape
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    curves, w = curves.to(wide), weight.to(wide)

    def of_weights(scale: Tensor) -> Tensor:
        widths = torch.tensor(slice_widths(K, len(wmax)), device=weight.device)
        return scale.to(wide).expand(-1, N).repeat_interleave(widths, 0).T

    scale = of_weights(wmax)
    span = g_max - g_min
    full = sum(significances) * span
    v = torch.where(scale < TINY, 0.0, w / scale.clamp(min=TINY)).clamp(-1, 1) * full

    def normals(device: int, kind: int, plane: int = 0) -> Tensor:
        own = read_seed if kind == READ and read_seed is not None else seed
        return noise(own, N, K, stream=DEVICE_STREAM + 8 * device + kind, plane=plane).to(weight.device, wide)

    def device(g: Tensor, number: int) -> Tensor:
        r = g / g_max
        held = (g + curve_at(curves, r, 0) * normals(number, PROGRAMMING)).clamp(min=min(lowest, 0.0))
        now = held
        if log2_time > 0:
            exponent = curve_at(curves, r, 1) + curve_at(curves, r, 2) * normals(number, DRIFT)
            now = now * torch.exp2(-log2_time * exponent.abs())
        if shift != 0 or spread > 0:
            now = now + shift
        if spread > 0:
            now = now + spread * normals(number, SPREAD)
        if read > 0:
            factor = curve_at(curves, held / g_max, 3)
            now = now + now.abs() * factor * read * normals(number, READ, moment)
        now = now.clamp(lowest, highest)
        if stuck_low > -torch.inf or stuck_high < torch.inf:
            z = normals(number, STUCK)
            now = torch.where(z < stuck_low, g_min, torch.where(z > stuck_high, g_max, now))
        return now

    if cell == "pair":
        total, below = torch.zeros_like(v), 0.0
        for p, f in enumerate(significances):
            plus, minus = (((side.clamp(min=0) - below) / f).clamp(0, span) + g_min for side in (v, -v))
            total = total + f * (device(plus, 2 * p) - device(minus, 2 * p + 1))
            below += f * span
    elif cell == "single":
        total = 2 * (device((v + full) / 2 + g_min, 0) - g_min) - full
    else:
        total = torch.where(v < 0, -1.0, 1.0) * device(v.abs(), 0)
    out = total * (scale / full)
    return (out if gain is None else out * of_weights(gain)).to(weight.dtype).contiguous()
