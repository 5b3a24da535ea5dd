"""The largest magnitude of every row and slice, against ``abs().amax()``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.operations import SLICES, Race
from triton_analog import ops, reference


def bench_absmax(size: int, normal: Callable[..., Tensor], race: Race) -> None:
    x = normal(size, size)
    race(
        {
            "op": lambda: ops.absmax(x, SLICES),
            "reference": lambda: reference.absmax(x, SLICES),
            "torch": lambda: x.view(size, SLICES, -1).abs().amax(2).T,
        },
        inputs=[x],
    )
