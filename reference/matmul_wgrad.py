"""Gradient of the analog matrix product in its weight (SEMANTICS 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from .dac import dac_slice
from .grid import half_steps, range_of, wide, without_autocast
from .matmul_dgrad import masked
from .slicing import iter_slices


@without_autocast
def matmul_wgrad(
    grad: Tensor,
    x: Tensor,
    input_range: Tensor | None,
    slices: int,
    mask: Tensor | None,
    *,
    inp_res: float = -1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``dW [N, K]`` in ``dtype`` (default: that of ``x``), the input quantized anew from ``x`` and its range."""
    g = wide(grad)
    parts = []
    for s, x_s in enumerate(iter_slices(x, slices)):
        operand = wide(x_s)
        unit: Tensor | float = 1.0
        if input_range is not None:
            operand, unit = dac_slice(operand, range_of(input_range, s, operand), half_steps(inp_res))
        parts.append((masked(g, mask, s).T @ (operand * unit)).to(dtype or x.dtype))
    return torch.cat(parts, dim=-1)
