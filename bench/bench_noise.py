"""The normal field, against ``torch.randn``."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.operations import Race
from triton_analog import ops, reference


def bench_noise(size: int, seed: Tensor, race: Race) -> None:
    race(
        {
            "op": lambda: ops.noise(seed, size, size, stream=2),
            "reference": lambda: reference.noise(seed, size, size, stream=2, plane=0),
            "torch": lambda: torch.randn(size, size, device=seed.device),
        }
    )
