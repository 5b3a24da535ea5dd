"""This library."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from bench.peers.base import ADAMW, Peer
from bench.recipes import Recipe, filled
from triton_analog import AnalogOptimizer, TorchInferenceRPUConfig, convert_to_analog


class Ours(Peer):
    name = "triton_analog"

    def convert(self, digital: nn.Module, recipe: Recipe) -> nn.Module:
        return convert_to_analog(digital, filled(TorchInferenceRPUConfig(), recipe), inplace=True).train()

    def optimizer(self, model: nn.Module, **options: Any) -> Optimizer:
        parameters = model.parameters()
        return AnalogOptimizer(AdamW, model.analog_layers, parameters, **ADAMW, **options)  # type: ignore[union-attr]
