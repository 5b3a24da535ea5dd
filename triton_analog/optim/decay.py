"""Weight decay, and what it must leave alone: input ranges and learned clips, which it would pull towards 0.

A range or clip near 0 is no simpler model but one that clamps everything; what limits a range is its own ``decay``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from triton_analog.nn.base import AnalogLayerBase, named_analog_layers
from triton_analog.nn.settings import UNDECAYED
from triton_analog.optim.layers import KnownLayers

_MARKS = ("_no_weight_decay", "_no_wd")
"""Attributes by which models mark a parameter that is not to decay."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters of ``model`` for an optimizer: those that decay, and those that do not.

    Matrices decay: parameters of two and more dimensions. Biases and the weights of norms, all of fewer, do not, nor do
    input ranges and learned clips, nor what the model itself exempts: by names, in a method ``no_weight_decay()``, or by
    ``parameter._no_weight_decay = True``. Tied parameters come once, frozen ones not at all. ::

        AnalogOptimizer(AdamW, model.analog_layers, parameter_groups(model, weight_decay=0.1), lr=1e-3)

    Args:
        model: Any model, converted or not.
        weight_decay: Of the first group, ``>= 0``; the second has 0. A group without parameters is left out.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``weight_decay`` is no number ``>= 0``, or the model has nothing to train.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; a torch.nn.Module is needed")
    number = isinstance(weight_decay, int | float) and not isinstance(weight_decay, bool)
    if not number or not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay: got {weight_decay!r}; a finite number >= 0 is needed, such as 0.1; 0 is off")
    exempt = no_weight_decay(model)
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            marked = name in exempt or any(getattr(parameter, mark, False) for mark in _MARKS)
            is_vector = parameter.ndim < 2 or name.endswith("bias")  # biases of experts are stacked
            (others if marked or is_vector else decayed).append(parameter)
    if not decayed and not others:
        raise ValueError(f"model: this {type(model).__name__} has no parameter that requires a gradient")
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def no_weight_decay(model: nn.Module) -> set[str]:
    """The names of parameters that must not decay, for trainers that take such names: input ranges and learned clips, and
    what a method ``no_weight_decay()`` of the model itself names."""
    own = getattr(model, "no_weight_decay", None)
    names = set(own()) if callable(own) else set()
    exempt = _exempt(layer for _, layer in named_analog_layers(model))
    return names | {name for name, parameter in model.named_parameters() if id(parameter) in exempt}


def decayed(layers: Iterable[AnalogLayerBase], group: dict[str, Any]) -> list[Tensor]:
    """The trained input ranges and learned clips of ``layers`` that this group of an optimizer decays."""
    if not group.get("weight_decay"):
        return []
    exempt = _exempt(layers)
    return [parameter for parameter in group["params"] if id(parameter) in exempt and parameter.requires_grad]


def _exempt(layers: Iterable[AnalogLayerBase]) -> set[int]:
    return {id(layer._parameters.get(name)) for layer in layers for name in UNDECAYED}.difference({id(None)})


class WithoutDecay:
    """Keeps the input ranges and learned clips of ``layers`` from decaying in the steps of an optimizer that exists.

    They are in a group of their own while it steps, and in that of its builder otherwise: schedulers, which know the groups
    by their number, and state dicts of the optimizer need not know.
    """

    def __init__(self, layers: KnownLayers, optimizer: Optimizer) -> None:
        self._layers = layers
        self._split: list[tuple[dict[str, Any], list[Tensor]]] = []
        self._own: list[dict[str, Any]] = []
        self._hooks = (
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before)),
            optimizer.register_step_post_hook(torch.compiler.disable(self._after)),
            optimizer.register_state_dict_pre_hook(self._after),  # after a step that failed
        )

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._after(optimizer)
        for group in list(optimizer.param_groups):
            exempt = decayed(self._layers(), group)
            if exempt:
                ids, together = set(map(id, exempt)), group["params"]
                group["params"] = [parameter for parameter in together if id(parameter) not in ids]
                self._split.append((group, together))
                self._own.append({**group, "params": exempt, "weight_decay": type(group["weight_decay"])(0)})
        optimizer.param_groups.extend(self._own)

    def _after(self, optimizer: Optimizer, *args: Any) -> None:
        if self._split:
            own = set(map(id, self._own))
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if id(group) not in own]
            for group, together in self._split:
                group["params"] = together
            self._split, self._own = [], []
