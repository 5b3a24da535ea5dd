"""What comes before each step of an optimizer that steps input ranges: their shift goes into what is stepped, and they decay.
And after one that is fused: its changes are made known.

Every optimizer of torch is watched, as layers cannot know theirs; whoever steps in another way calls
:func:`triton_analog.optim.before_step`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from triton_analog.hints import warn_user
from triton_analog.nn.compilers import outside_of_graphs, run_while_tracing
from triton_analog.nn.sharding import is_dtensor, own_part

_layers: weakref.WeakSet[Any] = weakref.WeakSet()
_inner: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Optimizers that others call for a part of their own parameters, which have had it all before."""


class _Steps:
    taken = 0


STEPS = _Steps()
"""Of all optimizers, since the first layer was trained and as far as they are seen."""


def watch(layer: Any) -> None:
    """Do this work for ``layer`` (a ``RangeShift``) before each step of an optimizer that steps its input range."""
    _start()
    _layers.add(layer)


@cache
def _start() -> None:
    register_optimizer_step_pre_hook(_before_a_step)
    register_optimizer_step_post_hook(_after_a_step)


def _after_a_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """A fused step changes parameters without raising their versions, by which layers and chips see that they were changed."""
    if torch.compiler.is_compiling():
        return
    fused = [group["params"] for group in optimizer.param_groups if group.get("fused")]
    changed = [parameter for parameters in fused for parameter in parameters if not is_dtensor(parameter)]
    if changed:
        increment_version(changed)


def _before_a_step(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        if not getattr(optimizer, "has_analog_steps", False):
            _say_what_is_not_seen()
        return None
    return before_step_of(optimizer, args, kwargs)


@run_while_tracing
def _say_what_is_not_seen() -> None:
    layers = [layer for layer in _layers if layer.input_range is not None and layer.training]
    if layers:
        warn_user(
            f"the step of an optimizer is compiled, so that {len(layers)} input range(s) do not decay, nor learn from data where "
            "they are sharded; build an AnalogOptimizer, use triton_analog.optim.attach, or leave the step eager"
        )


def before_step_of(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    """The work before a step of ``optimizer`` with these arguments, as a pre-hook of a step. A closure takes the gradients
    itself, so the work comes after each of its calls."""
    STEPS.taken += 1
    if optimizer in _inner:
        return None
    inner = getattr(optimizer, "optim", None)  # as torch's ZeroRedundancyOptimizer has it
    if isinstance(inner, Optimizer):
        _inner.add(inner)
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        _prepare(optimizer)
        return None

    def closure_and_work() -> Any:
        loss = closure()
        _prepare(optimizer)
        return loss

    if len(args) > 1:
        return (args[0], closure_and_work, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure_and_work}


before_step_outside = outside_of_graphs(before_step_of)


def _prepare(optimizer: Optimizer) -> None:
    layers = {id(layer._parameters.get("input_range")): layer for layer in _layers}
    layers.pop(id(None), None)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = [layers.pop(id(parameter)) for parameter in held if id(parameter) in layers]
    # Frozen ranges learn from data too, and then nobody may hold them.
    frozen = [layer for layer in layers.values() if not layer._parameters["input_range"].requires_grad]
    fold_shifts(layer for layer in frozen if is_dtensor(layer._parameters["input_range"]))
    prepare(found, getattr(optimizer, "grad_scale", None))  # the scale that a fused optimizer divides by itself


@torch.no_grad()
def prepare(layers: Sequence[Any], scale: Tensor | None = None) -> None:
    """Fold the shifts of ``layers`` and add decays to their ranges' gradients, which are ``scale`` times what they should be."""
    fold_shifts(layers)
    grads, ranges, dues = [], [], []
    for layer, range_, due in decays_of(layers):
        if range_.grad is not None:
            grad, own, due = _parts(layer, range_, due if scale is None else due * scale.to(due.device))
            grads.append(grad)
            ranges.append(own.detach().to(grad))
            dues.append(due.to(grad))
    if grads:
        torch._foreach_addcmul_(grads, ranges, dues)


def fold_shifts(layers: Iterable[Any]) -> None:
    """Put the shifts of layers into their stored ranges."""
    for layer in layers:
        if layer.is_shifted():
            layer.fold_shift(layer._parameters["input_range"])
            layer.drop_shift()


def _parts(layer: Any, range_: Any, due: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's parts of the gradient, the range and the decay."""
    if not is_dtensor(range_):
        return range_.grad, range_, due
    return range_.grad.to_local(), range_.to_local(), due[own_part(layer, range_)]


class _Together(NamedTuple):
    """Layers whose decays are found at once."""

    group: Any
    device: torch.device
    decay: float
    least_share: float


@torch.no_grad()
def decays_of(layers: Sequence[Any]) -> list[tuple[Any, Tensor, Tensor]]:
    """Layer, range and, for each slice, what its gradient gets as a multiple of the range: the decay, where the share of
    unclipped inputs asks for it, over all that was counted since the last step on all ranks of the layer's group.

    Ranks call it together, with their layers in one order.
    """
    together: dict[_Together, list[Any]] = {}
    for layer in layers:
        range_, config = layer._parameters["input_range"], layer.rpu_config.pre_post.input_range
        if config.decay > 0 and not config.fast_mode and range_.requires_grad and layer.range_tally is not None:
            key = _Together(
                layer._statistics_group(), layer.range_tally.device, config.decay, config.input_min_percentage
            )
            together.setdefault(key, []).append(layer)
    found = []
    for key, own in together.items():
        counted = [layer.take_tally() for layer in own]
        if key.group is None and all(counts is None for counts in counted):
            continue
        filled = zip(own, counted, strict=True)
        counts = torch.cat([torch.zeros_like(layer.range_tally) if c is None else c for layer, c in filled], 1)
        if key.group is not None:
            dist.all_reduce(counts, group=key.group)
        due = (counts[0] / counts[1] > key.least_share).to(counts.dtype) * key.decay
        parts = due.split([layer.range_tally.shape[1] for layer in own])
        found += [(layer, layer._parameters["input_range"], part) for layer, part in zip(own, parts, strict=True)]
    return found
