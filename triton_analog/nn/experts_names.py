"""The state dict of experts: what each of them saves is stacked, as their weights are.

``input_range_gate_up_proj [E, S]`` holds the ranges of all experts' ``gate_up_proj``, and so on. The config
``_extra_state_gate_up_proj`` is one for all, or one for each if they differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("input_range", "learnable_weight_clip", "input_range_update_idx", "x_min", "x_max", "_extra_state")
"""What a matrix saves beside its weight."""


def save_stacked(tiles: nn.ModuleDict, state_dict: Any, prefix: str) -> None:
    """Stack what the matrices in ``tiles`` have put into ``state_dict``."""
    for stack, layers in tiles.items():
        for name in NAMES:
            keys = [f"{prefix}tiles.{stack}.{index}.{name}" for index in range(len(layers))]  # type: ignore[arg-type]
            if not all(key in state_dict for key in keys):
                continue
            values: list[Tensor] = [state_dict.pop(key) for key in keys]
            one = name == "_extra_state" and all(torch.equal(value, values[0]) for value in values)
            state_dict[f"{prefix}{name}_{stack}"] = values[0] if one else torch.stack(values)


def load_stacked(tiles: nn.ModuleDict, state_dict: dict[str, Any], prefix: str) -> None:
    """The reverse of :func:`save_stacked`."""
    for stack, layers in tiles.items():
        for name in NAMES:
            whole = state_dict.pop(f"{prefix}{name}_{stack}", None)
            if whole is None:
                continue
            one = name == "_extra_state" and whole.ndim == 1
            for index in range(len(layers)):  # type: ignore[arg-type]
                if one or index < len(whole):
                    state_dict[f"{prefix}tiles.{stack}.{index}.{name}"] = whole if one else whole[index]
