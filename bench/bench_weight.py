"""A weight quantized and disturbed, with its scale, against plain torch, and the gradient of a learned clip."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.operations import SLICES, Race
from triton_analog import ops, reference

QUANTIZED = {"quantization": "per_channel", "res": 2**8 - 2}


def bench_weight(size: int, normal: Callable[..., Tensor], seed: Tensor, race: Race) -> None:
    """Against a weight disturbed by ``torch.randn_like``."""
    w = normal(size, size)
    settings = QUANTIZED | {"noise_type": "per_channel", "std_dev": 0.05}
    race(
        {
            "op": lambda: ops.weight(w, SLICES, seed=seed, **settings),
            "reference": lambda: reference.weight(w, SLICES, seed=seed, **settings),
            "torch": lambda: w + 0.05 * w.abs().amax(1, keepdim=True) * torch.randn_like(w),
        },
        inputs=[w],
    )


def bench_weight_without_noise(size: int, normal: Callable[..., Tensor], race: Race) -> None:
    """Against a copy."""
    w = normal(size, size)
    race(
        {
            "op": lambda: ops.weight(w, SLICES, **QUANTIZED),
            "reference": lambda: reference.weight(w, SLICES, **QUANTIZED),
            "torch": w.clone,
        },
        inputs=[w],
    )


def bench_weight_per_tensor(size: int, normal: Callable[..., Tensor], seed: Tensor, race: Race) -> None:
    """Against a weight disturbed by ``torch.randn_like``."""
    w = normal(size, size)
    settings = {"quantization": "per_tensor", "res": 2**8 - 2, "noise_type": "per_tensor", "std_dev": 0.05}
    race(
        {
            "op": lambda: ops.weight(w, SLICES, seed=seed, **settings),
            "reference": lambda: reference.weight(w, SLICES, seed=seed, **settings),
            "torch": lambda: w + 0.05 * w.abs().amax() * torch.randn_like(w),
        },
        inputs=[w],
    )


def bench_weight_as_integers(size: int, normal: Callable[..., Tensor], race: Race) -> None:
    """Against a copy to int8."""
    w = normal(size, size)
    race(
        {
            "op": lambda: ops.weight(w, SLICES, dtype=torch.int8, **QUANTIZED),
            "reference": lambda: reference.weight(w, SLICES, dtype=torch.int8, **QUANTIZED),
            "torch": lambda: w.to(torch.int8),
        },
        inputs=[w],
    )


def bench_weight_grad(size: int, normal: Callable[..., Tensor], race: Race) -> None:
    """Against ``torch.where`` for the weight's gradient alone."""
    w, grad = normal(size, size), normal(size, size)
    clip = torch.full((SLICES, size), 2.0, device=w.device)
    race(
        {
            "op": lambda: ops.weight_grad(grad, w, clip, SLICES, **QUANTIZED),
            "reference": lambda: reference.weight_grad(grad, w, clip, SLICES, **QUANTIZED),
            "torch": lambda: torch.where(w.abs() <= 2, grad, 0),
        },
        inputs=[w, grad],
    )
