"""A config of ours as one of AIHWKIT's that computes the same in evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from triton_analog.aihwkit_bridge.package import load_aihwkit
from triton_analog.config import (
    ConfigError,
    TorchInferenceRPUConfig,
    WeightClipType,
    WeightNoiseInjectionType,
    WeightQuantizationType,
)
from triton_analog.nn.read_noise import reads
from triton_analog.nn.settings import GAUSSIAN_CLIP, keeps_noise, learns_clip, settings

RANGE_FIELDS = ("learn_input_range", "init_value", "init_from_data", "init_std_alpha", "decay", "input_min_percentage")
"""Fields of the input range that mean the same on both sides."""


def base_aihwkit_rpu_config() -> Any:
    """AIHWKIT's ``TorchInferenceRPUConfig`` with everything off that its default has on: the products are exact.

    Its models of programming noise and drift stay as they are: they act when AIHWKIT is asked to program or drift weights.

    Raises:
        ImportError: the package aihwkit is not installed.
    """
    aihwkit = load_aihwkit("base_aihwkit_rpu_config")
    config = aihwkit.TorchInferenceRPUConfig()
    io = config.forward
    io.inp_res = io.out_res = -1
    io.inp_bound = io.out_bound = io.out_noise = 0.0
    io.noise_management = aihwkit.enums.NoiseManagementType.NONE
    io.bound_management = aihwkit.enums.BoundManagementType.NONE
    config.mapping.max_input_size = config.mapping.max_output_size = -1
    config.mapping.weight_scaling_omega = 1.0
    config.modifier.rel_to_actual_wmax, config.modifier.assumed_wmax = False, 1.0
    return config


def export_config(
    config: TorchInferenceRPUConfig,
    layer: str,
    slices: int,
    max_output_size: int,
    out_noise: bool,
    note: Callable[[str], None],
) -> tuple[Any, bool]:
    """The config for the tiles of one layer, and whether their weights are scaled per output channel (else per slice).

    AIHWKIT scales ADC bound, weight noise and output noise alike, by what maps the weights of a tile to -1 .. 1. The ADC
    decides, then weight noise, then output noise.

    Args:
        config: The config of the layer.
        layer: Its name, for errors.
        slices: Its number of slices.
        max_output_size: Most output channels of a tile; ``<= 0`` is no limit.
        out_noise: Whether to export the output noise.
        note: Takes a sentence on what acts differently in training.

    Raises:
        ConfigError: output noise was asked for but has another scale than the ADC or the weight noise; or weights are read
            with noise.
    """
    ours = settings(config)
    io, modifier, range_ = config.forward, config.modifier, config.pre_post.input_range
    if reads(io):
        raise ConfigError(
            f"{layer or '(root)'}: forward.w_noise: got {io.w_noise}, which AIHWKIT's torch tiles do not have; set it to 0 for "
            "the export"
        )
    noise_on = modifier.noise_type is not WeightNoiseInjectionType.NONE and modifier.std_dev > 0
    noise_per_channel = modifier.noise_type is WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL
    has_out_noise = out_noise and io.out_noise > 0
    if io.out_bound > 0:
        per_channel = ours["out_bound_per_channel"]
    elif noise_on:
        per_channel = noise_per_channel
    elif has_out_noise:
        per_channel = io.out_noise_per_channel
    else:
        per_channel = ours["out_bound_per_channel"]
    if has_out_noise and io.out_noise_per_channel != per_channel:
        raise ConfigError(
            f"{layer or '(root)'}: forward.out_noise_per_channel: got {io.out_noise_per_channel}, but its ADC or weight noise "
            f"is scaled per {'channel' if per_channel else 'slice'}, and AIHWKIT has one scale for all; set it to "
            f"{per_channel}, or export with out_noise=False"
        )

    theirs = base_aihwkit_rpu_config()
    enums = load_aihwkit("export_to_aihwkit").enums
    theirs.mapping.max_input_size, theirs.mapping.max_output_size = config.mapping.max_input_size, max_output_size
    theirs.mapping.weight_scaling_columnwise = per_channel

    theirs.forward.inp_res, theirs.forward.inp_bound = _converter(io.inp_res)
    theirs.forward.inp_noise, theirs.forward.inp_sto_round = io.inp_noise, io.inp_sto_round
    theirs.forward.out_bound, theirs.forward.out_res = max(io.out_bound, 0.0), io.out_res
    for name in RANGE_FIELDS:
        setattr(theirs.pre_post.input_range, name, getattr(range_, name))
    theirs.pre_post.input_range.enable = range_.enable and not range_.dynamic
    if range_.enable and range_.dynamic:
        theirs.forward.noise_management = enums.NoiseManagementType.ABS_MAX
    if range_.enable and range_.fast_mode:
        note("pre_post.input_range.fast_mode: ranges start up from standard deviations")

    if has_out_noise:
        theirs.forward.out_noise = io.out_noise / math.sqrt(slices)
    elif io.out_noise > 0:
        note("forward.out_noise: left out, as AIHWKIT adds it in evaluation too; export it with out_noise=True")

    theirs.modifier.std_dev, theirs.modifier.res = modifier.std_dev, modifier.res
    if noise_on and noise_per_channel == per_channel:
        theirs.modifier.type = enums.WeightModifierType.ADD_NORMAL
    elif noise_on:
        note(
            f"modifier.noise_type {modifier.noise_type.name}: left out, as weights are scaled per "
            f"{'channel' if per_channel else 'slice'} for the ADC"
        )
    if noise_on and keeps_noise(config):
        note("modifier.refresh STEP: weight noise is drawn in each forward")
    if modifier.quantization_type is not WeightQuantizationType.NONE:
        note(f"modifier.quantization_type {modifier.quantization_type.name}: the weights are quantized once, for good")

    if config.clip.type in GAUSSIAN_CLIP:
        theirs.clip.type = enums.WeightClipType.LAYER_GAUSSIAN
        if config.clip.type is not WeightClipType.LAYER_GAUSSIAN or slices > 1 or max_output_size > 0:
            note(
                f"clip.type {config.clip.type.name}: becomes LAYER_GAUSSIAN, which takes the deviation of a whole tile, of "
                "weights that are scaled already"
            )
    theirs.clip.sigma = config.clip.sigma
    if learns_clip(config):
        note("clip.type LEARNABLE_PER_CHANNEL: the weights are clipped once, for good")
    else:  # ours are scaled by the largest weight of the moment
        remap = enums.WeightRemapType
        theirs.remap.type = remap.CHANNELWISE_SYMMETRIC if per_channel else remap.LAYERWISE_SYMMETRIC
    return theirs, per_channel


def _converter(res: float) -> tuple[float, float]:
    """Resolution and bound of AIHWKIT's DAC.

    It clips what it has rounded, so that a grid without a point at the range itself needs a wider bound: twice as wide,
    with twice the steps, it is the same grid.
    """
    if res <= 0:
        return res, 0.0
    half = (res if res > 1 else 1 / res) / 2
    if abs(half - round(half)) < 1e-6:
        return res, 1.0
    return (2 * res if res > 1 else res / 2), 2.0
