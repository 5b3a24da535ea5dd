"""Gradient of the analog matrix product in its input and input range (SEMANTICS 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from .adc import unpack_bits
from .grid import wide, without_autocast
from .input_range import input_range_grad_slice
from .slicing import iter_slices


def masked(grad: Tensor, mask: Tensor | None, s: int) -> Tensor:
    """The part of ``grad [M, N]`` that passed the ADC of slice ``s``."""
    return grad if mask is None else torch.where(unpack_bits(mask[s], grad.shape[1]), 0.0, grad)


@without_autocast
def matmul_dgrad(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    input_range: Tensor | None,
    slices: int,
    mask: Tensor | None,
    *,
    decay: float = 0.0,
    input_min_percentage: float = 0.95,
    fast_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """``dx [M, K]`` in the dtype of ``x`` and the gradient ``[S]`` of a static ``input_range [S]``.

    ``input_range`` is None where nothing clips (no range, or a dynamic one); the range gradient is then empty.
    """
    g = wide(grad)
    parts, range_grads = [], []
    for s, (x_s, w_s) in enumerate(zip(iter_slices(x, slices), iter_slices(weight, slices), strict=True)):
        dx = masked(g, mask, s) @ wide(w_s)
        if input_range is not None:
            x_s = wide(x_s)
            r = input_range[s].to(x_s.dtype)
            range_grads.append(input_range_grad_slice(dx, x_s, r, decay, input_min_percentage, fast_mode))
            dx = torch.where(x_s.abs() <= r.abs(), dx, 0.0)
        parts.append(dx.to(x.dtype))
    return torch.cat(parts, dim=-1), torch.stack(range_grads) if range_grads else g.new_empty(0)
