"""The product's gradient in its weight, with the input converted again, against ``grad.T @ x``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.operations import SLICES, Race
from triton_analog import ops, reference


def bench_matmul_wgrad(size: int, normal: Callable[..., Tensor], race: Race) -> None:
    grad, x = normal(size, size), normal(size, size)
    r = torch.full((SLICES,), 2.0, device=x.device)
    mask = torch.zeros(reference.mask_shape(SLICES, size, size), dtype=torch.int32, device=x.device)
    race(
        {
            "op": lambda: ops.matmul_wgrad(grad, x, r, SLICES, mask, inp_res=2**8 - 2),
            "reference": lambda: reference.matmul_wgrad(grad, x, r, SLICES, mask, inp_res=2**8 - 2),
            "torch": lambda: grad.T @ x,
        },
        inputs=[grad, x],
        flops=2 * size**3,
    )
