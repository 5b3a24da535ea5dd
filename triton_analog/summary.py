"""How much of a model is on tiles."""

from __future__ import annotations

from torch import nn

from triton_analog.convert import default_conversion_map, select
from triton_analog.coverage.weights import Coverage, measure
from triton_analog.surroundings.obstacles import Obstacle


def analog_summary(model: nn.Module) -> Coverage:
    """What share of the weights of ``model`` is on tiles, and which modules are digital and why.

    Weights are matrices, convolution kernels and stacks of them; embeddings, norms, biases and tables are none. Layers that
    :func:`~triton_analog.convert_to_analog` would convert, such as those that were excluded, are among the digital ones.
    ``print(analog_summary(model))`` shows it all.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; a torch.nn.Module is needed")
    layers, left = select(model, "", default_conversion_map(model), set())
    possible = Obstacle("it can be converted", "Convert it, model = convert_to_analog(model, config).")
    reasons = {name: possible for name, layer in layers if next(layer.parameters(False), None) is not None}
    return measure(model, "", (), reasons | dict(left))
