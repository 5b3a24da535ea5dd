"""A config as nested dictionaries, and back."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from triton_analog.config.checks import require
from triton_analog.config.sections import NOT_SIMULATED
from triton_analog.hints import did_you_mean


def to_dict(section: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value):
            out[f.name] = to_dict(value)
        else:
            out[f.name] = value.name if isinstance(value, Enum) else value
    return out


def flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keyed by the path of each value."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= flat(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return out


def fill(section: Any, values: Any, path: str) -> None:
    """Write ``values`` into the fields of ``section``."""
    require(isinstance(values, dict), path.rstrip(".") or "config", values, "a dictionary of fields is needed")
    names = [f.name for f in fields(section)]
    for name, value in values.items():
        here = f"{path}{name}"
        known = f"unknown field; {type(section).__name__} has {', '.join(names)}"
        known += did_you_mean(str(name), names, "", lead="; ")
        require(name in names, here, value, NOT_SIMULATED.get(name, known))
        current = getattr(section, name)
        if is_dataclass(current):
            fill(current, value, here + ".")
        elif isinstance(current, Enum):
            members = type(current).__members__
            allowed = f"allowed are {', '.join(members)}" + did_you_mean(str(value), members, "", lead="; ")
            require(isinstance(value, str) and value in members, here, value, allowed)
            setattr(section, name, members[value])
        else:
            setattr(section, name, value)
