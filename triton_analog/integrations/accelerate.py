"""For Hugging Face's accelerate: an analog checkpoint onto several devices, or partly onto a disk.

Its own ``load_checkpoint_in_model`` and ``load_checkpoint_and_dispatch`` load analog checkpoints too. What they put onto a disk
they do not show to the layers, though, so that configs there stay those of the conversion; here they are read first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import accelerate
import safetensors
import torch
from torch import Tensor, nn

from triton_analog.nn.base import named_analog_layers
from triton_analog.nn.config_slot import SLOT

_SMALL = (SLOT, "input_range_update_idx", "x_min", "x_max")
"""What accelerate does not load, or only in part, where a layer goes onto a disk."""


def load_checkpoint_and_dispatch(model: nn.Module, checkpoint: str | Path, *args: Any, **kwargs: Any) -> Any:
    """``accelerate.load_checkpoint_and_dispatch``, with the configs and the buffers of all layers, wherever their weights go.

    Args:
        model: Converted like the one that was saved, with slices of the same widths; it may be without memory, as below
            ``accelerate.init_empty_weights``.
        checkpoint: A file of safetensors or of ``torch.save``, the index of several, or the folder of either.
        args, kwargs: As for accelerate's function.

    Returns:
        The model, dispatched.

    Raises:
        ConfigError: a config in the file does not fit its layer.
        FileNotFoundError: there is no checkpoint.
    """
    layers = dict(named_analog_layers(model))
    for file in _files(Path(checkpoint)):
        for name, tensor in _small_tensors(file):
            layer, _, key = name.rpartition(".")
            if layer in layers:
                if key == SLOT:
                    layers[layer]._buffers[SLOT] = tensor
                elif (own := layers[layer]._buffers.get(key)) is not None and own.shape == tensor.shape:
                    own.copy_(tensor)
    model = accelerate.load_checkpoint_and_dispatch(model, str(checkpoint), *args, **kwargs)
    for _, loaded in named_analog_layers(model):
        vars(loaded).pop("_missed_config", None)
    return model


def _files(checkpoint: Path) -> list[Path]:
    if checkpoint.is_dir():
        found = sorted(
            path for path in checkpoint.iterdir() if path.name.endswith((".index.json", ".safetensors", ".bin"))
        )
        indices = [path for path in found if path.suffix == ".json"]
        if not found:
            raise FileNotFoundError(
                f"checkpoint: {checkpoint} holds neither .safetensors or .bin files nor an index of them"
            )
        return _files(indices[0]) if indices else found
    if checkpoint.suffix != ".json":
        return [checkpoint]
    weights = json.loads(checkpoint.read_text("utf-8"))
    return [checkpoint.parent / name for name in sorted(set(weights.get("weight_map", weights).values()))]


def _small_tensors(file: Path) -> list[tuple[str, Tensor]]:
    """In the order in which they are to be set: configs first."""
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, framework="pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys() if name.endswith(_SMALL)}  # noqa: SIM118
    else:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        found = {name: tensor for name, tensor in state.items() if name.endswith(_SMALL)}
    return sorted(found.items(), key=lambda item: not item[0].endswith(SLOT))
