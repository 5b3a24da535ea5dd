"""Running a model on sample data: what a batch may be, evaluation for a while, and seeing what layers multiply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from triton_analog.nn.matrix import AnalogMatrixLayer

Layers = dict[str, AnalogMatrixLayer]


def analog_layers(model: Any) -> Layers:
    """The analog layers of ``model`` by name, each once.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; a torch.nn.Module with analog layers is needed")
    modules = {name or type(module).__name__: module for name, module in model.named_modules()}
    layers = {name: module for name, module in modules.items() if isinstance(module, AnalogMatrixLayer)}
    if not layers:
        raise ValueError("model: it has no analog layer; convert it with convert_to_analog first")
    return layers


def check_forward(forward: Any) -> None:
    """``forward`` is a function of a model and a batch, or None.

    Raises:
        TypeError: it is something else.
    """
    if forward is not None and not callable(forward):
        raise TypeError(f"forward: got {forward!r}; a function forward(model, batch) is needed")


def check_batches(batches: Any) -> None:
    """``batches`` are several, and not one of them.

    Raises:
        TypeError: they are something else.
    """
    if isinstance(batches, Tensor | Mapping | PackedSequence | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches: got a {type(batches).__name__}; several batches are needed: a DataLoader, or a list, such as [batch]"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module of ``model`` is in evaluation mode while it lasts, and then in the one that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """While it lasts, ``model`` evaluates, uncompiled and without gradients. Then modes and torch's generators are what they
    were."""
    gpus: dict[str, set[int]] = {}
    for parameter in model.parameters():
        if parameter.device.type not in ("cpu", "meta"):
            gpus.setdefault(parameter.device.type, set()).add(parameter.device.index)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))  # that of the CPU
        for kind, indices in gpus.items():
            stack.enter_context(torch.random.fork_rng(sorted(indices), device_type=kind))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(evaluating(model))
        yield


@contextmanager
def products_as(replaced: Iterable[tuple[AnalogMatrixLayer, Callable[..., Tensor]]]) -> Iterator[None]:
    """While it lasts, each layer calls the function beside it in the place of its ``analog_matmul``.

    Every kind of layer multiplies in that method, which recurrent ones call several times per forward. So it is hidden by an
    attribute of the same name; the hooks of the user are left alone.
    """
    pairs = [(layer, function, vars(layer).get("analog_matmul")) for layer, function in replaced]
    try:
        for layer, function, _ in pairs:
            vars(layer)["analog_matmul"] = function
        yield
    finally:
        for layer, _, before in pairs:
            vars(layer).pop("analog_matmul", None)
            if before is not None:
                vars(layer)["analog_matmul"] = before


def with_progress(batches: Iterable[Any], what: str) -> Iterable[Any]:
    """``batches`` with a progress bar, or as it is where there is none to show."""
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    return tqdm(batches, desc=what, unit="batch")


def run_batch(model: nn.Module, batch: Any, argument: str) -> None:
    """Hand ``model`` what it takes of a batch.

    Raises:
        TypeError: ``batch`` is none of the kinds that are known. The message names the ``argument`` that it came in.
    """
    match batch:
        case PackedSequence():
            model(batch)
        case [tuple() | list() as args, Mapping() as kwargs]:
            model(*args, **kwargs)
        case [Tensor(), Mapping()]:
            raise _no_batch(batch, argument)  # keyword arguments, or labels
        case Tensor() as x:
            model(x)
        case [Tensor() as x, *_]:
            model(x)
        case Mapping() as kwargs:
            model(**kwargs)
        case [Mapping() as kwargs, *_]:
            model(**kwargs)
        case _:
            raise _no_batch(batch, argument)


def _no_batch(batch: Any, argument: str) -> TypeError:
    given = type(batch).__name__
    if isinstance(batch, tuple | list):
        given += f" of {', '.join(type(part).__name__ for part in batch)}"
    return TypeError(
        f"{argument}: got a batch that is a {given}; allowed are a tensor or a mapping of keyword arguments, alone or as the "
        "first in a tuple or list (with labels), and (args, kwargs), such as ((x,), {}); for anything else give "
        "forward=lambda model, batch: model(...)"
    )
