"""``pytest bench``: the operations one by one under pytest-benchmark, which has its own options, statistics and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.operations import Function, Operation, Race

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [1024, 4096] if DEVICE.type == "cuda" else [256, 1024]

if DEVICE.type == "cpu":  # one thread: on a shared machine the times of several tell more about its other users
    torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every bench runs at every size, once for each contender."""
    metafunc.parametrize("size", SIZES)
    metafunc.parametrize("contender", ["op", "reference", "torch"])


@pytest.fixture
def normal() -> Callable[..., Tensor]:
    """Normal numbers of a shape: fp32 on the CPU, bf16 on the GPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    return lambda *shape: torch.randn(shape, device=DEVICE, dtype=dtype)


@pytest.fixture
def seed() -> Tensor:
    return torch.tensor([1234], device=DEVICE)


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest, size: int, contender: str) -> Race:
    """Times the contender whose turn it is, after ``op`` has agreed with ``reference``."""

    def start(functions: Mapping[str, Function], inputs: Sequence[Tensor] = (), flops: float = 0.0) -> None:
        operation = Operation(request.node.originalname.removeprefix("bench_"), request.function)
        operation.race(functions, inputs, flops)
        operation.check()
        benchmark.group = f"{operation.name} {size}"
        function = functions[contender]
        benchmark(synchronized(function) if DEVICE.type == "cuda" else function)

    return start


def synchronized(function: Function) -> Callable[[], None]:
    def run() -> None:
        function()
        torch.cuda.synchronize()

    return run
