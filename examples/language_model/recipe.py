"""The recipe of Analog Foundation Models (arXiv 2505.09663): hardware, loss, optimizer and schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.optim import AdamW, Optimizer

from triton_analog.config import TorchInferenceRPUConfig, WeightClipType, WeightNoiseInjectionType
from triton_analog.optim import AnalogOptimizer, parameter_groups

START_UP = 500
"""Batches that input ranges learn from before the gradient moves them."""
WARM_UP = 0.016
"""Share of the steps in which the learning rate rises."""
LARGEST_GRADIENT = 1.0
"""Norm that gradients are cut to."""


def hardware(start_up: int) -> TorchInferenceRPUConfig:
    """8-bit converters, learned input ranges, weight noise and clip; tiles as long as the layers.

    Ranges learn from ``start_up`` batches before the gradient moves them; 0: they were calibrated, or will be.
    """
    config = TorchInferenceRPUConfig()
    config.forward.inp_res = config.forward.out_res = 2**8 - 2
    config.forward.out_bound = 14.0
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, 0.03
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, 2.5
    ranges = config.pre_post.input_range
    ranges.enable, ranges.init_from_data, ranges.decay = True, start_up, 0.01
    if start_up > 0:
        ranges.init_std_alpha = 18.0
    return config


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the student's next tokens from the teacher's, of logits ``[..., V]`` at temperature 1; mean in nats."""
    logs = (logits.float().flatten(0, -2).log_softmax(-1) for logits in (student, teacher))
    return kl_div(*logs, reduction="batchmean", log_target=True)


def optimizer_for(model: nn.Module, capturable: bool) -> Optimizer:
    """``capturable``: its steps are captured in a CUDA graph, which reads the learning rate on the device."""
    device = next(parameter.device for parameter in model.parameters() if parameter.requires_grad)
    settings: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-6, "fused": device.type == "cuda"}
    if capturable:
        settings |= {"capturable": True, "lr": torch.zeros((), device=device)}
    groups = parameter_groups(model, weight_decay=0.01)
    unwrapped: Any = getattr(model, "module", model)  # DistributedDataParallel has no methods of the model
    if hasattr(unwrapped, "analog_layers"):
        return AnalogOptimizer(AdamW, unwrapped.analog_layers, groups, **settings)
    return AdamW(groups, **settings)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(step: int, steps: int, largest: float) -> float:
    """Of step ``step`` of ``steps``, counted from 0: up in a straight line, and down in another (a polynomial of degree 1)."""
    rising = max(1, round(WARM_UP * steps))
    return largest * min((step + 1) / rising, (steps - step) / max(1, steps - rising))
