"""The models on tiles: the one that is trained, and those that are not."""

from __future__ import annotations

from typing import Any

import recipe
from peft import LoraConfig, get_peft_model
from torch import Tensor

from triton_analog import InputRangeCalibrationType, TorchInferenceRPUConfig, calibrate_input_ranges, convert_to_analog
from triton_analog.config import WeightQuantizationType

DIGITAL = ["lm_head"]
"""Stays digital, as does the table of embeddings, whose weight it may share."""


def trainable(teacher: Any, start_up: int) -> Any:
    """A copy of ``teacher`` on tiles, to be trained."""
    return convert_to_analog(teacher, recipe.hardware(start_up), exclude_modules=DIGITAL).train()


def calibrated(teacher: Any, batches: list[Tensor]) -> Any:
    """A copy of ``teacher`` on the same tiles, with input ranges that are calibrated on ``batches [B, length]`` of tokens."""
    model = convert_to_analog(teacher, recipe.hardware(start_up=0), exclude_modules=DIGITAL)
    inputs = [{"input_ids": batch} for batch in batches]
    calibrate_input_ranges(model, InputRangeCalibrationType.CACHE_QUANTILE, inputs, quantile=0.9999, verbose=False)
    return model


def with_adapters(base: Any, rank: int) -> Any:
    """Digital low-rank adapters beside the layers on tiles, which are frozen; ``base`` itself gets them."""
    layers = [name for name, _ in base.named_analog_layers()]
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)).train()


def only_weights(teacher: Any) -> Any:
    """A copy of ``teacher`` with weights in devices and nothing else of the hardware."""
    return convert_to_analog(teacher, TorchInferenceRPUConfig(), exclude_modules=DIGITAL)


def eight_bits(teacher: Any) -> Any:
    """A copy of ``teacher`` with 8-bit weights, by output, and 8-bit activations, by token, as digital hardware has them."""
    config = TorchInferenceRPUConfig()
    config.forward.inp_res = config.modifier.res = 2**8 - 2
    config.modifier.quantization_type = WeightQuantizationType.DISCRETIZE_PER_CHANNEL
    config.pre_post.input_range.enable = config.pre_post.input_range.dynamic = True
    return convert_to_analog(teacher, config, exclude_modules=DIGITAL)
