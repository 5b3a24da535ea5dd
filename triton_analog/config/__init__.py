"""The configuration of analog layers: dataclasses and enums with AIHWKIT's names and defaults, and every validity check.

Only the layers read these objects. Operations and :mod:`triton_analog.functional` take numbers and tensors.
"""

from triton_analog.config.effects import ConfigWarning
from triton_analog.config.enums import (
    SavedInput,
    WeightClipType,
    WeightModifierType,
    WeightNoiseInjectionType,
    WeightNoiseRefresh,
    WeightNoiseType,
    WeightQuantizationType,
)
from triton_analog.config.errors import ConfigError
from triton_analog.config.rpu_config import TorchInferenceRPUConfig
from triton_analog.config.sections import (
    InputRangeParameter,
    IOParameters,
    MappingParameter,
    PrePostProcessingParameter,
    WeightClipParameter,
    WeightModifierParameter,
    changes,
)

__all__ = [
    "ConfigError",
    "ConfigWarning",
    "IOParameters",
    "InputRangeParameter",
    "MappingParameter",
    "PrePostProcessingParameter",
    "SavedInput",
    "TorchInferenceRPUConfig",
    "WeightClipParameter",
    "WeightClipType",
    "WeightModifierParameter",
    "WeightModifierType",
    "WeightNoiseInjectionType",
    "WeightNoiseRefresh",
    "WeightNoiseType",
    "WeightQuantizationType",
    "changes",
]
