"""The standard deviation of every slice, against ``Tensor.std`` of one slice after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.operations import SLICES, Race
from triton_analog import ops, reference


def bench_std(size: int, normal: Callable[..., Tensor], race: Race) -> None:
    x = normal(size, size)
    race(
        {
            "op": lambda: ops.std(x, SLICES),
            "reference": lambda: reference.std(x, SLICES),
            "torch": lambda: torch.stack([part.std() for part in x.chunk(SLICES, dim=1)]),
        },
        inputs=[x],
    )
