"""Gradients of the analog matrix product in all that it multiplies (SEMANTICS 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from .matmul_dgrad import matmul_dgrad
from .matmul_wgrad import matmul_wgrad


def matmul_backward(
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
    dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
    inp_noise: float = 0.0,
    inp_sto_round: bool = False,
    seed: Tensor | None = None,
    clips_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``dx``, ``dr``, ``dW`` and ``db``: those of :func:`matmul_dgrad` and :func:`matmul_wgrad` for the same product. Without
    ``clips_gradient``, ``dx`` is that of the converted input, and ``dr`` is empty."""
    static = input_range if clips_gradient and input_range is not None and input_range.ndim == 1 else None
    dx, dr, _ = matmul_dgrad(
        grad, weight, x, static, slices, mask,
        clipped=clipped, decay=decay, input_min_percentage=input_min_percentage, fast_mode=fast_mode,
    )  # fmt: skip
    dw, dbias = matmul_wgrad(
        grad, x, input_range, slices, mask,
        inp_res=inp_res, dtype=dtype, converted=x.dtype == torch.int8, bias_dtype=bias_dtype,
        inp_noise=inp_noise, inp_sto_round=inp_sto_round, seed=seed,
    )  # fmt: skip
    return dx, dr, dw, dbias
