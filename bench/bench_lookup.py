"""What every launch asks for first, its configuration, against a call of ``torch.empty(0)``."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.operations import Race
from triton_analog.launch import hardware
from triton_analog.launch.lookup import choose, explain
from triton_analog.launch.space import Problem
from triton_analog.tuning.spaces import spaces


def bench_lookup(size: int, seed: Tensor, race: Race) -> None:
    """``op``: as a launcher does, made before and cached. ``reference``: not cached, from files that were read before."""
    space = spaces()["matmul"]
    dtype, sizes, flags = torch.bfloat16, (size, size, 512), (True, True, False)
    problem = Problem(hardware(seed.device), dtype, sizes, flags)

    def chosen() -> object:
        return choose(space, seed.device, dtype, sizes, flags)

    assert chosen() == explain(space, problem).config
    race({"op": chosen, "reference": lambda: explain(space, problem).config, "torch": lambda: torch.empty(0)})
