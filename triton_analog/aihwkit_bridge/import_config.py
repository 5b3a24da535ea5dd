"""A config of AIHWKIT's torch tiles as one of ours that computes the same in evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from triton_analog.aihwkit_bridge.export_config import RANGE_FIELDS
from triton_analog.aihwkit_bridge.package import load_aihwkit
from triton_analog.config import (
    ConfigError,
    TorchInferenceRPUConfig,
    WeightClipType,
    WeightNoiseInjectionType,
    effects,
)
from triton_analog.config.sections import NOT_SIMULATED

_IDEAL_IO = {
    "inp_asymmetry": 0.0,
    "out_noise_std": 0.0,
    "out_sto_round": False,
    "out_scale": 1.0,
    "out_asymmetry": 0.0,
}
"""Fields of ``forward`` that have no counterpart, and the values that switch them off."""

_NEUTRAL_TRAINING: dict[str, dict[str, Any]] = {
    "modifier": {"per_batch_sample": False, "pdrop": 0.0},
    "clip": {"fixed_value": -1.0},
    "mapping": {"learn_out_scaling": False},
    "pre_post.input_range": {"manage_output_clipping": False, "gradient_scale": 1.0, "gradient_relative": True},
}
"""Fields without a counterpart that act in training only."""


class Imported(NamedTuple):
    """What a layer is made of, beside its weight."""

    config: TorchInferenceRPUConfig
    fixed_range: float | None
    """The range of every slice where it is no parameter of the tiles: the bound of the DAC."""
    learned_clip: Tensor | None
    """``[S, N]``: where the ADC's bound is scaled by something else than the largest weights."""


def import_config(
    theirs: Any, layer: str, scales: Tensor, wmax: Tensor, sizes: list[int], note: Callable[[str], None]
) -> Imported:
    """The config for one layer.

    Args:
        theirs: The config of its tiles.
        layer: Its name, for errors.
        scales: ``[S, N]``, what every output of every tile is multiplied by.
        wmax: ``[S, N]``, the largest weights.
        sizes: Width of every slice.
        note: Takes a sentence on what acts differently in training.

    Raises:
        ConfigError: a setting that acts in evaluation and has no counterpart.
    """
    enums = load_aihwkit("import_from_aihwkit").enums
    io = theirs.forward
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = theirs.mapping.max_input_size if len(sizes) > 1 else _one_slice(theirs, sizes)
    fixed_range = None
    learned_clip = None
    for name in RANGE_FIELDS:
        setattr(config.pre_post.input_range, name, getattr(theirs.pre_post.input_range, name))
    if io.is_perfect or io.mv_type is enums.AnalogMVType.IDEAL:  # the range still clips
        config.pre_post.input_range.enable = theirs.pre_post.input_range.enable
    else:
        fixed_range = _import_io(config, theirs, layer, math.sqrt(len(sizes)), enums, note)
        if config.forward.out_bound > 0:
            learned_clip = _import_adc_scale(config, theirs, scales, wmax, enums, note)
    if learned_clip is None:
        _import_clip(config, theirs, enums, note)
    _import_modifier(config, theirs, scales, wmax if learned_clip is None else learned_clip, enums, note)
    _note_training(theirs, enums, note)
    try:
        config.validate()
    except ConfigError as error:
        raise ConfigError(f"{layer or '(root)'}: {error}") from error
    effects.mute(config)  # what cannot act here could not there, and has AIHWKIT's defaults
    return Imported(config, fixed_range, learned_clip)


def _refuse(layer: str, field: str, value: Any, remedy: str) -> ConfigError:
    given = getattr(value, "name", repr(value))
    return ConfigError(f"{layer or '(root)'}: {field}: got {given}, which is not simulated here; {remedy}")


def _one_slice(theirs: Any, sizes: list[int]) -> int:
    limit = theirs.mapping.max_input_size
    return limit if limit <= 0 or limit >= sizes[0] else -1


