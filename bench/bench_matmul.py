"""The analog product with both converters and output noise, against ``torch.nn.functional.linear``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.operations import SLICES, Race
from triton_analog import ops, reference


def bench_matmul(size: int, normal: Callable[..., Tensor], seed: Tensor, race: Race) -> None:
    x, w, bias = normal(size, size), normal(size, size), normal(size)
    r = torch.full((SLICES,), 3.0, device=x.device)
    wmax = reference.absmax(w, SLICES)
    converters = {"inp_res": 2**8 - 2, "out_bound": 12.0, "bound_wmax": wmax, "out_res": 2**8 - 2}
    noise = {"out_noise": 0.04, "noise_wmax": wmax, "seed": seed}
    race(
        {
            "op": lambda: ops.matmul(x, w, bias, r, SLICES, **converters, **noise),
            "reference": lambda: reference.matmul(x, w, bias, r, SLICES, **converters, **noise),
            "torch": lambda: linear(x, w, bias),
        },
        inputs=[x, w],
        flops=2 * size**3,
    )
