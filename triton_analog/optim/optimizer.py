"""An optimizer of any class that clips analog weights, and draws new weight noise, after each of its steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.before_step import before_step_outside
from triton_analog.nn.outside import check_layers
from triton_analog.nn.programmed import refuse_chips
from triton_analog.optim.after_step import AfterStep
from triton_analog.optim.decay import decayed
from triton_analog.optim.layers import KnownLayers, Layers


class AnalogOptimizer(Optimizer):
    """``AnalogOptimizer(SGD, model.analog_layers, model.parameters(), lr=0.1)``: an ``SGD`` that clips analog weights.

    The result is an instance of the given optimizer class. After each of its steps, the weight of every analog layer is
    clipped as ``clip_weights()`` does it, unless it is frozen; a weight that layers share is clipped once for equal clips.
    Then the noise of the next step is drawn, as ``redraw_weight_noise()`` does it, where ``modifier.refresh`` makes it last.
    Closures, schedulers, gradient scalers and state dicts work as with the given class; a copy or pickle takes the model
    along.

    This takes a few launches for all layers together and never waits for the device, so that a CUDA graph may capture whole
    steps (``capturable=True`` of the given class). Take a step or more before the capture, as torch asks for anyway: a step
    that is captured before any other clips one weight after the other. A graph keeps the clips that it was captured with.

    Weight decay would pull input ranges and learned clips towards 0, so that a warning says where they decay:
    :func:`parameter_groups` makes groups in which they do not.

    Args:
        optimizer_class: A subclass of ``torch.optim.Optimizer``.
        analog_layers: The method ``model.analog_layers``, with which layers that were replaced later are known too; or the
            layers themselves, ``model.analog_layers()``, which are listed once.
        args: For ``optimizer_class``, the parameters first.
        kwargs: For ``optimizer_class``.

    Raises:
        TypeError: one of the first two arguments is something else.
        ValueError: an iterable without any analog layer, such as a generator that was used up before; a layer on a simulated
            chip; or one whose weight has become another shape.
    """

    _analog_layers: Layers
    _wrapped: type[Optimizer]
    _own_hook: Any
    _after_step: AfterStep
    _warned_of_decay = False
    has_analog_steps = True
    """Whether its compiled steps are seen, too."""

    def __new__(cls, optimizer_class: Any, /, *args: Any, **kwargs: Any) -> AnalogOptimizer:
        return super().__new__(_subclass(_check_class(optimizer_class)))

    def __init__(self, optimizer_class: type[Optimizer], /, analog_layers: Any, *args: Any, **kwargs: Any) -> None:
        self._analog_layers = _check_layers(analog_layers)
        owner = getattr(analog_layers, "__self__", None)
        listed = self._analog_layers if isinstance(self._analog_layers, list) else []
        for module in [owner] if isinstance(owner, nn.Module) else listed:
            refuse_chips(module, "an optimizer")
            check_layers(module)
        super().__init__(*args, **kwargs)
        self._watch_steps()

    def _watch_steps(self) -> None:
        self._after_step = AfterStep(KnownLayers(self._analog_layers))
        self._own_hook = self.register_step_post_hook(_after_step)
        self.register_step_pre_hook(before_compiled)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        super().add_param_group(param_group)
        layers = self._analog_layers
        found = decayed(layers() if callable(layers) else layers, self.param_groups[-1])
        if found and not self._warned_of_decay:
            self._warned_of_decay = True
            warnings.warn(
                f"weight_decay: {self.param_groups[-1]['weight_decay']} of this {type(self).__name__} pulls {len(found)} input "
                "range(s) and learned clip(s) towards 0, with a gradient or without; build it from "
                "triton_analog.optim.parameter_groups(model, weight_decay=...) instead of model.parameters()",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_analog_layers": self._analog_layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_analog_layers" in state:  # a copy or pickle; load_state_dict also comes here, with less
            self._watch_steps()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._wrapped,), self.__getstate__()


def before_compiled(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    """What every optimizer does by itself before an eager step (:mod:`triton_analog.nn.before_step`), where that is compiled."""
    return before_step_outside(optimizer, args, kwargs) if torch.compiler.is_compiling() else None


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    optimizer._after_step(optimizer)  # type: ignore[attr-defined]


def _check_class(optimizer_class: Any) -> type[Optimizer]:
    good = isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)
    if not good or issubclass(optimizer_class, AnalogOptimizer):
        given = getattr(optimizer_class, "__qualname__", repr(optimizer_class))
        raise TypeError(
            f"optimizer_class: got {given}; the class of a torch optimizer is needed, such as torch.optim.SGD"
        )
    return optimizer_class


def _check_layers(layers: Any) -> Layers:
    remedy = "pass the method model.analog_layers (convert_to_analog and AnalogWrapper give every model one)"
    if callable(layers) and not isinstance(layers, nn.Module):  # modules are callable, but give outputs
        return layers
    if isinstance(layers, nn.Module) or not isinstance(layers, Iterable):
        raise TypeError(f"analog_layers: got {type(layers).__name__}; {remedy}")
    listed = list(layers)
    for layer in listed:
        if not isinstance(layer, AnalogLayerBase):
            raise TypeError(f"analog_layers: got an iterable that holds a {type(layer).__name__}; {remedy}")
    if not listed:
        raise ValueError(f"analog_layers: got an iterable without any layer, or one that was used up before; {remedy}")
    return listed


_subclasses: dict[type[Optimizer], type[AnalogOptimizer]] = {}


def _subclass(optimizer_class: type[Optimizer]) -> type[AnalogOptimizer]:
    """The analog version of an optimizer class: made once per class object, with its name."""
    if optimizer_class not in _subclasses:
        body = {
            "__module__": optimizer_class.__module__,
            "__doc__": optimizer_class.__doc__,
            "_wrapped": optimizer_class,
        }
        _subclasses[optimizer_class] = type(optimizer_class.__name__, (AnalogOptimizer, optimizer_class), body)
    return _subclasses[optimizer_class]


def _rebuild(optimizer_class: type[Optimizer]) -> Any:
    """An analog optimizer without state, for copies and pickles."""
    return Optimizer.__new__(_subclass(optimizer_class))