def _import_io(
    config: TorchInferenceRPUConfig,
    theirs: Any,
    layer: str,
    root_slices: float,
    enums: Any,
    note: Callable[[str], None],
) -> float | None:
    """Fill in ``config.forward`` and whether there is a range; returns the range if AIHWKIT's is the DAC's bound."""
    io, range_ = theirs.forward, theirs.pre_post.input_range
    for field, off in _IDEAL_IO.items():
        if getattr(io, field) != off:
            raise _refuse(layer, f"forward.{field}", getattr(io, field), f"set it to {off}")
    management, bound_management = io.noise_management, io.bound_management
    if bound_management is not enums.BoundManagementType.NONE and io.out_bound > 0:
        remedy = f"set it to NONE, or out_bound = 0: {NOT_SIMULATED['bound_management']}"
        raise _refuse(layer, "forward.bound_management", bound_management, remedy)
    dynamic = management is enums.NoiseManagementType.ABS_MAX and io.nm_thres <= 0
    if not dynamic and management is not enums.NoiseManagementType.NONE:
        raise _refuse(layer, "forward.noise_management", management, "set it to NONE, or to ABS_MAX with nm_thres = 0")
    if dynamic and range_.enable:
        raise _refuse(layer, "forward.noise_management", management, "set it to NONE, or disable the input range")

    fixed_range = None
    ours = config.pre_post.input_range
    ours.enable, ours.dynamic = range_.enable or dynamic, dynamic
    config.forward.out_bound, config.forward.out_res = max(io.out_bound, 0.0), io.out_res
    if not ours.enable and io.inp_bound > 0:
        fixed_range = io.inp_bound
        ours.enable, ours.learn_input_range, ours.init_from_data = True, False, 0
        config.forward.inp_res, config.forward.out_bound = io.inp_res, config.forward.out_bound / fixed_range
    elif io.inp_res > 0:
        config.forward.inp_res = _resolution(layer, io.inp_res, io.inp_bound)
    elif 0 < io.inp_bound < 1:
        raise _refuse(layer, "forward.inp_bound", io.inp_bound, "set it to 1.0, as inputs are scaled to -1 .. 1")
    if config.forward.inp_res > 0 and fixed_range is not None and not _on_grid(io.inp_res):
        raise _refuse(layer, "forward.inp_res", io.inp_res, "take an even number of steps, such as 2**8 - 2")
    config.forward.inp_noise = max(io.inp_noise, 0.0) / (fixed_range or 1.0)
    config.forward.inp_sto_round = io.inp_sto_round
    if io.out_noise > 0:
        note("forward.out_noise: acts in training only")
        config.forward.out_noise = float(f"{io.out_noise * root_slices / (fixed_range or 1.0):.12g}")
        config.forward.out_noise_per_channel = theirs.mapping.weight_scaling_columnwise
    return fixed_range


def _on_grid(res: float) -> bool:
    """Whether the range itself is a point of the grid."""
    half = (res if res > 1 else 1 / res) / 2
    return abs(half - round(half)) < 1e-6


def _resolution(layer: str, res: float, bound: float) -> float:
    """The DAC's resolution for inputs in -1 .. 1, of a grid that spans ``bound``."""
    steps = (res if res > 1 else 1 / res) / bound if bound > 0 else 0.0
    fits = bound > 0 and (bound >= 1 + 1 / steps or (bound == 1 and _on_grid(res)))
    if not fits:
        raise _refuse(
            layer,
            f"forward.inp_bound with inp_res = {res}",
            bound,
            "AIHWKIT clips what it has rounded: set inp_bound = 1.0 and take an even number of steps, such as 2**8 - 2",
        )
    return res / bound if res > 1 else res * bound


def _import_adc_scale(
    config: TorchInferenceRPUConfig, theirs: Any, scales: Tensor, wmax: Tensor, enums: Any, note: Callable[[str], None]
) -> Tensor | None:
    """Let the ADC's bound scale as in AIHWKIT; returns the learned clip ``[S, N]`` that this takes, if any."""
    used = wmax > 0

    def same(bounds: Tensor) -> bool:
        return bool(((scales - bounds).abs() <= 1e-5 * bounds)[used].all())

    if same(wmax.amax(1, keepdim=True).expand_as(wmax)):
        return None
    if same(wmax) and theirs.clip.type is enums.WeightClipType.LAYER_GAUSSIAN:
        return None
    if theirs.clip.type is not enums.WeightClipType.NONE:
        note(f"clip.type {theirs.clip.type.name}: left out, as a learned clip holds the scale of the ADC")
    stretch = max(1.0, (wmax / scales).max().item())
    stretch = stretch if stretch > 1 + 1e-6 else 1.0
    config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    config.forward.out_bound /= stretch
    return (scales * stretch).maximum(wmax)


def _import_clip(config: TorchInferenceRPUConfig, theirs: Any, enums: Any, note: Callable[[str], None]) -> None:
    config.clip.sigma = theirs.clip.sigma
    if theirs.clip.type is enums.WeightClipType.LAYER_GAUSSIAN:
        columnwise = theirs.mapping.weight_scaling_columnwise
        config.clip.type = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL if columnwise else WeightClipType.LAYER_GAUSSIAN
    elif theirs.clip.type is not enums.WeightClipType.NONE:
        note(f"clip.type {theirs.clip.type.name}: left out")


def _import_modifier(
    config: TorchInferenceRPUConfig, theirs: Any, scales: Tensor, wmax: Tensor, enums: Any, note: Callable[[str], None]
) -> None:
    modifier = theirs.modifier
    config.modifier.std_dev, config.modifier.res = modifier.std_dev, modifier.res
    kinds = enums.WeightModifierType
    if modifier.type is kinds.ADD_NORMAL:
        config.modifier.noise_type = (
            WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL
            if theirs.mapping.weight_scaling_columnwise
            else WeightNoiseInjectionType.ADD_NORMAL
        )
        if not modifier.rel_to_actual_wmax:
            largest = (wmax.amax() / scales.flatten()[wmax.argmax()]).item() / modifier.assumed_wmax
            if abs(largest - 1) > 1e-6:
                config.modifier.std_dev /= largest
    elif modifier.type not in (kinds.NONE, kinds.COPY):
        note(f"modifier.type {modifier.type.name}: left out")


def _note_training(theirs: Any, enums: Any, note: Callable[[str], None]) -> None:
    for path, neutral in _NEUTRAL_TRAINING.items():
        section = theirs
        for part in path.split("."):
            section = getattr(section, part)
        for field, off in neutral.items():
            if getattr(section, field) != off:
                note(f"{path}.{field} = {getattr(section, field)!r}: left out")
