"""Experts of a mixture whose matrices are AIHWKIT's layers, for AIHWKIT, which has no experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from triton_analog.nn.containers import retype
from triton_analog.nn.derived import Derived, derived_class
from triton_analog.nn.experts import AnalogBatchedExperts, AnalogExperts, AnalogParallelExperts
from triton_analog.nn.experts_routing import BatchedExperts, ParallelExperts, Product, RoutedExperts


class ExpertsOfLayers(RoutedExperts, Derived):
    """``tiles["gate_up_proj"][3]`` is the layer of a matrix; routing, gate and activation are those of the class derived from."""

    PREFIX = "Aihwkit"
    tiles: nn.ModuleDict

    def products(self) -> Product:
        tiles: Any = self.tiles
        return lambda stack, expert, rows: tiles[stack][expert](rows)


class BatchedExpertsOfLayers(BatchedExperts, ExpertsOfLayers):
    pass


class ParallelExpertsOfLayers(ParallelExperts, ExpertsOfLayers):
    pass


_KINDS: dict[type[Derived], type[Derived]] = {
    AnalogExperts: ExpertsOfLayers,
    AnalogBatchedExperts: BatchedExpertsOfLayers,
    AnalogParallelExperts: ParallelExpertsOfLayers,
}


def is_known(module: nn.Module) -> bool:
    """Whether ``module`` is made of experts that can be exported."""
    return isinstance(module, AnalogExperts) and module._base in _KINDS


def export_experts(module: AnalogExperts, export: Callable[[str, Any], nn.Module]) -> nn.Module:
    """``module`` with ``export(path, layer)`` in place of each of its layers, and without the parameters of those."""
    new = retype(module, derived_class(_KINDS[module._base], module._original))
    new.tiles = nn.ModuleDict()
    for stack, layers in module.tiles.items():
        own: Any = layers
        new.tiles[stack] = nn.ModuleList(export(f"tiles.{stack}.{index}", layer) for index, layer in enumerate(own))
        for name in (stack, f"{stack}_bias"):
            new._parameters.pop(name, None)
    return new
