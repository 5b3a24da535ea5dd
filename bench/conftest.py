"""What the benches share: where they run, their sizes, and the race between contenders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
SLICES = 4
SIZES = [1024, 4096] if HAS_GPU else [256, 1024]
CONTENDERS = ["op", "reference", "torch"]

if not HAS_GPU:  # one thread: on a shared machine the times of several tell more about its other users
    torch.set_num_threads(1)

Race = Callable[[dict[str, Callable[[], Any]]], None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every bench runs at every size, once for each contender."""
    metafunc.parametrize("size", SIZES)
    metafunc.parametrize("contender", CONTENDERS)


@pytest.fixture
def normal() -> Callable[..., Tensor]:
    """Normal numbers of a shape: fp32 on the CPU, bf16 on the GPU."""
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if HAS_GPU else ("cpu", torch.float32)
    return lambda *shape: torch.randn(shape, device=device, dtype=dtype)


@pytest.fixture
def seed() -> Tensor:
    return torch.tensor([1234], device="cuda" if HAS_GPU else "cpu")


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest, size: int, contender: str) -> Race:
    """``race({"op": f, "reference": g, "torch": h})`` times the contender whose turn it is.

    The results of ``op`` are held against those of ``reference`` first. ``torch`` is the nearest thing in plain torch and
    may compute less, so only the shape of its first result has to agree.
    """

    def start(contenders: dict[str, Callable[[], Any]]) -> None:
        function = contenders[contender]
        check(results(function), results(contenders["reference"]), same_values=contender != "torch")
        benchmark.group = f"{request.node.originalname.removeprefix('bench_')} {size}"
        benchmark(synchronized(function) if HAS_GPU else function)

    return start


def results(function: Callable[[], Any]) -> list[Tensor]:
    result = function()
    return [result] if isinstance(result, Tensor) else list(result)


def check(given: list[Tensor], expected: list[Tensor], same_values: bool) -> None:
    assert given[0].shape == expected[0].shape
    if same_values:
        for a, b in zip(given, expected, strict=True):
            # By norm: a value on the edge between two quantization steps may go either way.
            assert (a.double() - b.double()).norm() <= 1e-2 * b.double().norm()


def synchronized(function: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        function()
        torch.cuda.synchronize()

    return run
