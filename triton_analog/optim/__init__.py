"""Optimizers that clip analog weights, and draw new weight noise, after each step."""

from triton_analog.optim.attach import Attachment, attach
from triton_analog.optim.by_hand import before_step
from triton_analog.optim.decay import no_weight_decay, parameter_groups
from triton_analog.optim.optimizer import AnalogOptimizer

__all__ = ["AnalogOptimizer", "Attachment", "attach", "before_step", "no_weight_decay", "parameter_groups"]
