"""A weight quantized and disturbed, with its scale, against one disturbed by ``torch.randn_like``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from conftest import SLICES, Race
from torch import Tensor

from triton_analog import ops, reference


def bench_weight(size: int, normal: Callable[..., Tensor], seed: Tensor, race: Race) -> None:
    w = normal(size, size)
    settings = {"quantization": "per_channel", "res": 2**8 - 2, "noise_type": "per_channel", "std_dev": 0.05}
    race(
        {
            "op": lambda: ops.weight(w, SLICES, seed=seed, **settings),
            "reference": lambda: reference.weight(w, SLICES, seed=seed, **settings),
            "torch": lambda: w + 0.05 * w.abs().amax(1, keepdim=True) * torch.randn_like(w),
        }
    )
