"""The configuration of analog layers: dataclasses and enums with AIHWKIT's names and defaults, and every validity check.

Only the layers read these objects. Operations and :mod:`triton_analog.functional` take numbers and tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from math import isfinite
from typing import Any, TypeVar, get_type_hints

from triton_analog.reference.grid import MAX_STEPS

C = TypeVar("C", bound="TorchInferenceRPUConfig")


class ConfigError(ValueError):
    """A configuration that cannot be simulated. The message names the field, the value, what is allowed and a remedy."""


class WeightNoiseInjectionType(Enum):
    """Noise added to the weights in each training forward."""

    NONE = "None"
    """No noise."""
    ADD_NORMAL = "AddNormal"
    """Gaussian, scaled by the largest weight of the slice."""
    ADD_NORMAL_PER_CHANNEL = "AddNormalPerChannel"
    """Gaussian, scaled by the largest weight of each output channel in the slice."""


class WeightNoiseRefresh(Enum):
    """How long weight noise lasts."""

    FORWARD = "Forward"
    """New noise in each training forward."""
    STEP = "Step"
    """New noise after each optimizer step: all micro-batches of a gradient accumulation see the same noisy weight."""


class WeightQuantizationType(Enum):
    """Rounding of the weights to a grid, in training and evaluation."""

    NONE = "None"
    """No rounding."""
    DISCRETIZE = "Discretize"
    """One scale per slice."""
    DISCRETIZE_PER_CHANNEL = "DiscretizePerChannel"
    """One scale per slice and output channel."""


class WeightClipType(Enum):
    """Limit on the magnitude of the weights."""

    NONE = "None"
    """No limit."""
    LAYER_GAUSSIAN = "LayerGaussian"
    """After each optimizer step, ``sigma`` standard deviations of the whole weight matrix."""
    LAYER_GAUSSIAN_PER_CHANNEL = "LayerGaussianPerChannel"
    """After each optimizer step, ``sigma`` standard deviations of each output channel."""
    LEARNABLE_PER_CHANNEL = "LearnablePerChannel"
    """In the forward, a learned limit per slice and output channel."""


class SavedInput(Enum):
    """What a training forward keeps of its input for the backward."""

    FULL = "Full"
    """The input itself: not a copy, so that layers with the same input, and what made it, keep it only once."""
    INT8 = "Int8"
    """The DAC's integers and two flags per element, five eighths of the bytes of bf16, for one more read of the input; the
    gradients are the same. Needs ``inp_res`` of 2 to 254 steps."""


_changes = 0


def changes() -> int:
    """How often a field of any config was set in this process: while this number stays, no config has changed."""
    return _changes


class _Section:
    """Counts what is set, so that layers need not compare their configs in every forward."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        global _changes
        _changes += 1
        object.__setattr__(self, name, value)


@dataclass(slots=True)
class IOParameters(_Section):
    """The analog matrix product: converters at its input (DAC) and output (ADC), and the noise at its output.

    A resolution is a number of steps (``2**8 - 2``), its inverse (``1 / 254``), or ``<= 0`` for off. Everything here
    needs an input range (``pre_post.input_range.enable``).
    """

    inp_res: float = -1.0
    """Resolution of the DAC."""
    out_noise: float = 0.0
    """Standard deviation of the output noise, in units of input range times largest weight; training only. 0 is off."""
    out_noise_per_channel: bool = False
    """Scale the output noise by the largest weight of each output channel instead of the slice's."""
    out_bound: float = 0.0
    """Largest output, in units of input range times largest weight. ``<= 0`` is off."""
    out_res: float = -1.0
    """Resolution of the ADC; needs ``out_bound > 0``."""
    save_input: SavedInput = SavedInput.FULL
    """What the backward keeps of the input."""


@dataclass(slots=True)
class WeightClipParameter(_Section):
    """How large the weights may become."""

    sigma: float = -1.0
    """Standard deviations allowed by the ``LAYER_GAUSSIAN`` kinds."""
    type: WeightClipType = WeightClipType.NONE
    """The kind of limit."""


@dataclass(slots=True)
class WeightModifierParameter(_Section):
    """What the forward does to the weights. The stored weights are never changed by it."""

    std_dev: float = 0.0
    """Standard deviation of the weight noise, relative to the largest weight."""
    res: float = 0.0
    """Number of weight states or its inverse."""
    noise_type: WeightNoiseInjectionType = WeightNoiseInjectionType.NONE
    """The kind of noise."""
    quantization_type: WeightQuantizationType = WeightQuantizationType.NONE
    """The kind of quantization; needs ``res``."""
    refresh: WeightNoiseRefresh = WeightNoiseRefresh.FORWARD
    """How long the noise lasts."""


