"""Weights that several layers share: changed once, not once per layer."""

from __future__ import annotations

from collections.abc import Iterable

from triton_analog.masters import Masters
from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.settings import GAUSSIAN_CLIP


def clip_each_weight(layers: Iterable[AnalogLayerBase], masters: Masters | None = None) -> None:
    """Clip the weights of all ``layers``, one that several of them share only once for equal clips.

    A clamp lowers the standard deviation, so that a second one would be tighter than the config says. What has a master in
    ``masters`` is clipped there, and the weight follows.
    """
    clipped = set()
    for layer in layers:
        if isinstance(layer, AnalogMatrixLayer):
            clip = layer.rpu_config.clip
            key = (id(layer._parameters.get("weight")), layer.CHANNEL_DIM, clip.type, clip.sigma)
            if key in clipped:
                layer.note_clip()
                continue
            clipped.add(key)
            if masters is not None and clip.type in GAUSSIAN_CLIP and masters.has(layer.weight):
                master = masters.read(layer.weight)
                layer.clip_weights(master)
                masters.write(layer.weight, master)
                continue
        layer.clip_weights()


def quantize_each_weight(layers: Iterable[AnalogLayerBase]) -> None:
    """Quantize the weights of all ``layers``, one that several of them share only once for equal settings and slices.

    Layers that quantize or slice a shared weight in different ways each quantize it, one after the other.
    """
    quantized = set()
    for layer in layers:
        if isinstance(layer, AnalogMatrixLayer):
            modifier = layer.rpu_config.modifier
            tiles = (layer.CHANNEL_DIM, layer.slices, layer.groups, id(layer.learnable_weight_clip))
            key = (id(layer._parameters.get("weight")), modifier.quantization_type, modifier.res, *tiles)
            if key in quantized:
                layer.stop_quantizing()
                continue
            quantized.add(key)
        layer.quantize_weights()
