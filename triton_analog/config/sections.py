"""The sections of a config: dataclasses with AIHWKIT's names and defaults."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from triton_analog.config.enums import (
    MODIFIER_KINDS,
    SavedInput,
    WeightClipType,
    WeightModifierType,
    WeightNoiseInjectionType,
    WeightNoiseRefresh,
    WeightNoiseType,
    WeightQuantizationType,
)
from triton_analog.config.errors import ConfigError
from triton_analog.hints import did_you_mean, warn_user

NOT_SIMULATED = {
    "bound_management": "it repeats the product of a whole batch with smaller inputs while any output saturates, up to eleven "
    "products in a forward, and the host would have to wait for each of them; set forward.out_bound to what hardly saturates"
}
"""Fields that AIHWKIT has and no config here can have, and why."""

_changes = 0


def changes() -> int:
    """How often a field of any config was set in this process: while this number stays, no config has changed."""
    return _changes


class Section:
    """Counts what is set, so that layers need not compare their configs in every forward, and names misspelt fields."""

    __slots__ = ()

    def __new__(cls, *args: Any, **values: Any) -> Any:
        if values:
            known = inspect.signature(cls.__init__).parameters
            unknown = next((name for name in values if name not in known), None)
            if unknown is not None and not any(one.kind is one.VAR_KEYWORD for one in known.values()):
                raise TypeError(_unknown(cls, unknown))
        return super().__new__(cls)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Without a call of ``__setattr__``: a copy changes no config, and models have hundreds of them."""
        new = object.__new__(type(self))
        memo[id(self)] = new
        state = self.__reduce_ex__(4)[2]
        for values in state if isinstance(state, tuple) else (state,):
            for name, value in (values or {}).items():
                object.__setattr__(new, name, copy.deepcopy(value, memo))
        return new

    if not TYPE_CHECKING:  # a checker would then allow every name

        def __setattr__(self, name: str, value: Any) -> None:
            global _changes
            known = name.startswith("_") or hasattr(type(self), name) or name in self.__dataclass_fields__
            # A preset that is no slotted class would take any name, and a misspelt field would be lost.
            if not known and (not hasattr(self, "__dict__") or did_you_mean(name, self.__dataclass_fields__, "")):
                raise AttributeError(_unknown(type(self), name, self))
            object.__setattr__(self, name, value)
            _changes += 1

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_") or name in self.__dataclass_fields__:  # asked for by copies that are not filled yet
                raise AttributeError(name)
            raise AttributeError(_unknown(type(self), name, self))


def _unknown(kind: Any, name: str, section: Any = None) -> str:
    """What to say of a field ``name`` that the class ``kind`` does not have; of ``section``, if there is an instance."""
    names = [f.name for f in fields(kind)]
    if name in NOT_SIMULATED:
        return f"{kind.__name__} has no field {name!r}: {NOT_SIMULATED[name]}"
    for outer in names if section is not None else ():
        if name in getattr(getattr(section, outer), "__dataclass_fields__", ()):
            return f"{kind.__name__} has no field {name!r} itself; it is {outer}.{name}"
    return f"{kind.__name__} has no field {name!r}; {did_you_mean(name, names, 'it has ' + ', '.join(names))}"