@dataclass(slots=True)
class MappingParameter(_Section):
    """How a weight matrix is mapped to analog tiles."""

    max_input_size: int = -1
    """Most input features a tile takes; more are cut into nearly equal slices. ``<= 0`` is no limit."""


@dataclass(slots=True)
class InputRangeParameter(_Section):
    """The range that inputs are clamped to and the DAC spans, one per slice."""

    enable: bool = False
    """Use an input range at all."""
    dynamic: bool = False
    """Take the range from each row of the input instead of a stored value."""
    fast_mode: bool = False
    """Find a stored range from running extreme values instead of standard deviations."""
    act_range_momentum: float = 0.95
    """Weight of the old extreme values in fast mode; -1 keeps the all-time extremes."""
    learn_input_range: bool = True
    """Train the stored range by gradient descent."""
    init_value: float = 3.0
    """The stored range before any data."""
    init_from_data: int = 100
    """Number of training batches that set the stored range. ``<= 0`` is off."""
    init_std_alpha: float = 3.0
    """Standard deviations of the data that those batches aim at."""
    decay: float = 0.001
    """Pull of a learned range towards 0 while few inputs are clamped."""
    input_min_percentage: float = 0.95
    """Share of inputs inside the range above which ``decay`` acts."""


@dataclass(slots=True)
class PrePostProcessingParameter(_Section):
    """Digital processing around the tiles."""

    input_range: InputRangeParameter = field(default_factory=InputRangeParameter)
    """The input range."""


