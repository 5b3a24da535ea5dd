"""The kinds of noise, quantization and clip, with AIHWKIT's names, and two that are ours."""

from __future__ import annotations

from enum import Enum, EnumMeta
from typing import TYPE_CHECKING, Any

from triton_analog.hints import did_you_mean


class _SpelledEnumMeta(EnumMeta):
    """Names the member that a misspelt one was meant to be."""

    def __getitem__(cls, name: str) -> Any:
        if name not in cls.__members__:
            raise KeyError(_unknown(cls, name))
        return super().__getitem__(name)

    if not TYPE_CHECKING:  # a checker would take every name for a member

        def __getattr__(cls, name: str) -> Any:
            if name.startswith("_"):  # asked for while the class is made, before it has members
                raise AttributeError(name)
            if name in cls.__members__:  # found here by Pythons before 3.12
                return cls.__members__[name]
            raise AttributeError(_unknown(cls, name), name=name, obj=cls)


def _unknown(kind: Any, name: Any) -> str:
    allowed = f"allowed are {', '.join(kind.__members__)}"
    return f"{kind.__name__}: got {name!r}; {did_you_mean(str(name), kind.__members__, allowed)}"


class SpelledEnum(Enum, metaclass=_SpelledEnumMeta):
    """An enum whose errors say which member may have been meant."""

    @classmethod
    def _missing_(cls, value: object) -> Any:
        names = {str(member.value): member.name for member in cls} | {name: name for name in cls.__members__}
        known = did_you_mean(str(value), names, f"allowed are {', '.join(map(str, cls))}")
        raise ValueError(f"{cls.__name__}: got {value!r}; {known}")


class WeightNoiseInjectionType(SpelledEnum):
    """Noise added to the weights in each training forward."""

    NONE = "None"
    """No noise."""
    ADD_NORMAL = "AddNormal"
    """Gaussian, scaled by the largest weight of the slice."""
    ADD_NORMAL_PER_CHANNEL = "AddNormalPerChannel"
    """Gaussian, scaled by the largest weight of each output channel in the slice."""


class WeightNoiseType(SpelledEnum):
    """Read noise of the weights in evaluation, of deviation ``forward.w_noise``."""

    NONE = "None"
    """No noise."""
    ADDITIVE_CONSTANT = "AdditiveConstant"
    """The same deviation for every weight."""
    PCM_READ = "PCMRead"
    """That of phase-change memory: grows with the root of the weight's magnitude."""


class WeightNoiseRefresh(SpelledEnum):
    """How long weight noise lasts."""

    FORWARD = "Forward"
    """New noise in each training forward."""
    STEP = "Step"
    """New noise after each optimizer step: all micro-batches of a gradient accumulation see the same noisy weight."""


class WeightQuantizationType(SpelledEnum):
    """Rounding of the weights to a grid, in training and evaluation."""

    NONE = "None"
    """No rounding."""
    DISCRETIZE = "Discretize"
    """One scale per slice."""
    DISCRETIZE_PER_CHANNEL = "DiscretizePerChannel"
    """One scale per slice and output channel."""


class WeightClipType(SpelledEnum):
    """Limit on the magnitude of the weights."""

    NONE = "None"
    """No limit."""
    LAYER_GAUSSIAN = "LayerGaussian"
    """After each optimizer step, ``sigma`` standard deviations of the whole weight matrix."""
    LAYER_GAUSSIAN_PER_CHANNEL = "LayerGaussianPerChannel"
    """After each optimizer step, ``sigma`` standard deviations of each output channel."""
    LEARNABLE_PER_CHANNEL = "LearnablePerChannel"
    """In the forward, a learned limit per slice and output channel."""


class SavedInput(SpelledEnum):
    """What a training forward keeps of its input for the backward."""

    FULL = "Full"
    """The input itself: not a copy, so that layers with the same input, and what made it, keep it only once."""
    INT8 = "Int8"
    """The DAC's integers and two flags per element, five eighths of the bytes of bf16, for one more read of the input; the
    gradients are the same. Needs ``inp_res`` of 2 to 254 steps."""


class WeightModifierType(SpelledEnum):
    """Noise and quantization in one kind, as version 1 of AIHWKIT-Lightning has them. Deprecated."""

    NONE = "None"
    DISCRETIZE = "Discretize"
    DISCRETIZE_PER_CHANNEL = "DiscretizePerChannel"
    ADD_NORMAL = "AddNormal"
    ADD_NORMAL_PER_CHANNEL = "AddNormalPerChannel"
    DISCRETIZE_ADD_NORMAL = "DiscretizeAddNormal"
    DISCRETIZE_ADD_NORMAL_PER_CHANNEL = "DiscretizeAddNormalPerChannel"


_N, _Q, _M = WeightNoiseInjectionType, WeightQuantizationType, WeightModifierType
MODIFIER_KINDS = {
    _M.NONE: (_N.NONE, _Q.NONE),
    _M.DISCRETIZE: (_N.NONE, _Q.DISCRETIZE),
    _M.DISCRETIZE_PER_CHANNEL: (_N.NONE, _Q.DISCRETIZE_PER_CHANNEL),
    _M.ADD_NORMAL: (_N.ADD_NORMAL, _Q.NONE),
    _M.ADD_NORMAL_PER_CHANNEL: (_N.ADD_NORMAL_PER_CHANNEL, _Q.NONE),
    _M.DISCRETIZE_ADD_NORMAL: (_N.ADD_NORMAL, _Q.DISCRETIZE),
    _M.DISCRETIZE_ADD_NORMAL_PER_CHANNEL: (_N.ADD_NORMAL_PER_CHANNEL, _Q.DISCRETIZE_PER_CHANNEL),
}
"""Of each kind of version 1, what it is now."""
