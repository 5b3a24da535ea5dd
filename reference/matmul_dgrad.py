"""Gradient of the analog matrix product in its input and input range (SEMANTICS 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from .adc import unpack_bits
from .dac import dac_slice, restore
from .grid import half_steps, range_of, wide, without_autocast
from .input_range import input_range_grad_slice
from .slicing import iter_slices


def masked(grad: Tensor, mask: Tensor | None, s: int) -> Tensor:
    """The part of ``grad [M, N]`` that passed the ADC of slice ``s``; ``mask`` may be the parts of all slices already."""
    if mask is None or mask.is_floating_point():
        return grad if mask is None else wide(mask[s])
    return torch.where(unpack_bits(mask[s], grad.shape[1]), 0.0, grad)


@without_autocast
def matmul_dgrad(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    input_range: Tensor | None,
    slices: int,
    mask: Tensor | None,
    *,
    clipped: Tensor | None = None,
    decay: float = 0.0,
    input_min_percentage: float = 0.95,
    fast_mode: bool = False,
    inp_res: float = -1.0,
    needs_steps: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dx [M, K]`` in the dtype of ``grad``, the gradient ``[S]`` of a static ``input_range [S]``, and on demand the converted
    input as numbers of steps ``[M, K]``.

    ``input_range`` is None where nothing clips (no range, or a dynamic one); its gradient is then empty. ``x`` is as it was
    in the forward, or int8 with the ``clipped`` flags of :func:`dac_steps`. A negative ``decay`` gives ``[3, S]`` in place of
    the gradient, as :func:`input_range_grad_slice` does.
    """
    g = wide(grad)
    steps = x.to(grad.dtype) if needs_steps else grad.new_empty(0, x.shape[1])
    if needs_steps and x.dtype != torch.int8:
        assert input_range is not None
        slices_of_x = enumerate(iter_slices(wide(x), slices))
        converted = [dac_slice(x_s, range_of(input_range, s, x_s), half_steps(inp_res))[0] for s, x_s in slices_of_x]
        steps = torch.cat(converted, dim=-1).to(grad.dtype)
    if input_range is not None and x.dtype == torch.int8:
        assert clipped is not None
        x = restore(x, clipped, input_range, slices, g.dtype)
    out, range_grads = g.new_empty(x.shape), []
    parts = zip(*(iter_slices(v, slices) for v in (x, weight, out)), strict=True)
    for s, (x_s, w_s, dx) in enumerate(parts):
        torch.mm(masked(g, mask, s), wide(w_s), out=dx)
        if input_range is not None:
            x_s = wide(x_s)
            r = input_range[s].to(x_s.dtype)
            range_grads.append(input_range_grad_slice(dx, x_s, r, decay, input_min_percentage, fast_mode))
            dx.copy_(torch.where(x_s.abs() <= r.abs(), dx, 0.0))
    dr = torch.stack(range_grads, dim=-1) if input_range is not None else g.new_empty(0)
    if input_range is not None and decay >= 0:
        dr = dr.to(input_range.dtype)
    return out.to(grad.dtype), dr, steps
