"""torch itself: the ideal layer, which simulates nothing."""

from __future__ import annotations

from torch import nn

from bench.peers.base import Peer
from bench.recipes import Recipe


class Digital(Peer):
    name = "torch.nn"
    ideal = True

    def convert(self, digital: nn.Module, recipe: Recipe) -> nn.Module:
        return digital.train()
