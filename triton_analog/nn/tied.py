"""Weights that several layers share: changed once, not once per layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.matrix import AnalogMatrixLayer


def layers_by_clip(layers: Iterable[AnalogLayerBase]) -> list[list[Any]]:
    """Together those ``layers`` that share a weight and have equal clips: one clip serves them all.

    A clamp lowers the standard deviation, so that a second one would be tighter than the config says.
    """
    found: dict[Any, list[Any]] = {}
    for layer in layers:
        key: Any = layer
        if isinstance(layer, AnalogMatrixLayer) and layer.weight_source is not None:
            key = id(layer.weight_source), layer.weight_index, layer.gaussian_clip()
        found.setdefault(key, []).append(layer)
    return list(found.values())


def clip_each_weight(layers: Iterable[AnalogLayerBase]) -> None:
    """Clip the weights of all ``layers``, one that several of them share only once for equal clips."""
    for first, *others in layers_by_clip(layers):
        first.clip_weights()
        for layer in others:
            layer.note_clip()


def quantize_each_weight(layers: Iterable[AnalogLayerBase]) -> None:
    """Quantize the weights of all ``layers``, one that several of them share only once for equal settings and slices.

    Layers that quantize or slice a shared weight in different ways each quantize it, one after the other.
    """
    layers, quantized = list(layers), set()
    for layer in layers:  # all of them before any is changed
        if isinstance(layer, AnalogMatrixLayer):
            layer.check_quantizable()
    for layer in layers:
        if isinstance(layer, AnalogMatrixLayer):
            modifier = layer.rpu_config.modifier
            tiles = (layer.CHANNEL_DIM, layer.slices, layer.groups, id(layer.learnable_weight_clip))
            key = (id(layer.weight_source), layer.weight_index, modifier.quantization_type, modifier.res, *tiles)
            if key in quantized:
                layer.stop_quantizing()
                continue
            quantized.add(key)
        layer.quantize_weights()
