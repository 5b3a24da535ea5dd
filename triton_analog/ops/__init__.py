"""The operations: Triton kernels usable on their own, each a ``torch.library`` operator with a reference beside it."""

from triton_analog.ops.absmax import absmax
from triton_analog.ops.adc import adc, adc_grad
from triton_analog.ops.clip import clip
from triton_analog.ops.dac import dac, dac_steps
from triton_analog.ops.input_range import (
    extrema,
    input_range_grad,
    input_range_learn,
    input_range_update,
    input_range_update_fast,
)
from triton_analog.ops.matmul import matmul
from triton_analog.ops.matmul_backward import matmul_backward
from triton_analog.ops.matmul_dgrad import matmul_dgrad
from triton_analog.ops.matmul_wgrad import matmul_wgrad
from triton_analog.ops.noise import noise
from triton_analog.ops.program import program
from triton_analog.ops.std import moments, std
from triton_analog.ops.weight import weight, weight_grad

__all__ = [
    "absmax",
    "adc",
    "adc_grad",
    "clip",
    "dac",
    "dac_steps",
    "extrema",
    "input_range_grad",
    "input_range_learn",
    "input_range_update",
    "input_range_update_fast",
    "matmul",
    "matmul_backward",
    "matmul_dgrad",
    "matmul_wgrad",
    "moments",
    "noise",
    "program",
    "std",
    "weight",
    "weight_grad",
]
