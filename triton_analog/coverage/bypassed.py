"""Analog layers that never compute, as their parents read the weight and multiply with it themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.utils._pytree import tree_leaves

from triton_analog.hints import names_of
from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.matrix import AnalogMatrixLayer

_REMEDY = (
    "Leave them digital (exclude_modules=[...] of convert_to_analog), or change their parents to call the layers instead of "
    "reading their weights"
)

# ---- While training -----------------------------------------------------------------------------------------------------


def watch_first_forward(model: nn.Module) -> None:
    """After the first training forward of ``model``, warn of layers whose weights it used without calling them.

    By a hook that removes itself then, and that copies and pickles of the model have too until then.
    """
    is_layer = isinstance(model, AnalogLayerBase) and not model.IS_CONTAINER  # which has no parent to read it
    if not is_layer and _after_forward not in model._forward_hooks.values():
        model.register_forward_hook(_after_forward)


def stop_watching(model: nn.Module) -> None:
    """The reverse of :func:`watch_first_forward`."""
    for key, hook in list(model._forward_hooks.items()):
        if hook is _after_forward:
            del model._forward_hooks[key]


def _after_forward(model: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
        return
    stop_watching(model)
    unreached = _unreached(model)
    if unreached:
        used = _leaves(output, {id(bypassed.source) for bypassed in unreached})
        _warn([bypassed for bypassed in unreached if id(bypassed.source) in used])


def warn_of_gradients(model: nn.Module) -> None:
    """Warn of layers whose weights have gradients though no forward has called them. Waits for the device if there are any."""
    unreached = [bypassed for bypassed in _unreached(model) if bypassed.source.grad is not None]
    if any(bypassed.source.is_cuda for bypassed in unreached) and torch.cuda.is_current_stream_capturing():
        return
    _warn([bypassed for bypassed in unreached if bypassed.source.grad.any()])  # type: ignore[union-attr]


class _Bypassed(NamedTuple):
    """Layers of which no forward has called any so far."""

    name: str
    """Of the module that holds the parameter with their weights."""
    source: Tensor
    """That parameter, which nothing else holds."""
    layers: list[AnalogMatrixLayer]


def _unreached(model: nn.Module) -> list[_Bypassed]:
    holders: dict[int, list[str]] = {}
    found: dict[int, _Bypassed] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(name)
        source = module.weight_source if isinstance(module, AnalogMatrixLayer) else None
        if source is not None:
            found.setdefault(id(source), _Bypassed("", source, [])).layers.append(module)
    return [
        bypassed._replace(name=holders[source][0])
        for source, bypassed in found.items()
        if len(holders.get(source, ())) == 1 and not any(layer.was_called for layer in bypassed.layers)
    ]


def _leaves(output: Any, wanted: Collection[int]) -> set[int]:
    """Which tensors, by their ids, ``output`` was computed of."""
    nodes = [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    seen: set[Any] = set(nodes)
    found: set[int] = set()
    while nodes and len(found) < len(wanted):
        node: Any = nodes.pop()
        if hasattr(node, "variable") and id(node.variable) in wanted:
            found.add(id(node.variable))
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                nodes.append(after)
    return found


def _warn(found: list[_Bypassed]) -> None:
    if not found:
        return
    for bypassed in found:
        for layer in bypassed.layers:
            layer.was_called = True  # nothing to say twice
    names = list(dict.fromkeys(bypassed.name for bypassed in found))
    warnings.warn(
        f"{len(names)} analog layer(s) take part in the training without ever being called: {names_of(names)}. Their parents "
        f"read the weights themselves, so that neither noise nor converters act on them. {_REMEDY}.",
        stacklevel=3,
    )


# ---- With a sample ------------------------------------------------------------------------------------------------------


def check_calls(model: nn.Module, layers: Mapping[str, nn.Module], sample: Any) -> list[str]:
    """Run ``model`` on ``sample`` in evaluation mode, without gradients, and warn of ``layers`` that it does not call.

    Args:
        model: Digital or analog; modes and parameters are as before afterwards.
        layers: By the names to use.
        sample: A tensor; a tuple or list of positional arguments; a mapping of keyword arguments; or ``(args, kwargs)``.

    Returns:
        The names of those whose weights were read instead.

    Raises:
        TypeError: ``sample`` is something else.
    """
    args, kwargs = _arguments(sample)
    called: set[int] = set()
    read: set[int] = set()
    modes = [(module, module.training) for module in model.modules()]
    fast_path = mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(mha.set_fastpath_enabled, fast_path)
        for module, mode in modes:
            stack.callback(setattr, module, "training", mode)
        mha.set_fastpath_enabled(False)  # an analog model takes none
        for layer in layers.values():
            handle = layer.register_forward_pre_hook(lambda module, args: called.add(id(module)))
            stack.callback(handle.remove)
        stack.enter_context(_reads_of(layers.values(), read.add))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        model(*args, **kwargs)
    silent = {name: layer for name, layer in layers.items() if id(layer) not in called}
    taken = [name for name, layer in silent.items() if id(layer) in read]
    missed = [name for name, layer in silent.items() if id(layer) not in read]
    parts = []
    if taken:
        parts.append(
            f"{len(taken)} layer(s) are never called, but their parents read the weights themselves, so that neither noise nor "
            f"converters act on them: {names_of(_with_parents(model, layers, taken))}. {_REMEDY}"
        )
    if missed:
        parts.append(f"this sample did not reach {len(missed)} layer(s), of which nothing is known: {names_of(missed)}")
    if parts:
        warnings.warn(f"check: {'. '.join(parts)}.", stacklevel=3)
    return taken


def _with_parents(model: nn.Module, layers: Mapping[str, nn.Module], names: Iterable[str]) -> list[str]:
    parents = {id(child): type(module).__name__ for module in model.modules() for child in module.children()}
    return [f"{name} (in {parents[id(layers[name])]})" if id(layers[name]) in parents else name for name in names]


def _arguments(sample: Any) -> tuple[Iterable[Any], Mapping[str, Any]]:
    match sample:
        case Tensor():
            return (sample,), {}
        case Mapping():
            return (), sample
        case [tuple() | list() as args, Mapping() as kwargs]:
            return args, kwargs
        case tuple() | list():
            return sample, {}
    raise TypeError(
        f"check: got {type(sample).__name__}; a sample of inputs is needed: a tensor, a tuple of positional arguments, a dict "
        "of keyword arguments, or (args, kwargs)"
    )


@contextmanager
def _reads_of(layers: Iterable[nn.Module], note: Callable[[int], Any]) -> Iterator[None]:
    """While it lasts, ``note(id(layer))`` whenever anything asks one of ``layers`` for a weight or bias.

    Parameters are found by ``__getattr__``, so each layer moves to a subclass with one of its own.
    """
    before = [(layer, type(layer)) for layer in layers]
    watched: dict[type, type] = {}

    def watch(kind: Any) -> type:
        def read(self: Any, name: str) -> Any:
            if name in self.__dict__["_parameters"]:
                note(id(self))
            return kind.__getattr__(self, name)

        return type(kind.__name__, (kind,), {"__getattr__": read, "__module__": kind.__module__})

    try:
        for layer, kind in before:
            layer.__class__ = watched.setdefault(kind, watch(kind))
        yield
    finally:
        for layer, kind in before:
            layer.__class__ = kind
