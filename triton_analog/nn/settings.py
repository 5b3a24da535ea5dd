"""The config of a layer: checked, as the numbers that a forward takes, and as a tensor for checkpoints."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from triton_analog.config import (
    ConfigError,
    SavedInput,
    TorchInferenceRPUConfig,
    WeightClipType,
    WeightNoiseInjectionType,
    WeightNoiseRefresh,
    WeightQuantizationType,
)
from triton_analog.functional import Kind
from triton_analog.nn.compilers import run_while_tracing

STATE_BYTES = 1024
"""Length of the config in a state dict: padded, so that loaders that fill existing tensors find one of the same size."""

QUANTIZATION: dict[WeightQuantizationType, Kind] = {
    WeightQuantizationType.NONE: "none",
    WeightQuantizationType.DISCRETIZE: "per_tensor",
    WeightQuantizationType.DISCRETIZE_PER_CHANNEL: "per_channel",
}
_NOISE = {
    WeightNoiseInjectionType.NONE: "none",
    WeightNoiseInjectionType.ADD_NORMAL: "per_tensor",
    WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL: "per_channel",
}
_SAVED_INPUT = {SavedInput.FULL: "full", SavedInput.INT8: "int8"}
UNDECAYED = ("input_range", "learnable_weight_clip")
"""Parameters of a layer that weight decay must leave alone."""
GAUSSIAN_CLIP = (WeightClipType.LAYER_GAUSSIAN, WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL)
_PER_CHANNEL_CLIP = (WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, WeightClipType.LEARNABLE_PER_CHANNEL)


def check_config(rpu_config: Any) -> TorchInferenceRPUConfig:
    """``rpu_config`` itself, once it is known to be a valid config.

    Raises:
        ConfigError: it is missing, of another type, or not valid.
    """
    if not isinstance(rpu_config, TorchInferenceRPUConfig):
        raise ConfigError(f"rpu_config: got {_described(rpu_config)}, such as rpu_config=TorchInferenceRPUConfig()")
    rpu_config.validate()
    return rpu_config


@run_while_tracing
def fault(config: TorchInferenceRPUConfig) -> str | None:
    """What is wrong with a config that was changed by hand. Compilers take the answer for a constant: all that they read of the
    config is guarded anyway."""
    try:
        config.validate()
    except ConfigError as error:
        return str(error)
    return None


def _described(given: Any) -> str:
    """Something that is no config, and what to do about it."""
    if given is None:
        return "nothing; pass a config object"
    if isinstance(given, type) and issubclass(given, TorchInferenceRPUConfig):
        return f"the class {given.__name__}; pass a config object, which calling it makes"
    kind = type(given)
    if kind.__name__.endswith("RPUConfig"):
        return f"a {kind.__name__} of {kind.__module__}; pass a config object of triton_analog.config"
    return f"{given!r}; pass a config object"


def refuse_config(arguments: dict[str, Any]) -> None:
    """No config lies in any place of a constructor's ``arguments`` but that of ``rpu_config``.

    Raises:
        TypeError: one does, as in ``AnalogLinear(4, 2, config)``.
    """
    for name, value in arguments.items():
        if name != "rpu_config" and isinstance(value, TorchInferenceRPUConfig):
            raise TypeError(f"{name}: got a {type(value).__name__}; pass the config by its name: rpu_config=config")


def settings(config: TorchInferenceRPUConfig) -> dict[str, Any]:
    """``config`` as keyword arguments of :func:`triton_analog.functional.analog_linear`, in a training forward.

    Without the decay of the range, which is decided once per step and not in a backward (:mod:`triton_analog.nn.before_step`).
    """
    io, modifier, range_ = config.forward, config.modifier, config.pre_post.input_range
    return {
        "dynamic_input_range": range_.enable and range_.dynamic,
        "max_input_size": config.mapping.max_input_size,
        "inp_res": io.inp_res,
        "inp_noise": io.inp_noise,
        "inp_sto_round": io.inp_sto_round,
        "out_noise": io.out_noise,
        "out_noise_per_channel": io.out_noise_per_channel,
        "out_bound": io.out_bound,
        "out_bound_per_channel": config.clip.type in _PER_CHANNEL_CLIP,
        "out_res": io.out_res,
        "weight_quantization": QUANTIZATION[modifier.quantization_type],
        "weight_res": modifier.res,
        "weight_noise": _NOISE[modifier.noise_type],
        "weight_noise_std": modifier.std_dev,
        "fast_mode": range_.fast_mode,
        "save_input": _SAVED_INPUT[io.save_input],
    }


def constant(value: Any) -> Any:
    """``value`` itself. A compiler that takes numbers of a changed config for variables makes a constant of it: it must
    know the value to put it into a set.
    """
    (known,) = {value}
    return known


def is_static(config: TorchInferenceRPUConfig) -> bool:
    """Whether a layer with this config stores its input ranges."""
    return config.pre_post.input_range.enable and not config.pre_post.input_range.dynamic


def learns_clip(config: TorchInferenceRPUConfig) -> bool:
    return config.clip.type is WeightClipType.LEARNABLE_PER_CHANNEL


def keeps_noise(config: TorchInferenceRPUConfig) -> bool:
    """Whether weight noise, if there is any, outlasts a forward."""
    return config.modifier.refresh is WeightNoiseRefresh.STEP


def encode(config: TorchInferenceRPUConfig) -> Tensor:
    """``config`` as JSON in a ``uint8`` tensor, which every checkpoint format can hold."""
    text = json.dumps(config.to_dict()).ljust(STATE_BYTES)
    return torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8)


def decode(state: Any, kind: type[TorchInferenceRPUConfig]) -> TorchInferenceRPUConfig:
    """The config in a ``uint8`` tensor of JSON, also after a cast of the whole state dict to another dtype."""
    try:
        state = state.detach().cpu()
        whole = state.round() if state.is_floating_point() else state  # an average of equals may be a little off
        values = json.loads(bytes(whole.to(torch.uint8).tolist()))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"extra state: got {type(state).__name__}, which is not a uint8 tensor with the JSON of a config ({error}); "
            "drop the key to keep the config of the layer"
        ) from error
    return kind.from_dict(values)
