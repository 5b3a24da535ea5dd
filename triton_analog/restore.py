"""A converted model anew, from its checkpoint and the digital model that it was made of."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from triton_analog.config import TorchInferenceRPUConfig
from triton_analog.convert import convert_to_analog, default_conversion_map
from triton_analog.nn.containers import AnalogSequential
from triton_analog.nn.parts import is_dtensor
from triton_analog.nn.settings import decode
from triton_analog.summary import analog_summary

_CONFIG_KEY = re.compile(r"(?:(.*)\.)?_extra_state[^.]*")
"""The layer's name is its group; recurrent layers have a config for each of their cells' matrices."""


def restore_analog(module: nn.Module, state_dict: Mapping[str, Any], inplace: bool = False) -> Any:
    """``module``, digital as it was before its conversion, as the analog model that ``state_dict`` is of.

    Layers with a config in the state dict are converted, each with its own, all others stay digital; then everything is
    loaded. Keys of tied parameters may be missing, as safetensors leaves them out.

    Args:
        module: A model built like the one that was converted; its values do not matter.
        state_dict: Of the converted model, from ``torch.load(path, weights_only=True)``, safetensors or anywhere else.
        inplace: Change ``module`` itself instead of a deep copy.

    Raises:
        ConfigError: a config in ``state_dict`` cannot be read.
        RuntimeError: keys are missing or left over, or a shape differs.
        ValueError: ``state_dict`` holds DTensors, has no analog layers, or some that are none of ``module``'s layers.
    """
    cut = [key for key, value in state_dict.items() if is_dtensor(value)]
    if cut:
        raise ValueError(
            f"state_dict: {cut[0]} and {len(cut) - 1} others are parts on several ranks (DTensors); take the whole of it, "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint."
            "state_dict"
        )
    configs = _configs(state_dict)
    if not configs:
        raise ValueError(
            "state_dict: it holds no config of an analog layer (a key that ends with _extra_state); load it into a digital "
            "model, or convert the model with your config and call its load_state_dict"
        )
    classes = default_conversion_map(module)
    layers = {
        name
        for name, layer in module.named_modules(remove_duplicate=False)
        if type(layer) in classes and not issubclass(classes[type(layer)], AnalogSequential)
    }
    unknown = sorted(configs.keys() - layers)
    if unknown:
        raise ValueError(
            f"state_dict: it has analog layers that are no layers to convert in this model: {', '.join(unknown)}; build "
            "the model as it was before its conversion"
        )
    analog = convert_to_analog(
        module,
        next(iter(configs.values())),
        specific_rpu_config_fun=lambda name, layer, config: configs[name],
        exclude_modules=sorted({*(layers - configs.keys()), *_digital(module, configs)}),
        inplace=inplace,
        convert_adapters=True,  # those that were
    )
    _load(analog, state_dict)
    return analog


def _digital(module: nn.Module, configs: Collection[str]) -> list[str]:
    """What stays digital, so that nothing is said of it again."""
    names = [weights.name for weights in analog_summary(module).digital]
    return [name for name in names if name and not any(f"{config}.".startswith(f"{name}.") for config in configs)]


def _configs(state_dict: Mapping[str, Any]) -> dict[str, TorchInferenceRPUConfig]:
    found: dict[str, TorchInferenceRPUConfig] = {}
    for key, value in state_dict.items():
        match = _CONFIG_KEY.fullmatch(key)
        if match is not None:
            own = (
                value[0] if isinstance(value, Tensor) and value.ndim == 2 else value
            )  # of several experts, each has its own
            found.setdefault(match[1] or "", decode(own, TorchInferenceRPUConfig))
    return found


def _load(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load strictly, but for the keys of parameters that have been loaded under another name."""
    result = model.load_state_dict(state_dict, strict=False)
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(tensors[key]) for key in state_dict if key in tensors}
    missing = [key for key in result.missing_keys if id(tensors.get(key)) not in loaded]
    if missing or result.unexpected_keys:
        raise RuntimeError(f"state_dict: missing are {missing}; left over are {result.unexpected_keys}")
