"""The kinds of noise, quantization and clip, with AIHWKIT's names, and two that are ours."""

from __future__ import annotations

from enum import Enum


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
