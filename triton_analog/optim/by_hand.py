"""The work of an optimizer, for those who step in their own way."""

from __future__ import annotations

from torch import nn

from triton_analog.nn.before_step import prepare
from triton_analog.nn.range_shift import RangeShift
from triton_analog.optim.layers import layers_of


def before_step(model: nn.Module) -> None:
    """Let the input ranges of ``model`` decay, and bring what they have learned from data into the parameters.

    Optimizers of ``torch.optim`` do this by themselves before each of their steps. Call it after the last backward of a step
    where you take that in another way, such as ``parameter -= lr * parameter.grad``: once the gradients are what is stepped with,
    averaged over ranks and without a loss scale. All ranks call it together.

    Args:
        model: Holds analog layers.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; a torch.nn.Module is needed")
    layers = [layer for layer in layers_of(model) if isinstance(layer, RangeShift)]
    prepare([layer for layer in layers if layer._parameters.get("input_range") is not None])
