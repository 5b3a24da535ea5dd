"""All gradients of the product, with a saturation mask, against ``grad @ weight`` and ``grad.T @ x``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.operations import SLICES, Race
from triton_analog import ops, reference


def bench_matmul_backward(size: int, normal: Callable[..., Tensor], race: Race) -> None:
    grad, w, x = normal(size, size), normal(size, size), normal(size, size)
    r = torch.full((SLICES,), 2.0, device=x.device)
    mask = torch.zeros(reference.mask_shape(SLICES, size, size), dtype=torch.int32, device=x.device)
    race(
        {
            "op": lambda: ops.matmul_backward(grad, w, x, r, SLICES, mask, inp_res=2**8 - 2),
            "reference": lambda: reference.matmul_backward(grad, w, x, r, SLICES, mask, inp_res=2**8 - 2),
            "torch": lambda: (grad @ w, grad.T @ x),
        },
        inputs=[grad, w, x],
        flops=4 * size**3,
    )
