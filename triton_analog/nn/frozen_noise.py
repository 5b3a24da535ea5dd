"""Noise that lasts for a step, of frozen weights: no change of the weight tells their layers that a step was taken."""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from triton_analog.seeds import mix_rank


class Watched(Protocol):
    """A layer with weight noise that may last."""

    training: bool
    weight_noise_seed: Tensor | None

    def has_frozen_weight(self) -> bool:
        """Whether no optimizer changes the weight."""

    def note_redraw(self) -> None:
        """``weight_noise_seed`` has just been drawn anew."""

    def was_redrawn(self) -> bool:
        """Whether that has been noted since this was last asked."""


_layers: weakref.WeakSet[Any] = weakref.WeakSet()


def watch(layer: Watched) -> None:
    """Draw the noise of ``layer`` anew after each step of any optimizer of torch, in training and while its weight is frozen.

    A step after which something else did it, as ``AnalogOptimizer`` does, is left alone, and one that is compiled is not seen.
    """
    _start()
    _layers.add(layer)


@cache
def _start() -> None:
    register_optimizer_step_post_hook(_after_a_step)


def redraw_seeds(seeds: Tensor) -> None:
    """Fill ``seeds`` (int64) anew, from torch's default generator of their device, as single seeds would be one by one."""
    mix_rank(seeds.random_(0, 2**63 - 1))


@torch.no_grad()
def _after_a_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    due: dict[torch.device, list[Any]] = {}
    for layer in list(_layers):
        seed = layer.weight_noise_seed
        if seed is not None and layer.training and layer.has_frozen_weight() and not layer.was_redrawn():
            due.setdefault(seed.device, []).append(layer)
    for device, layers in due.items():
        drawn = torch.empty(len(layers), dtype=torch.int64, device=device)
        redraw_seeds(drawn)
        torch._foreach_copy_([layer.weight_noise_seed for layer in layers], list(drawn.split(1)))
        for layer in layers:
            layer.note_redraw()
            layer.was_redrawn()
