"""What every analog module has: a way to its analog layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Self


class AnalogLayerBase(nn.Module):
    """Anything analog: a layer, or a container of layers (``IS_CONTAINER``)."""

    IS_CONTAINER: ClassVar[bool] = False
    """Whether this is not a layer itself but has layers below it."""

    def named_analog_layers(self) -> Iterator[tuple[str, AnalogLayerBase]]:
        """Name and layer of every analog layer at or below this module, each once, without containers."""
        return named_analog_layers(self)

    def analog_layers(self) -> Iterator[AnalogLayerBase]:
        """Every analog layer at or below this module, each once, without containers."""
        for _, layer in self.named_analog_layers():
            yield layer

    def apply_to_analog_layers(self, fn: Callable[[AnalogLayerBase], Any]) -> Self:
        """Call ``fn`` with every analog layer; returns this module."""
        for layer in self.analog_layers():
            fn(layer)
        return self

    def __prepare_scriptable__(self) -> Any:
        """Called by ``torch.jit.script``.

        Raises:
            RuntimeError: this is a layer.
        """
        if self.IS_CONTAINER:
            return self
        raise RuntimeError(
            f"torch.jit.script: TorchScript cannot hold a {type(self).__name__}; use torch.export.export, which keeps "
            "all of an analog model, or torch.compile"
        )

    def clip_weights(self) -> None:
        """Clamp the stored weights as the config's Gaussian clip says. An optimizer does so after each step."""
        raise NotImplementedError(f"{type(self).__name__} must define clip_weights")

    def redraw_weight_noise(self) -> None:
        """Draw new noise for weights whose noise lasts for a whole step. An optimizer does so after each step.

        Layers without such noise leave it as it is here: there is nothing to do.
        """

    def quantize_weights(self) -> None:
        """Replace the stored weights by their clipped and quantized values, for good."""
        raise NotImplementedError(f"{type(self).__name__} must define quantize_weights")

    @classmethod
    def move_to_meta(cls, module: nn.Module) -> None:
        """Drop the parameters of a digital ``module`` that was converted, so that a reference to it holds no memory.

        The parameters themselves live on in the analog layer: ``module.to("meta")`` could empty them.
        """
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)


def traced_leaf(layer: nn.Module, *inputs: Any) -> Any:
    """What ``torch.fx.symbolic_trace`` notes of a layer's forward: one call of the layer, as of torch's own.

    Raises:
        RuntimeError: the layer is all there is to trace.
    """
    tracer = inputs[0].tracer
    if tracer.root is layer:
        raise RuntimeError(
            f"torch.fx.symbolic_trace: a {type(layer).__name__} is one node of a graph and has no graph of its own; trace a "
            "model that holds it, or use torch.export.export"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), inputs, {})


def named_analog_layers(module: nn.Module) -> Iterator[tuple[str, AnalogLayerBase]]:
    """Name and layer of every analog layer at or below ``module``, which may be digital itself."""
    for name, below in module.named_modules():
        if isinstance(below, AnalogLayerBase) and not below.IS_CONTAINER:
            yield name, below


def the_input(input: Any, inp: Any) -> Any:
    """What a layer was called with: ``input``, as torch names it, or ``inp``, as AIHWKIT-Lightning does.

    Raises:
        TypeError: none of the two, or both.
    """
    if (input is None) == (inp is None):
        given = "none was given" if inp is None else "input and inp were both given"
        raise TypeError(f"input: one tensor is needed, but {given}")
    return inp if input is None else input
