"""The state dict of a recurrent layer: torch's names outside, those of its modules inside.

``<name>`` of the product ``weight_ih`` of the cell ``l0_reverse`` is ``<name>_ih_l0_reverse``; that of a product ``weight`` is
``<name>_l0_reverse``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

NAMES = (
    *("weight", "bias", "input_range", "learnable_weight_clip"),
    *("input_range_update_idx", "x_min", "x_max", "_extra_state"),
)
"""What a product saves."""


def _products(module: Any) -> Iterator[tuple[str, str, str]]:
    """Path of every product inside ``module``, the end of its names outside, and the name of its cell."""
    for cell_name, cell in module.cells.items():
        for product, _ in cell.named_children():
            yield f"cells.{cell_name}.{product}.", f"{product.removeprefix('weight')}_{cell_name}", cell_name


def inner_name(module: nn.Module, name: str) -> str | None:
    """The path, inside ``module``, of what has ``name`` outside; None where nothing has it."""
    for path, end, _ in _products(module):
        if name.endswith(end) and name[: -len(end)] in NAMES:
            return path + name[: -len(end)]
    return None


def save_torch_names(module: nn.Module, state_dict: Any, prefix: str, local_metadata: Any) -> None:
    """Rename what ``module`` has put into ``state_dict``; a hook for after that."""
    for path, end, _ in _products(module):
        for name in NAMES:
            if prefix + path + name in state_dict:
                state_dict[f"{prefix}{name}{end}"] = state_dict.pop(prefix + path + name)


def load_torch_names(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """The reverse of :func:`save_torch_names`, before ``module`` takes from ``state_dict``."""
    for path, end, cell_name in _products(module):
        if end == f"_{cell_name}":
            _combine(state_dict, prefix, cell_name)
        for name in NAMES:
            if f"{prefix}{name}{end}" in state_dict:
                state_dict[prefix + path + name] = state_dict.pop(f"{prefix}{name}{end}")


def _combine(state_dict: dict[str, Any], prefix: str, cell_name: str) -> None:
    """What an ``nn.LSTM`` or AIHWKIT-Lightning saved, as a cell with one matrix for input and hidden state has it."""
    for name in NAMES:  # AIHWKIT-Lightning takes the last letters of "weight" for the name of the matrix
        if f"{prefix}{name}_ht_{cell_name}" in state_dict:
            state_dict[f"{prefix}{name}_{cell_name}"] = state_dict.pop(f"{prefix}{name}_ht_{cell_name}")
    weights, biases = (
        [f"{prefix}{name}_{matrix}_{cell_name}" for matrix in ("ih", "hh")] for name in ("weight", "bias")
    )
    if all(name in state_dict for name in weights):
        state_dict[f"{prefix}weight_{cell_name}"] = torch.cat([state_dict.pop(name) for name in weights], dim=1)
        if all(name in state_dict for name in biases):
            ih, hh = (state_dict.pop(name) for name in biases)
            state_dict[f"{prefix}bias_{cell_name}"] = ih + hh
