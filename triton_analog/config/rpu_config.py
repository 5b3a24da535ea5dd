"""The config of an analog layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from triton_analog.config import checks, dictionaries
from triton_analog.config.sections import (
    IOParameters,
    MappingParameter,
    PrePostProcessingParameter,
    Section,
    WeightClipParameter,
    WeightModifierParameter,
)

C = TypeVar("C", bound="TorchInferenceRPUConfig")


@dataclass(slots=True)
class TorchInferenceRPUConfig(Section):
    """Everything an analog layer simulates. The default simulates nothing: the layer computes what its torch one does."""

    forward: IOParameters = field(default_factory=IOParameters)
    """Converters and output noise."""
    clip: WeightClipParameter = field(default_factory=WeightClipParameter)
    """Limit on the weights."""
    modifier: WeightModifierParameter = field(default_factory=WeightModifierParameter)
    """Weight noise and weight quantization."""
    mapping: MappingParameter = field(default_factory=MappingParameter)
    """Size of the tiles."""
    pre_post: PrePostProcessingParameter = field(default_factory=PrePostProcessingParameter)
    """The input range."""

    def validate(self) -> None:
        """Check every field.

        Raises:
            ConfigError: the first field that is wrong, by its path.
        """
        checks.check_types(self, "")
        checks.check_input_range(self.pre_post.input_range)
        checks.check_forward(self.forward, self.pre_post.input_range.enable)
        checks.check_clip(self.clip)
        checks.check_modifier(self.modifier, self.clip.type)

    def changes(self) -> dict[str, Any]:
        """Every field that differs from its default, by path, with enums by name."""
        default = dictionaries.flat(TorchInferenceRPUConfig().to_dict())
        return {path: value for path, value in dictionaries.flat(self.to_dict()).items() if value != default.get(path)}

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of numbers, booleans and strings (enums by name), fit for JSON."""
        return dictionaries.to_dict(self)

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """The inverse of :meth:`to_dict`. Missing fields get their default. Does not validate the values.

        Raises:
            ConfigError: an unknown field or enum name, or a section that is not a dictionary.
        """
        config = cls()
        dictionaries.fill(config, values, "")
        return config
