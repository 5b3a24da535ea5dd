"""What happens to layers from outside: weights that became another shape, and digital layers in the place of analog ones."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

import triton_analog.ops as ops
from triton_analog.nn.base import AnalogLayerBase, named_analog_layers
from triton_analog.reference import num_slices, split_sizes

# ---- Other shapes -------------------------------------------------------------------------------------------------------


def complaint_of_shape(layer: Any) -> str | None:
    """What is wrong with a ``layer`` whose weight was replaced by one of another shape; None if nothing is.

    A weight that a sharding library keeps in parts has no shape to compare.
    """
    weight = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.ndim < 2 or weight.numel() == 0 or hasattr(weight, "ds_id"):
        return None
    shape = tuple(layer.matrix.shape)
    if shape == layer.tile_shape:
        return None
    return (
        f"the weight of this {type(layer).__name__} has become a matrix of shape {shape}, but its tiles are of shape "
        f"{layer.tile_shape}; call its resized() to make them follow, and the optimizer after that. For the embeddings of a "
        "Hugging Face model there is resize_token_embeddings in triton_analog.integrations.transformers"
    )


@torch.no_grad()
def follow_shape(layer: Any) -> None:
    """Make the tiles of ``layer``, an ``AnalogMatrixLayer``, follow its weight: what ``layer.resized()`` does."""
    N, K = shape = tuple(layer.matrix.shape)
    if shape == layer.tile_shape:
        return
    bias, limit = layer.bias, layer.rpu_config.mapping.max_input_size
    if bias is not None and bias.shape != (N,):
        raise ValueError(
            f"bias: it has shape {tuple(bias.shape)}, but the weight has {N} outputs; give the layer a bias of shape ({N},), or "
            "None, first"
        )
    layer.take_shape()
    same_slices = split_sizes(K, limit) == split_sizes(layer.tile_shape[1], limit)
    layer.tile_shape = shape
    if layer.input_range is not None and not same_slices:
        layer.input_range = None  # that of other inputs
    clip = layer.learnable_weight_clip
    if clip is not None:
        new = ops.absmax(layer.matrix, num_slices(K, limit)).to(clip.dtype)
        if same_slices:
            kept = min(N, clip.shape[1])
            new[:, :kept] = clip[:, :kept]
        layer.learnable_weight_clip = nn.Parameter(new, requires_grad=clip.requires_grad)
    layer._fit_state()


def follow_or_refuse(layer: Any, name: str) -> None:
    """See to it that ``layer``, called ``name``, has tiles of its weight's shape, where that takes no new parameter.

    Raises:
        ValueError: it does, and an optimizer would not know it.
    """
    complaint = complaint_of_shape(layer)
    if complaint is None:
        return
    fits = layer.bias is None or layer.bias.shape == layer.matrix.shape[:1]
    if layer.learnable_weight_clip is None and layer.matrix.shape[1] == layer.tile_shape[1] and fits:
        follow_shape(layer)
    else:
        raise ValueError(f"{name or '(root)'}: {complaint}")


# ---- Other layers -------------------------------------------------------------------------------------------------------

_NAMES = "_names_of_analog_layers"


def note_layers(root: nn.Module) -> None:
    """Remember which layers of ``root`` are analog, as it has just been converted."""
    for module in root.modules():
        vars(module).pop(_NAMES, None)
    names = [name for name, _ in named_analog_layers(root) if name]
    if names:
        vars(root)[_NAMES] = names


def check_layers(model: nn.Module) -> None:
    """Look at what has happened to the layers of ``model`` since it was converted.

    Warns, once, if layers that were analog are digital now.

    Raises:
        ValueError: a weight has become another shape, so that its layer must be told (``resized()``).
    """
    for name, layer in named_analog_layers(model):
        if hasattr(layer, "tile_shape"):
            follow_or_refuse(layer, name)
    for prefix, root in model.named_modules():
        if _NAMES in vars(root):
            warn_of_lost_layers(root, prefix)


def warn_of_lost_layers(root: nn.Module, prefix: str = "") -> None:
    """Warn if layers that were analog when ``root`` was converted are digital now. Those that are no more are no matter."""
    names = vars(root).get(_NAMES, [])
    modules = dict(root.named_modules()) if names else {}
    lost = [name for name in names if name in modules and _is_digital(modules[name])]
    if lost:
        vars(root)[_NAMES] = [name for name in names if name not in lost]
        listed = ", ".join(f"{prefix}{'.' if prefix else ''}{name} ({type(modules[name]).__name__})" for name in lost)
        warnings.warn(
            f"{len(lost)} layer(s) were analog when the model was converted and are digital now: {listed}. Something replaced "
            "them, as resize_token_embeddings of transformers does (that of triton_analog.integrations.transformers does "
            "not). Convert the model again: what is analog stays as it is",
            stacklevel=3,
        )


def _is_digital(module: nn.Module) -> bool:
    own = module._parameters.get("weight")
    return own is not None and not any(isinstance(below, AnalogLayerBase) for below in module.modules())
