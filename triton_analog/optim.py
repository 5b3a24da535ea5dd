"""What follows each step of an optimizer: analog weights are clipped, and new weight noise is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer

from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.settings import GAUSSIAN_CLIP
from triton_analog.nn.tied import clip_each_weight

Layers = Callable[[], Iterable[AnalogLayerBase]] | list[AnalogLayerBase]
Masters = Mapping[int, Tensor]
"""What an optimizer steps in place of a weight, by the weight's id."""


class AnalogOptimizer(Optimizer):
    """``AnalogOptimizer(SGD, model.analog_layers, model.parameters(), lr=0.1)``: an ``SGD`` that clips analog weights.

    The result is an instance of the given optimizer class. After each of its steps, ``clip_weights()`` of every analog
    layer runs; a weight that layers share is clipped once for equal clips. Then ``redraw_weight_noise()`` of every layer
    draws the noise of the next step where ``modifier.refresh`` makes it last. Closures, schedulers, gradient scalers and
    state dicts work as with the given class; a copy or pickle takes the model along.

    Args:
        optimizer_class: A subclass of ``torch.optim.Optimizer``.
        analog_layers: The method ``model.analog_layers``, which is asked in each step and so also knows layers that were
            replaced later; or the layers themselves, ``model.analog_layers()``, which are listed once.
        args: For ``optimizer_class``, the parameters first.
        kwargs: For ``optimizer_class``.

    Raises:
        TypeError: one of the first two arguments is something else.
        ValueError: an iterable without any analog layer, such as a generator that was used up before.
    """

    _analog_layers: Layers
    _wrapped: type[Optimizer]

    def __new__(cls, optimizer_class: Any, /, *args: Any, **kwargs: Any) -> AnalogOptimizer:
        return super().__new__(_subclass(_check_class(optimizer_class)))

    def __init__(self, optimizer_class: type[Optimizer], /, analog_layers: Any, *args: Any, **kwargs: Any) -> None:
        self._analog_layers = _check_layers(analog_layers)
        super().__init__(*args, **kwargs)
        self._watch_steps()

    def _watch_steps(self) -> None:
        self.register_step_post_hook(_after_step)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_analog_layers": self._analog_layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_analog_layers" in state:  # a copy or pickle; load_state_dict also comes here, with less
            self._watch_steps()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._wrapped,), self.__getstate__()


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    given = optimizer._analog_layers  # type: ignore[attr-defined]
    _finish_step(list(given() if callable(given) else given), {})


def _finish_step(layers: list[AnalogLayerBase], masters: Masters) -> None:
    clip_each_weight(layers, masters)
    for layer in layers:
        layer.redraw_weight_noise()


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


# ---- Optimizers that something else built -----------------------------------------------------------------------------


class Attachment:
    """What :func:`attach` returns."""

    steps = 0
    """Steps that the optimizer has taken since then."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, masters: Masters) -> None:
        self._model, self._masters = model, masters
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, *_: Any) -> None:
        self.steps += 1
        _finish_step(_layers_of(self._model), self._masters)

    def remove(self) -> None:
        """Let the optimizer go on as it was before."""
        self._handle.remove()


_attached: WeakKeyDictionary[Optimizer, Attachment] = WeakKeyDictionary()


def attach(model: nn.Module, optimizer: Any, masters: Mapping[Tensor, Tensor] | None = None) -> Attachment:
    """Give an optimizer that a trainer built what :class:`AnalogOptimizer` does after each step.

    Attaching again replaces what was attached before.

    Args:
        model: The model that ``optimizer`` trains; its layers are listed anew in each step.
        optimizer: A torch optimizer, or a wrapper with the one inside as its ``optimizer`` (accelerate's, say).
        masters: For optimizers of fp32 copies that the weights are copied from after each step: the copy of each weight, of
            as many elements in the same order. Clipped are then the copies, and the weights follow them; without this a clip
            of the weights would not outlast the next step.

    Raises:
        TypeError: ``optimizer`` is no optimizer, or ``model`` no module.
        ValueError: ``model`` has no analog layers; or the optimizer steps neither a weight that its layer's clip is for nor a
            copy of it; or a copy has another size; or the optimizer is an :class:`AnalogOptimizer`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; a torch.nn.Module is needed")
    inner = _unwrapped(optimizer)
    layers = _layers_of(model)
    if not layers:
        raise ValueError("model: it has no analog layers; convert it first (triton_analog.convert_to_analog)")
    copies = {id(weight): master for weight, master in (masters or {}).items()}
    _check_stepped(model, inner, copies)
    if inner in _attached:
        _attached[inner].remove()
    _attached[inner] = Attachment(model, inner, copies)
    return _attached[inner]


def _layers_of(model: nn.Module) -> list[AnalogLayerBase]:
    return [module for module in model.modules() if isinstance(module, AnalogLayerBase) and not module.IS_CONTAINER]


def _unwrapped(optimizer: Any) -> Optimizer:
    inner = optimizer
    while getattr(inner, "optimizer", None) is not None:
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise TypeError(
            f"optimizer: got {type(optimizer).__name__}; a torch.optim.Optimizer is needed, or a wrapper of one"
        )
    if isinstance(inner, AnalogOptimizer):
        raise ValueError("optimizer: it is an AnalogOptimizer, which clips by itself; there is nothing to attach")
    return inner


def _check_stepped(model: nn.Module, optimizer: Optimizer, masters: Masters) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, layer in model.named_modules():
        if not isinstance(layer, AnalogMatrixLayer) or layer.rpu_config.clip.type not in GAUSSIAN_CLIP:
            continue
        weight = layer._parameters.get("weight")
        if weight is None or not weight.requires_grad:
            continue
        master = masters.get(id(weight))
        if master is not None and master.numel() != weight.numel():
            raise ValueError(
                f"masters: the copy of {name}.weight has {master.numel()} elements; {weight.numel()} are needed"
            )
        if id(weight if master is None else master) not in stepped:
            what = "a copy of it was given in masters, which" if master is not None else "it"
            raise ValueError(
                f"optimizer: it does not step {name}.weight, whose layer clips it: {what} is in none of the optimizer's "
                "param_groups. Attach before a wrapper shards or copies the parameters, or pass masters={weight: fp32 copy}"
            )
