"""Weights that several layers share: changed once, not once per layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.settings import GAUSSIAN_CLIP

EMPTY: Mapping[int, Tensor] = MappingProxyType({})


@torch.no_grad()
def clip_each_weight(layers: Iterable[AnalogLayerBase], masters: Mapping[int, Tensor] = EMPTY) -> None:
    """Clip the weights of all ``layers``, one that several of them share only once for equal clips.

    A clamp lowers the standard deviation, so that a second one would be tighter than the config says. Of a weight whose id is
    in ``masters``, that copy is clipped, and the weight set to it.
    """
    clipped = set()
    for layer in layers:
        if isinstance(layer, AnalogMatrixLayer):
            clip, weight = layer.rpu_config.clip, layer._parameters.get("weight")
            key = (id(weight), layer.CHANNEL_DIM, clip.type, clip.sigma)
            if key in clipped:
                layer.note_clip()
                continue
            clipped.add(key)
            if weight is not None and id(weight) in masters and clip.type in GAUSSIAN_CLIP:
                master = masters[id(weight)].detach().view_as(weight)
                layer.clip_like_weights(master)
                weight.copy_(master)
                layer.note_clip()
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
