"""The gradient of the input clamp in its input and its range, against ``torch.where`` for the input alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from conftest import SLICES, Race
from torch import Tensor

from triton_analog import ops, reference


def bench_input_range_grad(size: int, normal: Callable[..., Tensor], race: Race) -> None:
    x, grad = normal(size, size), normal(size, size)
    r = torch.full((SLICES,), 2.0, device=x.device)
    race(
        {
            "op": lambda: ops.input_range_grad(grad, x, r, SLICES),
            "reference": lambda: reference.input_range_grad(grad, x, r, SLICES),
            "torch": lambda: torch.where(x.abs() <= 2, grad, 0),
        }
    )
