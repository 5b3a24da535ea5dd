"""AIHWKIT-Lightning's module paths, so that code written for it runs with another name of the package and nothing else.

``from aihwkit_lightning.simulator.configs import IOParameters`` becomes
``from triton_analog.simulator.configs import IOParameters``. The modules are made here, from one table, and hold nothing but
names of this package.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import triton_analog.aihwkit_bridge as aihwkit_bridge
import triton_analog.calibrate as calibrate
import triton_analog.config as config
import triton_analog.convert as convert
import triton_analog.inference  # noqa: F401 - its package gets a module
import triton_analog.nn as nn
import triton_analog.optim as optim
from triton_analog.aihwkit_bridge.export_config import base_aihwkit_rpu_config
from triton_analog.nn import rnn_layers
from triton_analog.nn.containers import AnalogContainerBase


def specific_rpu_config_id(
    module_name: str, module: Any, rpu_config: config.TorchInferenceRPUConfig
) -> config.TorchInferenceRPUConfig:
    """``rpu_config`` for every layer."""
    return rpu_config


_ENUMS = (
    "WeightClipType", "WeightModifierType", "WeightNoiseInjectionType", "WeightQuantizationType",
)  # fmt: skip
_PARAMETERS = (
    "IOParameters", "InputRangeParameter", "MappingParameter", "PrePostProcessingParameter", "WeightClipParameter",
    "WeightModifierParameter",
)  # fmt: skip
_CELLS = (
    "AnalogGRUCell", "AnalogLSTMCell", "AnalogLSTMCellCombinedWeight", "AnalogVanillaRNNCell",
)  # fmt: skip


def _of(room: Any, *names: str, **others: Any) -> dict[str, Any]:
    return {name: getattr(room, name) for name in names} | others


_CALIBRATION = _of(calibrate, "InputRangeCalibrationType", "calibrate_input_ranges")
_CONVERSION = _of(convert, "convert_to_analog", "convert_to_digital")

MODULES: dict[str, dict[str, Any]] = {
    "exceptions": {
        "AihwkitException": Exception, "ArgumentError": TypeError, "ConfigError": config.ConfigError,
        "ModuleError": TypeError, "TorchTileConfigError": config.ConfigError,
    },
    "inference.calibration": _CALIBRATION,
    "inference.calibration.calibration": _CALIBRATION,
    "nn.conversion": _CONVERSION
    | _of(nn, "AnalogLayerBase")
    | _of(nn, "AnalogWrapper", "AnalogLinear", "AnalogConv1d", "AnalogConv2d", "AnalogConv3d", "AnalogSequential", "AnalogRNN")
    | {
        "specific_rpu_config_id": specific_rpu_config_id, "TorchInferenceRPUConfig": config.TorchInferenceRPUConfig,
        "_DEFAULT_CONVERSION_MAP": convert.CONVERSION_MAP,
    },
    "nn.export": _of(aihwkit_bridge, "export_to_aihwkit", base_aihwkit_rpu_config=base_aihwkit_rpu_config)
    | _of(convert, "convert_to_digital"),
    "nn.modules": {},
    "nn.modules.base": _of(nn, "AnalogLayerBase"),
    "nn.modules.container": _of(nn, "AnalogSequential", "AnalogWrapper", AnalogContainerBase=AnalogContainerBase),
    "nn.modules.conv": _of(nn, "AnalogConv1d", "AnalogConv2d", "AnalogConv3d"),
    "nn.modules.linear": _of(nn, "AnalogLinear") | _of(config, "TorchInferenceRPUConfig"),
    "nn.modules.rnn": {},
    "nn.modules.rnn.cells": _of(nn, *_CELLS, "LSTMState"),
    "nn.modules.rnn.layers": _of(rnn_layers, "AnalogBidirRNNLayer", "AnalogRNNLayer", "AnalogReverseRNNLayer")
    | _of(nn, "LSTMState"),
    "nn.modules.rnn.rnn": _of(nn, "AnalogRNN", ModularRNN=rnn_layers.ModularRNN),
    "optim.analog_optimizer": _of(optim, "AnalogOptimizer") | _of(nn, "AnalogLayerBase"),
    "simulator": {},
    "simulator.configs": _of(config, "TorchInferenceRPUConfig", *_PARAMETERS, *_ENUMS),
    "simulator.configs.configs": _of(config, "TorchInferenceRPUConfig", *_PARAMETERS),
    "simulator.parameters": _of(config, *_PARAMETERS, *_ENUMS),
    "simulator.parameters.enums": _of(config, *_ENUMS),
    "simulator.parameters.inference": _of(config, "WeightClipParameter", "WeightModifierParameter", *_ENUMS),
    "simulator.parameters.io": _of(config, "IOParameters"),
    "simulator.parameters.mapping": _of(config, "MappingParameter"),
    "simulator.parameters.pre_post": _of(config, "InputRangeParameter", "PrePostProcessingParameter"),
}  # fmt: skip
"""By path below the package (an outer module before those inside it), what a module holds. What has a path of its own in
this package too, such as ``nn``, ``optim`` and ``version``, is there already."""


def install() -> None:
    """Make every module of :data:`MODULES` importable."""
    package = __name__.rpartition(".")[0]
    for path, names in MODULES.items():
        name = f"{package}.{path}"
        module: Any = ModuleType(
            name, f"AIHWKIT-Lightning's {path}: names of {package}, at the path where its users look."
        )
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__, module.__package__ = [], name
        module.__all__ = [public for public in names if not public.startswith("_")]
        vars(module).update(names)
        sys.modules[name] = module
        outer, _, own = name.rpartition(".")
        setattr(sys.modules[outer], own, module)
