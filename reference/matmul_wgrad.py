"""Gradient of the analog matrix product in its weight (SEMANTICS 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from .dac import dac_slice, disturbed
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
    converted: bool = False,
    bias_dtype: torch.dtype | None = None,
    inp_noise: float = 0.0,
    inp_sto_round: bool = False,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``dW [N, K]`` in ``dtype`` and ``db [N]`` in ``bias_dtype`` (None leaves it out), the input quantized anew from ``x``
    and its range unless ``x`` is ``converted``: numbers of steps. Rounding and input noise are those of the forward."""
    g = wide(grad)
    q_max = half_steps(inp_res)
    dw = g.new_empty(grad.shape[1], x.shape[1])
    for s, (x_s, dw_s) in enumerate(zip(iter_slices(x, slices), iter_slices(dw, slices), strict=True)):
        operand = x_s.to(g.dtype)
        unit: Tensor | float = 1.0
        if input_range is not None:
            r = range_of(input_range, s, operand)
            rounding_seed = seed if inp_sto_round else None
            operand, unit = (operand, r / q_max) if converted else dac_slice(operand, r, q_max, s, rounding_seed)
            operand = disturbed(operand, r, q_max, s, inp_noise, seed)
        torch.mm(masked(g, mask, s).T, operand * unit, out=dw_s)
    dbias = g.sum(0).to(bias_dtype) if bias_dtype is not None else g.new_empty(0, dtype=dtype or grad.dtype)
    return dw.to(dtype or grad.dtype), dbias
