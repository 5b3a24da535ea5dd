"""What a contender has to offer."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from bench.recipes import Recipe

ADAMW: dict[str, float] = {"lr": 0.0, "weight_decay": 0.0, "eps": 1e-4}
"""Every step does the same work on the same weights; and ``eps`` is not 0 in fp16, where 0 / 0 would be."""


class UnsupportedError(Exception):
    """A contender cannot do what a workload asks for; the text says why."""


class Peer:
    """A library, or a way to use it, that trains a layer or a model under a recipe."""

    name: str
    package: str | None = None
    """What has to be installed."""
    known_defects: frozenset[str] = frozenset()
    """Results that are wrong in every version so far. They are named beside the time; any other wrong result is FAILED."""
    ideal = False
    """Whether it computes the digital model and not the recipe."""

    def absent(self, device: torch.device) -> str | None:
        """Why it cannot take part on this machine; None if it can."""
        if self.package is not None and find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        return None

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What it runs in where ``dtype`` is asked for."""
        return dtype

    def convert(self, digital: nn.Module, recipe: Recipe) -> nn.Module:
        """The model under the recipe, in training mode, with the weights of ``digital``, which may be changed.

        Raises:
            UnsupportedError: the model or the recipe is beyond it.
        """
        raise NotImplementedError

    def optimizer(self, model: nn.Module, **options: Any) -> Optimizer:
        """AdamW with :data:`ADAMW` and ``options``."""
        return AdamW(model.parameters(), **ADAMW, **options)
