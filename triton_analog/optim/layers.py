"""The analog layers of a model, looked for again only where they may be others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from triton_analog.nn.base import AnalogLayerBase, named_analog_layers
from triton_analog.nn.programmed import refuse_chips

Layers = Callable[[], Iterable[AnalogLayerBase]] | list[AnalogLayerBase]


class KnownLayers:
    """Gives the analog layers of ``given``: the same list again as long as they are the same.

    Args:
        given: A model, or the method ``analog_layers`` of one: its tree of modules is compared with what it was, which is
            quicker than to walk it; any other function, which is called each time; or the layers themselves.
    """

    def __init__(self, given: nn.Module | Layers) -> None:
        self._given = given
        self.root: nn.Module | None = given if isinstance(given, nn.Module) else _owner(given)
        """The model, if it is known."""
        self._layers: list[AnalogLayerBase] = given if isinstance(given, list) else []
        self._modules: list[nn.Module] | None = None
        self._children: list[list[nn.Module | None]] = []

    def __call__(self) -> list[AnalogLayerBase]:
        if self.root is not None:
            if self._modules is None or _children(self._modules) != self._children:
                self._modules = list(self.root.modules())
                self._children = _children(self._modules)
                self._layers = layers_of(self.root)
        elif callable(self._given):
            layers = list(self._given())
            if list(map(id, layers)) != list(map(id, self._layers)):
                self._layers = layers
        return self._layers


def layers_of(model: nn.Module) -> list[AnalogLayerBase]:
    """Every analog layer at or below ``model``.

    Raises:
        ValueError: it is on a simulated chip, whose layers are not trained.
    """
    refuse_chips(model, "an optimizer")
    return [layer for _, layer in named_analog_layers(model)]


def _owner(given: Any) -> AnalogLayerBase | None:
    """The model of which ``given`` is the method ``analog_layers``, if that finds all layers below it."""
    model = getattr(given, "__self__", None)
    for name in ("analog_layers", "named_analog_layers"):
        if getattr(getattr(model, name, None), "__func__", None) is not getattr(AnalogLayerBase, name):
            return None
    return model if given == model.analog_layers else None  # type: ignore[union-attr]


def _children(modules: list[nn.Module]) -> list[list[nn.Module | None]]:
    return [list(module._modules.values()) for module in modules]
