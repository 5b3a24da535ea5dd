"""What a model computes for a batch: vectors that its analog layers multiply, and products of its digital modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.backends import mha

from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.one_forward import OneForward
from triton_analog.samples import products_as, undisturbed
from triton_analog.summary.products import CountedProducts


class Work:
    """Of modules, by their ids."""

    def __init__(self) -> None:
        self.vectors: Counter[int] = Counter()
        """Input vectors of analog layers."""
        self.macs: Counter[int] = Counter()
        """Multiply-adds of the others, without those of the modules below them."""


def work_of(model: nn.Module, run: Callable[[nn.Module], Any]) -> Work:
    """What ``run(model)`` computes, in evaluation mode; the model is then what it was, whatever happens.

    Digital products are those of matrices, convolutions and attention.
    """
    work = Work()
    layers = [module for module in model.modules() if isinstance(module, AnalogMatrixLayer)]
    with (
        undisturbed(model),
        _without_fast_path(),
        products_as((layer, partial(_counted, layer, work.vectors)) for layer in layers),
        CountedProducts() as counter,
        _each_module(model, counter, work.macs),
    ):
        run(model)
    for layer in layers:
        del work.macs[id(layer)]
    return work


def _counted(
    layer: AnalogMatrixLayer, vectors: Counter[int], x: Tensor, one_forward: OneForward | None = None
) -> Tensor:
    y = type(layer).analog_matmul(layer, x, one_forward)
    vectors[id(layer)] += y.numel() // y.shape[-1]
    return y


@contextmanager
def _each_module(model: nn.Module, counter: CountedProducts, macs: Counter[int]) -> Iterator[None]:
    """While it lasts, what every module itself adds to ``counter.macs`` is added to ``macs``."""
    below: list[int] = [0]
    started: list[int] = []

    def enter(module: nn.Module, args: Any) -> None:
        started.append(counter.macs)
        below.append(0)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        inside = counter.macs - started.pop()
        macs[id(module)] += inside - below.pop()
        below[-1] += inside

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """While it lasts, torch's encoder layers compute in operators that are counted, rather than in one for a whole layer."""
    before = mha.get_fastpath_enabled()
    try:
        mha.set_fastpath_enabled(False)
        yield
    finally:
        mha.set_fastpath_enabled(before)
