"""The product's gradient in input and range, with a saturation mask, against ``grad @ weight``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.operations import SLICES, Race
from triton_analog import ops, reference


def bench_matmul_dgrad(size: int, normal: Callable[..., Tensor], race: Race) -> None:
    grad, w, x = normal(size, size), normal(size, size), normal(size, size)
    r = torch.full((SLICES,), 2.0, device=x.device)
    mask = torch.zeros(reference.mask_shape(SLICES, size, size), dtype=torch.int32, device=x.device)
    race(
        {
            "op": lambda: ops.matmul_dgrad(grad, w, x, r, SLICES, mask),
            "reference": lambda: reference.matmul_dgrad(grad, w, x, r, SLICES, mask),
            "torch": lambda: grad @ w,
        },
        inputs=[grad, w, x],
        flops=2 * size**3,
    )
