"""AIHWKIT-Lightning in its torch mode."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from bench.peers.base import ADAMW, Peer, UnsupportedError
from bench.recipes import Recipe, filled


class Lightning(Peer):
    name = "aihwkit-lightning"
    package = "aihwkit_lightning"
    known_defects = frozenset()

    def absent(self, device: torch.device) -> str | None:
        return super().absent(device) or self._import()

    def _import(self) -> str | None:
        try:
            with redirect_stdout(io.StringIO()):  # without a GPU it prints that it has no Triton mode
                import aihwkit_lightning.nn  # noqa: F401
        except Exception as error:  # whatever an installation may lack
            return f"its import fails: {type(error).__name__}: {error}"
        return None

    def convert(self, digital: nn.Module, recipe: Recipe) -> nn.Module:
        from aihwkit_lightning.nn.conversion import convert_to_analog
        from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig

        if isinstance(digital, nn.LSTM) and digital.batch_first:
            raise UnsupportedError("its recurrent layers have no batch_first")
        return convert_to_analog(digital, filled(TorchInferenceRPUConfig(), recipe)).train()

    def optimizer(self, model: nn.Module) -> Optimizer:
        from aihwkit_lightning.optim import AnalogOptimizer

        return AnalogOptimizer(AdamW, model.analog_layers, model.parameters(), **ADAMW)
