"""Input clamp and quantization (SEMANTICS 3, steps 1 and 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import half_steps, range_of, to_grid, wide
from .slicing import iter_slices


def dac_slice(x: Tensor, r: Tensor, q_max: float) -> tuple[Tensor, Tensor | float]:
    """One slice as ``(operand, unit)`` with ``x_q = operand * unit``: integers and the step, or clamped values and 1."""
    if q_max > 0:
        return to_grid(x, r, q_max).clamp(-q_max, q_max).round(), r / q_max
    return torch.maximum(torch.minimum(x, r), -r), 1.0


def dac(x: Tensor, input_range: Tensor, slices: int, inp_res: float = -1.0) -> Tensor:
    """``x [M, K]`` clamped to its range and, if ``inp_res > 0``, quantized; dtype of ``x``."""
    q_max = half_steps(inp_res)
    parts = []
    for s, part in enumerate(iter_slices(x, slices)):
        part = wide(part)
        operand, unit = dac_slice(part, range_of(input_range, s, part), q_max)
        parts.append((operand * unit).to(x.dtype))
    return torch.cat(parts, dim=-1)