@dataclass(slots=True)
class TorchInferenceRPUConfig(_Section):
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
        _check_types(self, "")
        _check_input_range(self.pre_post.input_range)
        _check_forward(self.forward, self.pre_post.input_range.enable)
        _check_clip(self.clip)
        _check_modifier(self.modifier, self.clip.type)

    def changes(self) -> dict[str, Any]:
        """Every field that differs from its default, by path, with enums by name."""
        default = _flat(TorchInferenceRPUConfig().to_dict())
        return {path: value for path, value in _flat(self.to_dict()).items() if value != default.get(path)}

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of numbers, booleans and strings (enums by name), fit for JSON."""
        return _to_dict(self)

    @classmethod
    def from_dict(cls: type[C], values: dict[str, Any]) -> C:
        """The inverse of :meth:`to_dict`. Missing fields get their default. Does not validate the values.

        Raises:
            ConfigError: an unknown field or enum name, or a section that is not a dictionary.
        """
        config = cls()
        _fill(config, values, "")
        return config


# ---- Checks -----------------------------------------------------------------------------------------------------------


def _require(condition: bool, path: str, value: Any, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{path}: got {value.name if isinstance(value, Enum) else repr(value)}; {rule}")


def _check_types(section: Any, path: str) -> None:
    """Every field holds what it declares; whole numbers also serve as numbers, but booleans never do."""
    kinds: dict[str, Any] = get_type_hints(type(section))
    for f in fields(section):
        here, value, kind = path + f.name, getattr(section, f.name), kinds[f.name]
        if hasattr(kind, "__dataclass_fields__"):
            _require(isinstance(value, kind), here, value, f"a section of type {kind.__name__} is needed")
            _check_types(value, here + ".")
        elif kind is bool:
            _require(isinstance(value, bool), here, value, "allowed are True and False")
        elif kind is int:
            _require(isinstance(value, int) and not isinstance(value, bool), here, value, "a Python int is needed")
        elif kind is float:
            number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
            _require(number, here, value, "a finite Python number is needed")
        elif isinstance(kind, type) and issubclass(kind, Enum):
            names = ", ".join(f"{kind.__name__}.{member.name}" for member in kind)
            _require(isinstance(value, kind), here, value, f"allowed are {names}")


def _check_resolution(path: str, res: float) -> None:
    steps = 1 / res if 0 < res <= 1 else res
    _require(
        res <= 0 or 2 <= steps <= MAX_STEPS,
        path,
        res,
        "allowed are a number of steps from 2 to 2**22, its inverse, or a value <= 0 for off; 8 bits are 2**8 - 2",
    )


def _check_input_range(range_: InputRangeParameter) -> None:
    here = "pre_post.input_range."
    momentum, share = range_.act_range_momentum, range_.input_min_percentage
    _require(
        0 <= momentum < 1 or momentum == -1,
        here + "act_range_momentum",
        momentum,
        "allowed are [0, 1), and -1 for all-time extreme values",
    )
    _require(
        range_.init_value > 0, here + "init_value", range_.init_value, "the initial range must be > 0, such as 3.0"
    )
    _require(
        range_.init_std_alpha > 0,
        here + "init_std_alpha",
        range_.init_std_alpha,
        "must be > 0, such as 3.0; to keep data out of the range set init_from_data = 0",
    )
    _require(range_.decay >= 0, here + "decay", range_.decay, "must be >= 0; 0 is off")
    _require(0 <= share <= 1, here + "input_min_percentage", share, "a share in 0 .. 1 is needed")
    _require(
        not (range_.enable and range_.dynamic and range_.fast_mode),
        here + "fast_mode",
        range_.fast_mode,
        "it finds a stored range, but dynamic = True takes the range from each row; set one of the two to False",
    )


def _check_forward(io: IOParameters, has_range: bool) -> None:
    _check_resolution("forward.inp_res", io.inp_res)
    _check_resolution("forward.out_res", io.out_res)
    _require(io.out_noise >= 0, "forward.out_noise", io.out_noise, "must be >= 0; 0 is off")
    for name, off in {"inp_res": -1, "out_noise": 0.0, "out_bound": 0.0, "out_res": -1}.items():
        value = getattr(io, name)
        _require(
            has_range or value <= 0,
            f"forward.{name}",
            value,
            "it is scaled by the input range, which is off; set pre_post.input_range.enable = True, "
            f"or forward.{name} = {off}",
        )
    _require(
        io.out_res <= 0 or io.out_bound > 0,
        "forward.out_res",
        io.out_res,
        f"the ADC's grid spans its bound, but forward.out_bound is {io.out_bound!r}; set it > 0, or forward.out_res = -1",
    )
    _require(
        io.save_input is SavedInput.FULL or (io.inp_res > 0 and max(io.inp_res, 1 / io.inp_res) <= 254),
        "forward.save_input",
        io.save_input,
        "it keeps the DAC's integers, so that forward.inp_res must be 2 to 254 steps (or the inverse), but it is "
        f"{io.inp_res!r}; set it to 2**8 - 2, or forward.save_input = SavedInput.FULL",
    )


def _check_clip(clip: WeightClipParameter) -> None:
    gaussian = clip.type in (WeightClipType.LAYER_GAUSSIAN, WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL)
    _require(
        not gaussian or clip.sigma > 0,
        "clip.sigma",
        clip.sigma,
        f"clip.type {clip.type.name} needs a number of standard deviations > 0, such as 2.5; or set clip.type to NONE",
    )


def _check_modifier(modifier: WeightModifierParameter, clip: WeightClipType) -> None:
    quantization = modifier.quantization_type
    _require(modifier.std_dev >= 0, "modifier.std_dev", modifier.std_dev, "must be >= 0; 0 is off")
    _check_resolution("modifier.res", modifier.res)
    _require(
        quantization is WeightQuantizationType.NONE or modifier.res > 0,
        "modifier.res",
        modifier.res,
        f"modifier.quantization_type {quantization.name} needs a number of states or its inverse, such as 2**8 - 2; "
        "or set the type to NONE",
    )
    _require(
        clip is not WeightClipType.LEARNABLE_PER_CHANNEL or quantization is not WeightQuantizationType.DISCRETIZE,
        "modifier.quantization_type",
        quantization,
        "clip.type LEARNABLE_PER_CHANNEL has one scale per channel; allowed with it are NONE and DISCRETIZE_PER_CHANNEL",
    )


# ---- Dictionaries -------------------------------------------------------------------------------------------------------


def _to_dict(section: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value):
            out[f.name] = _to_dict(value)
        else:
            out[f.name] = value.name if isinstance(value, Enum) else value
    return out


def _flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keyed by the path of each value."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return out


def _fill(section: Any, values: Any, path: str) -> None:
    """Write ``values`` into the fields of ``section``."""
    _require(isinstance(values, dict), path.rstrip(".") or "config", values, "a dictionary of fields is needed")
    names = [f.name for f in fields(section)]
    for name, value in values.items():
        here = f"{path}{name}"
        _require(name in names, here, value, f"unknown field; {type(section).__name__} has {', '.join(names)}")
        current = getattr(section, name)
        if is_dataclass(current):
            _fill(current, value, here + ".")
        elif isinstance(current, Enum):
            members = type(current).__members__
            _require(isinstance(value, str) and value in members, here, value, f"allowed are {', '.join(members)}")
            setattr(section, name, members[value])
        else:
            setattr(section, name, value)
