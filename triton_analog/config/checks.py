"""What a config must not be. Every check names the field, the value, what is allowed and a remedy."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from functools import cache
from math import isfinite
from typing import Any, get_type_hints

from triton_analog.config.enums import SavedInput, WeightClipType, WeightQuantizationType
from triton_analog.config.errors import ConfigError
from triton_analog.config.sections import (
    InputRangeParameter,
    IOParameters,
    WeightClipParameter,
    WeightModifierParameter,
)
from triton_analog.reference.grid import MAX_STEPS


def require(condition: bool, path: str, value: Any, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{path}: got {value.name if isinstance(value, Enum) else repr(value)}; {rule}")


@cache
def _kinds(section: type) -> dict[str, Any]:
    """The types of its fields, from their strings."""
    return get_type_hints(section)


def check_types(section: Any, path: str) -> None:
    """Every field holds what it declares; whole numbers also serve as numbers, but booleans never do."""
    kinds = _kinds(section.__class__)
    for f in fields(section):
        here, value, kind = path + f.name, getattr(section, f.name), kinds[f.name]
        if hasattr(kind, "__dataclass_fields__"):
            require(isinstance(value, kind), here, value, f"a section of type {kind.__name__} is needed")
            check_types(value, here + ".")
        elif kind is bool:
            require(isinstance(value, bool), here, value, "allowed are True and False")
        elif kind is int:
            require(isinstance(value, int) and not isinstance(value, bool), here, value, "a Python int is needed")
        elif kind is float:
            number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
            require(number, here, value, "a finite Python number is needed")
        elif isinstance(kind, type) and issubclass(kind, Enum):
            names = ", ".join(f"{kind.__name__}.{member.name}" for member in kind)
            other = type(value)
            of_others = f", and that is of {other.__module__}.{other.__qualname__}" if isinstance(value, Enum) else ""
            require(isinstance(value, kind), here, value, f"allowed are {names}{of_others}")


def check_resolution(path: str, res: float) -> None:
    steps = 1 / res if 0 < res <= 1 else res
    require(
        res <= 0 or 2 <= steps <= MAX_STEPS,
        path,
        res,
        "allowed are a number of steps from 2 to 2**22, its inverse, or a value <= 0 for off; 8 bits are 2**8 - 2",
    )


def check_input_range(range_: InputRangeParameter) -> None:
    here = "pre_post.input_range."
    momentum, share = range_.act_range_momentum, range_.input_min_percentage
    require(
        0 <= momentum < 1 or momentum == -1,
        here + "act_range_momentum",
        momentum,
        "allowed are [0, 1), and -1 for all-time extreme values",
    )
    require(range_.init_value > 0, here + "init_value", range_.init_value, "the initial range must be > 0, such as 3.0")
    require(
        range_.init_std_alpha > 0,
        here + "init_std_alpha",
        range_.init_std_alpha,
        "must be > 0, such as 3.0; to keep data out of the range set init_from_data = 0",
    )
    require(range_.decay >= 0, here + "decay", range_.decay, "must be >= 0; 0 is off")
    require(0 <= share <= 1, here + "input_min_percentage", share, "a share in 0 .. 1 is needed")
    require(
        not (range_.enable and range_.dynamic and range_.fast_mode),
        here + "fast_mode",
        range_.fast_mode,
        "it finds a stored range, but dynamic = True takes the range from each row; set one of the two to False",
    )


def check_forward(io: IOParameters, has_range: bool) -> None:
    check_resolution("forward.inp_res", io.inp_res)
    check_resolution("forward.out_res", io.out_res)
    for name in ("inp_noise", "out_noise", "w_noise"):
        value = getattr(io, name)
        require(value >= 0, f"forward.{name}", value, "must be >= 0; 0 is off")
    for name, off in {"inp_res": -1, "inp_noise": 0.0, "out_noise": 0.0, "out_bound": 0.0, "out_res": -1}.items():
        value = getattr(io, name)
        require(
            has_range or value <= 0,
            f"forward.{name}",
            value,
            "it is scaled by the input range, which is off; set pre_post.input_range.enable = True, "
            f"or forward.{name} = {off}",
        )
    require(
        io.out_res <= 0 or io.out_bound > 0,
        "forward.out_res",
        io.out_res,
        f"the ADC's grid spans its bound, but forward.out_bound is {io.out_bound!r}; set it > 0, or forward.out_res = -1",
    )
    require(
        io.save_input is SavedInput.FULL or (io.inp_res > 0 and max(io.inp_res, 1 / io.inp_res) <= 254),
        "forward.save_input",
        io.save_input,
        "it keeps the DAC's integers, so that forward.inp_res must be 2 to 254 steps (or the inverse), but it is "
        f"{io.inp_res!r}; set it to 2**8 - 2, or forward.save_input = SavedInput.FULL",
    )


def check_clip(clip: WeightClipParameter) -> None:
    gaussian = clip.type in (WeightClipType.LAYER_GAUSSIAN, WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL)
    require(
        not gaussian or clip.sigma > 0,
        "clip.sigma",
        clip.sigma,
        f"clip.type {clip.type.name} needs a number of standard deviations > 0, such as 2.5; or set clip.type to NONE",
    )


def check_modifier(modifier: WeightModifierParameter, clip: WeightClipType) -> None:
    quantization = modifier.quantization_type
    require(modifier.std_dev >= 0, "modifier.std_dev", modifier.std_dev, "must be >= 0; 0 is off")
    check_resolution("modifier.res", modifier.res)
    require(
        quantization is WeightQuantizationType.NONE or modifier.res > 0,
        "modifier.res",
        modifier.res,
        f"modifier.quantization_type {quantization.name} needs a number of states or its inverse, such as 2**8 - 2; "
        "or set the type to NONE",
    )
    require(
        clip is not WeightClipType.LEARNABLE_PER_CHANNEL or quantization is not WeightQuantizationType.DISCRETIZE,
        "modifier.quantization_type",
        quantization,
        "clip.type LEARNABLE_PER_CHANNEL has one scale per channel; allowed with it are NONE and DISCRETIZE_PER_CHANNEL",
    )
