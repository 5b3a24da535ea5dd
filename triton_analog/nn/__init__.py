"""Analog layers: drop-in replacements of torch's, and containers for them."""

from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.containers import AnalogSequential, AnalogWrapper
from triton_analog.nn.linear import AnalogLinear

__all__ = ["AnalogLayerBase", "AnalogLinear", "AnalogSequential", "AnalogWrapper"]
