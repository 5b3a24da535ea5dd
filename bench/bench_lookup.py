"""What every launch asks for first, its configuration, against a call of ``torch.empty(0)``."""

from __future__ import annotations

from typing import Any

import torch

from triton_analog.launch import hardware
from triton_analog.tuning.lookup import choose, explain
from triton_analog.tuning.space import Problem, spaces


def bench_lookup(size: int, contender: str, benchmark: Any) -> None:
    """``op``: as a launcher does, made before and cached. ``reference``: not cached, from files that were read before."""
    space = spaces()["matmul"]
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype, sizes, flags = torch.bfloat16, (size, size, 512), (True, True, False)
    problem = Problem(hardware(device), dtype, sizes, flags)
    contenders = {
        "op": lambda: choose(space, device, dtype, sizes, flags),
        "reference": lambda: explain(space, problem).config,
        "torch": lambda: torch.empty(0),
    }
    assert contenders["op"]() == contenders["reference"]()
    benchmark.group = f"lookup {size}"
    benchmark(contenders[contender])
