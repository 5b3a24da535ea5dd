"""The layer's two operations, forward and backward, against plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.operations import SLICES, Race
from triton_analog import reference
from triton_analog.ops.linear import linear_backward, linear_forward

EVERYTHING = (SLICES, False, 254.0, 0.0, False, 0.04, True, 10.0, True, 254.0, "none", 0.0, "per_channel", 0.02)
BACKWARD = (SLICES, 254.0, 0.0, False, "none", 0.0, "per_channel", 0.02, 0.0, 0.95, False, True, None)


def _operands(size: int, normal: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    x, w = normal(size, size), normal(size, size)
    return x, w, torch.full((SLICES,), 3.0, device=x.device, dtype=x.dtype)


def bench_linear_forward(size: int, normal: Callable[..., Tensor], seed: Tensor, race: Race) -> None:
    """Everything on, with the weight that is disturbed on the way, against ``linear``."""
    x, w, r = _operands(size, normal)
    arguments = (x, w, None, r, None, seed, seed, None, None, None, *EVERYTHING, "full", None, True)
    race(
        {
            "op": lambda: linear_forward(*arguments)[0],
            "reference": lambda: reference.linear_forward(*arguments)[0],
            "torch": lambda: torch.nn.functional.linear(x, w),
        },
        inputs=[x, w],
        flops=2.0 * size**3,
    )


def bench_linear_backward(size: int, normal: Callable[..., Tensor], seed: Tensor, race: Race) -> None:
    """All gradients, against the two products of ``linear``'s."""
    x, w, r = _operands(size, normal)
    grad = normal(size, size)
    _, mask = reference.linear_forward(
        x, w, None, r, None, seed, seed, None, None, None, *EVERYTHING, "full", None, True
    )
    arguments = (grad, x, None, w, r, None, seed, seed, None, None, mask, *BACKWARD, list(x.shape), None, True, True)
    race(
        {
            "op": lambda: linear_backward(*arguments),
            "reference": lambda: reference.linear_backward(*arguments),
            "torch": lambda: (grad @ w, grad.T @ x),
        },
        inputs=[x, w, grad],
        flops=4.0 * size**3,
    )