@dataclass(slots=True)
class IOParameters(Section):
    """The analog matrix product: converters at its input (DAC) and output (ADC), and the noise behind the one and before the
    other.

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
    inp_noise: float = 0.0
    """Standard deviation of the input noise behind the DAC, in units of the input range, in training and evaluation. 0 is off."""
    inp_sto_round: bool = False
    """Let the DAC round up with the probability of the fraction instead of to the nearest step, in training and
    evaluation; needs ``inp_res``."""
    w_noise: float = 0.0
    """Standard deviation of the read noise of the weights, in units of the largest weight (of the device's largest conductance
    on a simulated chip); drawn anew in each forward, evaluation only. 0 is off. It needs no input range."""
    w_noise_type: WeightNoiseType = WeightNoiseType.NONE
    """The kind of read noise."""


@dataclass(slots=True)
class WeightClipParameter(Section):
    """How large the weights may become."""

    sigma: float = -1.0
    """Standard deviations allowed by the ``LAYER_GAUSSIAN`` kinds."""
    type: WeightClipType = WeightClipType.NONE
    """The kind of limit."""


@dataclass(slots=True)
class WeightModifierParameter(Section):
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

    def __init__(
        self,
        std_dev: float = 0.0,
        res: float = 0.0,
        noise_type: WeightNoiseInjectionType = WeightNoiseInjectionType.NONE,
        quantization_type: WeightQuantizationType = WeightQuantizationType.NONE,
        refresh: WeightNoiseRefresh = WeightNoiseRefresh.FORWARD,
        *,
        type: WeightModifierType = WeightModifierType.NONE,
        enable_during_test: bool = False,
    ) -> None:
        self.std_dev, self.res, self.refresh = std_dev, res, refresh
        self.noise_type, self.quantization_type = noise_type, quantization_type
        if type is not WeightModifierType.NONE:
            self.type = type
        self.enable_during_test = enable_during_test

    @property
    def type(self) -> WeightModifierType:
        """Both kinds in one, as version 1 of AIHWKIT-Lightning has it. Deprecated: setting it sets ``noise_type`` and
        ``quantization_type``, and warns.

        Raises:
            AttributeError: version 1 has no name for these two together.
            ConfigError: set to something else.
        """
        now = self.noise_type, self.quantization_type
        for kind, kinds in MODIFIER_KINDS.items():
            if kinds == now:
                return kind
        raise AttributeError(
            "modifier.type: version 1 has no such kind; read modifier.noise_type and quantization_type"
        )

    @type.setter
    def type(self, kind: WeightModifierType) -> None:
        if not isinstance(kind, WeightModifierType):
            allowed = ", ".join(map(str, WeightModifierType))
            raise ConfigError(f"modifier.type: got {kind!r}; it is deprecated, and allowed are {allowed}")
        self.noise_type, self.quantization_type = MODIFIER_KINDS[kind]
        warn_user(
            f"modifier.type: got {kind.name}, a kind of version 1; set modifier.noise_type = {self.noise_type} and "
            f"modifier.quantization_type = {self.quantization_type} instead, which was done now",
            DeprecationWarning,
        )

    @property
    def enable_during_test(self) -> bool:
        """False: noise is for training. Deprecated; True warns and stays False."""
        return False

    @enable_during_test.setter
    def enable_during_test(self, value: bool) -> None:
        if value:
            warn_user(
                f"modifier.enable_during_test: got {value!r}, which stays False, as in AIHWKIT-Lightning; for noise in an "
                "evaluation, leave the layers in training mode: layer.train()"
            )


@dataclass(slots=True)
class MappingParameter(Section):
    """How a weight matrix is mapped to analog tiles."""

    max_input_size: int = -1
    """Most input features a tile takes; more are cut into nearly equal slices. ``<= 0`` is no limit."""

    @property
    def max_output_size(self) -> int:
        """-1, no limit: a tile has all outputs of a layer. Another one raises.

        Raises:
            ConfigError: set to a limit.
        """
        return -1

    @max_output_size.setter
    def max_output_size(self, value: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value > 0:
            raise ConfigError(
                f"mapping.max_output_size: got {value!r}; tiles are not cut along their outputs here, as scales per channel "
                "would stay the same and those per slice are of all outputs; take kinds PER_CHANNEL and leave it at -1, and "
                "give the limit to export_to_aihwkit(model, max_output_size=...), which cuts"
            )


@dataclass(slots=True)
class InputRangeParameter(Section):
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
class PrePostProcessingParameter(Section):
    """Digital processing around the tiles."""

    input_range: InputRangeParameter = field(default_factory=InputRangeParameter)
    """The input range."""
