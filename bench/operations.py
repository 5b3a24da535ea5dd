"""The operations one by one: finds the modules ``bench_*.py``, and runs what they set up.

A bench is a function ``bench_X(size, ...)`` that ends in ``race({"op": f, "reference": g, "torch": h}, inputs=..., flops=...)``:
the public operation, the torch reference that it has to agree with, and the nearest thing in plain torch, which may do less.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.race import WrongResultError, disagreements

SLICES = 4
TOLERANCE = 1e-2

Race = Callable[..., None]
Function = Callable[[], Any]


class Operation:
    """What a bench set up: its contenders, and what they have to do."""

    functions: Mapping[str, Function]
    flops: float
    inputs: Sequence[Tensor]

    def __init__(self, name: str, bench: Callable[..., None]) -> None:
        self.name, self.bench = name, bench

    def set_up(self, size: int, device: torch.device) -> Operation:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        offered = {
            "size": size,
            "normal": lambda *shape: torch.randn(shape, device=device, dtype=dtype),
            "seed": torch.tensor([1234], device=device),
            "race": self.race,
        }
        self.bench(**{name: offered[name] for name in inspect.signature(self.bench).parameters})
        return self

    def race(self, functions: Mapping[str, Function], inputs: Sequence[Tensor] = (), flops: float = 0.0) -> None:
        self.functions, self.inputs, self.flops = functions, inputs, flops

    def check(self) -> None:
        """The operation against its reference.

        Raises:
            WrongResultError: they disagree.
        """
        found = disagreements(named(self.functions["op"]()), named(self.functions["reference"]()), TOLERANCE)
        if found:
            raise WrongResultError("; ".join(found.values()))

    def least_bytes(self) -> int:
        """Every input read once, every result written once."""
        return sum(t.nbytes for t in (*self.inputs, *named(self.functions["op"]()).values()) if isinstance(t, Tensor))


def named(result: Any) -> dict[str, Tensor]:
    """The tensors of a result, by their place in it; not packed flags, of which a tie may change any."""
    items = result if isinstance(result, tuple) else (result,)
    return {
        f"result {i}": item
        for i, item in enumerate(items)
        if isinstance(item, Tensor) and item.dtype != torch.int32 and item.numel() > 0
    }


def operations() -> dict[str, Operation]:
    """By name, such as "matmul"."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        module = import_module(f"bench.{path.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("bench_"):
                found[name.removeprefix("bench_")] = Operation(name.removeprefix("bench_"), function)
    return found
