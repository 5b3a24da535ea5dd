"""A weight as the devices of a chip hold it, programmed and after a day, against the formulas of one device in plain torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from bench.operations import SLICES, Race
from triton_analog import ops, reference
from triton_analog.inference import PCMLikeNoiseModel

DAY = 86400.0


def _race(w: Tensor, seed: Tensor, time: float | None, race: Race) -> None:
    at = PCMLikeNoiseModel().at(time)
    wmax, curves = ops.absmax(w, SLICES), at.pop("curves").to(w.device)
    defaults = {
        name: p.default for name, p in inspect.signature(ops.program).parameters.items() if p.kind is p.KEYWORD_ONLY
    }

    def plain_torch() -> Tensor:
        """Both devices of a pair with normals of torch's own, and drift and reading without their laws."""
        held = []
        for side in (w, -w):
            g = (side * 25).clamp(min=0)
            g = (g + (0.26 + 0.08 * g - 0.002 * g * g) * torch.randn_like(g)).clamp(min=0)
            if time is not None:
                g = g * (DAY / 20) ** -(0.05 + 0.01 * torch.randn_like(g)).abs()
                g = g * (1 + 0.05 * torch.randn_like(g))
            held.append(g)
        return (held[0] - held[1]) / 25

    race(
        {
            "op": lambda: ops.program(w, wmax, seed, curves, **at),
            "reference": lambda: reference.program(w, wmax, seed, curves, **(defaults | at)),
            "torch": plain_torch,
        },
        inputs=[w],
    )


def bench_program(size: int, normal: Callable[..., Tensor], seed: Tensor, race: Race) -> None:
    _race(normal(size, size), seed, None, race)


def bench_program_and_drift(size: int, normal: Callable[..., Tensor], seed: Tensor, race: Race) -> None:
    _race(normal(size, size), seed, DAY, race)
