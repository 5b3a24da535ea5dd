"""Modules that hold analog layers: a sequence, and a wrapper that makes a container of any module."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from typing_extensions import Self

from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.derived import Derived, derived_class
from triton_analog.nn.outside import warn_of_lost_layers
from triton_analog.nn.shown import in_common
from triton_analog.nn.tied import clip_each_weight, quantize_each_weight


class AnalogContainerBase(AnalogLayerBase):
    """A module that is no analog layer itself but has some below it."""

    IS_CONTAINER: ClassVar[bool] = True

    def __repr__(self) -> str:
        """As torch prints it, and once what the configs of its layers have in common; layers add what differs."""
        with in_common(self.analog_layers()) as common:
            return super().__repr__() + common

    def clip_weights(self) -> None:
        """Call ``clip_weights`` of every analog layer; a weight that layers share is clipped once for equal clips."""
        clip_each_weight(self.analog_layers())

    def redraw_weight_noise(self) -> None:
        """Call ``redraw_weight_noise`` of every analog layer: new noise where the config makes it last for a step."""
        for layer in self.analog_layers():
            layer.redraw_weight_noise()

    def quantize_weights(self) -> None:
        """Call ``quantize_weights`` of every analog layer.

        A weight that layers share is quantized once for equal settings and slices. Layers that quantize or slice it in
        different ways each quantize it, one after the other.
        """
        quantize_each_weight(self.analog_layers())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        warn_of_lost_layers(self, prefix.rstrip("."))
        super()._save_to_state_dict(destination, prefix, keep_vars)


class AnalogSequential(AnalogContainerBase, nn.Sequential):
    """``torch.nn.Sequential`` with the methods of an analog container."""

    @classmethod
    def from_digital(cls, module: nn.Sequential, rpu_config: Any = None) -> Self:
        """A container of the same children, hooks, mode and attributes as ``module``."""
        return retype(module, cls)

    @classmethod
    def to_digital(cls, module: AnalogSequential) -> nn.Sequential:
        """The reverse of :meth:`from_digital`."""
        return retype(module, nn.Sequential)


class AnalogWrapper(Derived, AnalogContainerBase):
    """``AnalogWrapper(model)`` gives ``model`` the methods of an analog container, and returns it.

    The instance itself is changed: it moves to a subclass of its class, made once per class, that also derives from
    ``AnalogWrapper``. Name, state dict, hooks and ``isinstance`` of the original class stay as they are. A module that is
    analog already is returned as it is. A model that has something of its own under a name that the wrapper adds, such as
    ``clip_weights``, is refused: its own would be hidden.

    Raises:
        TypeError: ``model`` is no module, or uses such a name.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is not AnalogWrapper:
            return super().__new__(cls)
        if len(args) != 1 or kwargs:
            raise TypeError("model: call AnalogWrapper(model) with the torch.nn.Module to wrap and nothing else")
        (model,) = args
        if isinstance(model, AnalogLayerBase):
            return model
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}; a torch.nn.Module is needed")
        check_names(model)
        model.__class__ = derived_class(AnalogWrapper, type(model))
        return model

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Python initialises what __new__ returned; a model that is being wrapped has been initialised before.
        if not (args and args[0] is self):
            super().__init__(*args, **kwargs)

    @classmethod
    def to_digital(cls, module: AnalogWrapper) -> nn.Module:
        """Give ``module`` its original class back; the instance itself is changed and returned."""
        module.__class__ = module._original  # type: ignore[assignment]
        return module


def check_names(model: nn.Module) -> None:
    """A wrapper hides nothing that the digital ``model`` has.

    Raises:
        TypeError: it has something of its own under a name that a wrapper adds.
    """
    added = {name for name in dir(AnalogWrapper) if not name.startswith("_")}.difference(dir(nn.Module))
    held = vars(model)  # of a copy in the making it is empty
    registries = (held.get(registry, {}) for registry in ("_parameters", "_buffers", "_modules"))
    # What a model passes on to another one, as PEFT's do, is not its own.
    hidden = sorted(added.intersection({*dir(type(model)), *held}.union(*registries)))
    if hidden:
        raise TypeError(
            f"model: {type(model).__name__} has {', '.join(hidden)} of its own, which AnalogWrapper would hide; rename that, "
            "or convert with ensure_analog_root=False and put the model into an AnalogSequential"
        )


def retype(module: nn.Module, cls: Any) -> Any:
    """A module of class ``cls`` with everything that ``module`` has; tensors, children and hooks are shared."""
    new = cls.__new__(cls)
    new.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        new.__dict__[name] = module.__dict__[name].copy()
    return new
