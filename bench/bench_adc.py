"""The output converter with its noise, against ``clamp`` of the sum with ``torch.randn_like``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.operations import Race
from triton_analog import ops, reference


def bench_adc(size: int, normal: Callable[..., Tensor], seed: Tensor, race: Race) -> None:
    y = normal(size, size)
    r = torch.ones(1, device=y.device)
    wmax = torch.ones(1, device=y.device)
    settings = {"out_noise": 0.04, "noise_wmax": wmax, "out_bound": 2.0, "bound_wmax": wmax, "out_res": 2**8 - 2}
    race(
        {
            "op": lambda: ops.adc(y, r, seed=seed, **settings),
            "reference": lambda: reference.adc(y, r, seed=seed, **settings)[0],
            "torch": lambda: (y + 0.04 * torch.randn_like(y)).clamp(-2, 2),
        },
        inputs=[y],
    )
