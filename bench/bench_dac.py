"""The input converter, against a plain ``clamp``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.operations import SLICES, Race
from triton_analog import ops, reference


def bench_dac(size: int, normal: Callable[..., Tensor], race: Race) -> None:
    x = normal(size, size)
    r = torch.full((SLICES,), 2.0, device=x.device)
    race(
        {
            "op": lambda: ops.dac(x, r, SLICES, 2**8 - 2),
            "reference": lambda: reference.dac(x, r, SLICES, 2**8 - 2),
            "torch": lambda: x.clamp(-2, 2),
        },
        inputs=[x],
    )
