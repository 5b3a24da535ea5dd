"""AIHWKIT's torch tile, the simulator that AIHWKIT-Lightning was made to be faster than."""

from __future__ import annotations

import warnings
from math import ceil, sqrt

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from bench.peers.base import ADAMW, Peer, UnsupportedError
from bench.recipes import Recipe


class Aihwkit(Peer):
    name = "aihwkit"
    package = "aihwkit"

    def absent(self, device: torch.device) -> str | None:
        missing = super().absent(device)
        if missing is not None:
            return missing
        try:
            import aihwkit.nn  # noqa: F401
        except Exception as error:  # its compiled simulator may not fit the installed libraries
            return f"its import fails: {type(error).__name__}: {error}"
        return None

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Its tiles compute in fp32."""
        return torch.float32

    def convert(self, digital: nn.Module, recipe: Recipe) -> nn.Module:
        """One tile's weights span ``+-1`` of a scale per tile, or per column where the recipe scales per channel."""
        if not isinstance(digital, nn.Linear):
            raise UnsupportedError("only single linear layers are compared with it")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from aihwkit.nn import AnalogLinear

            columnwise = "PER_CHANNEL" in recipe.get("clip.type", "")
            layer = AnalogLinear(
                digital.in_features, digital.out_features, digital.bias is not None,
                rpu_config=_config(recipe, digital.in_features, columnwise),
            )  # fmt: skip
            layer = layer.to(device=digital.weight.device, dtype=digital.weight.dtype)
            layer.set_weights(digital.weight.detach(), None if digital.bias is None else digital.bias.detach())
            layer.remap_analog_weights(1.0)
        return layer.train()

    def optimizer(self, model: nn.Module) -> Optimizer:
        from aihwkit.optim import AnalogOptimizer

        return AnalogOptimizer(AdamW, model.parameters(), **ADAMW)


def _config(recipe: Recipe, inputs: int, columnwise: bool) -> object:
    from aihwkit.simulator.configs import TorchInferenceRPUConfig
    from aihwkit.simulator.parameters.enums import (
        BoundManagementType,
        NoiseManagementType,
        WeightClipType,
        WeightModifierType,
        WeightRemapType,
    )

    config = TorchInferenceRPUConfig()
    tile = recipe.get("mapping.max_input_size", -1)
    slices = 1 if tile <= 0 else ceil(inputs / tile)
    config.mapping.max_input_size, config.mapping.max_output_size = tile, 0
    config.mapping.weight_scaling_omega, config.mapping.weight_scaling_columnwise = 1.0, columnwise
    config.remap.type = WeightRemapType.CHANNELWISE_SYMMETRIC if columnwise else WeightRemapType.LAYERWISE_SYMMETRIC
    forward = config.forward
    forward.noise_management, forward.bound_management = NoiseManagementType.NONE, BoundManagementType.NONE
    forward.w_noise, forward.out_noise = 0.0, recipe.get("forward.out_noise", 0.0) / sqrt(slices)
    forward.inp_res, forward.out_res = (
        1 / recipe[path] if recipe.get(path, -1) > 0 else -1 for path in ("forward.inp_res", "forward.out_res")
    )
    forward.out_bound = recipe.get("forward.out_bound", -1)
    if recipe.get("modifier.noise_type", "NONE") != "NONE":
        config.modifier.type, config.modifier.std_dev = WeightModifierType.ADD_NORMAL, recipe["modifier.std_dev"]
    if "GAUSSIAN" in recipe.get("clip.type", ""):
        config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN, recipe["clip.sigma"]
    ranges = config.pre_post.input_range
    ranges.enable = recipe["pre_post.input_range.enable"]
    ranges.init_from_data = recipe["pre_post.input_range.init_from_data"]
    ranges.init_value = recipe["pre_post.input_range.init_value"]
    return config
