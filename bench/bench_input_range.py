"""The input range's gradient, against ``torch.where`` for the input alone, and what it learns from a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.operations import SLICES, Race
from triton_analog import ops, reference


def bench_input_range_grad(size: int, normal: Callable[..., Tensor], race: Race) -> None:
    x, grad = normal(size, size), normal(size, size)
    r = torch.full((SLICES,), 2.0, device=x.device)
    race(
        {
            "op": lambda: ops.input_range_grad(grad, x, r, SLICES),
            "reference": lambda: reference.input_range_grad(grad, x, r, SLICES),
            "torch": lambda: torch.where(x.abs() <= 2, grad, 0),
        },
        inputs=[x, grad],
    )


def bench_input_range_learn(size: int, normal: Callable[..., Tensor], race: Race) -> None:
    """In the start-up, against ``Tensor.std`` of one slice after the other."""
    x = normal(size, size)
    r = torch.full((SLICES,), 2.0, device=x.device)
    count = torch.zeros(SLICES, dtype=torch.int64, device=x.device)
    race(
        {**learning(x, r, count), "torch": lambda: torch.stack([part.std() for part in x.chunk(SLICES, dim=1)])},
        inputs=[x],
    )


def bench_input_range_learn_after_the_start_up(size: int, normal: Callable[..., Tensor], race: Race) -> None:
    """When every slice has seen its batches, against dropping the ranges' signs."""
    x = normal(size, size)
    r = torch.full((SLICES,), 2.0, device=x.device)
    count = torch.full((SLICES,), 10**9, device=x.device)
    race({**learning(x, r, count), "torch": lambda: r.abs()})


def learning(x: Tensor, r: Tensor, count: Tensor) -> dict[str, Callable[[], Tensor]]:
    """``op`` and ``reference``; each returns the range that it updated."""

    def start(library: Any) -> Callable[[], Tensor]:
        learned, seen, residual = r.clone(), count.clone(), torch.zeros_like(r)

        def run() -> Tensor:
            library.input_range_learn(x, learned, seen, residual, SLICES, init_from_data=10**6, init_std_alpha=3.0)
            return learned

        return run

    return {"op": start(ops), "reference": start(reference)}


def bench_extrema(size: int, normal: Callable[..., Tensor], race: Race) -> None:
    x = normal(size, size)
    race(
        {
            "op": lambda: ops.extrema(x, SLICES),
            "reference": lambda: reference.extrema(x, SLICES),
            "torch": lambda: torch.stack(x.view(size, SLICES, -1).aminmax(dim=2)).amax(1),
        },
        inputs=[x],
    )
