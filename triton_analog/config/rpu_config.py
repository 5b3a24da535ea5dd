"""The config of an analog layer."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, TypeVar

from triton_analog.config import checks, dictionaries, effects
from triton_analog.config.sections import (
    IOParameters,
    MappingParameter,
    PrePostProcessingParameter,
    Section,
    WeightClipParameter,
    WeightModifierParameter,
)

C = TypeVar("C", bound="TorchInferenceRPUConfig")


class _Holder(Section):
    """Room for what was told of the layers of a config (:func:`effects.told_of`), which is no part of what it says."""

    __slots__ = ("_told",)


@dataclass(slots=True, repr=False)
class TorchInferenceRPUConfig(_Holder):
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

    def __repr__(self) -> str:
        parts = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))
        idle = ", ".join(self.without_effect())
        return f"{type(self).__name__}({parts})" + (f"  # without effect: {idle}" if idle else "")

    def __str__(self) -> str:
        """What differs from the defaults, a line each; ``repr`` has every field."""
        name, lines = type(self).__name__, self.marked_changes()
        return "\n    ".join([f"{name}, different from the defaults:", *lines]) if lines else f"{name}, all defaults"

    def without_effect(self) -> list[str]:
        """Paths of the settings that cannot act as the others are."""
        return [remark.path for remark in effects.without_effect(self)]

    def marked_changes(self) -> list[str]:
        """:meth:`changes` as ``path=value``, with those marked that are :meth:`without_effect`."""
        idle = self.without_effect()
        marks = {path: " (no effect)" if path in idle else "" for path in self.changes()}
        return [f"{path}={value}{marks[path]}" for path, value in self.changes().items()]

    def changes(self) -> dict[str, Any]:
        """Those of :meth:`every_field` that differ from their defaults."""
        default = _defaults()
        return {path: value for path, value in self.every_field().items() if value != default.get(path)}

    def every_field(self) -> dict[str, Any]:
        """Values by path, such as ``forward.inp_res``, with enums by name."""
        return dictionaries.flat(self.to_dict())

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


@cache
def _defaults() -> dict[str, Any]:
    """Every field of a default config by path."""
    return dictionaries.flat(TorchInferenceRPUConfig().to_dict())
