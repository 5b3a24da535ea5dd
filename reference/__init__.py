"""Every operation in plain torch: short, obvious, without tricks. Imports nothing of the kernels.

This is the specification the Triton kernels are tested against, and what runs on a CPU.
"""

from .absmax import absmax
from .adc import adc, adc_grad, mask_shape, pack_bits, unpack_bits
from .clip import clip
from .dac import dac, dac_steps
from .input_range import (
    extrema,
    input_range_grad,
    input_range_learn,
    input_range_update,
    input_range_update_fast,
)
from .linear import keeps_steps, linear_backward, linear_forward
from .matmul import matmul
from .matmul_backward import matmul_backward
from .matmul_dgrad import matmul_dgrad
from .matmul_wgrad import matmul_wgrad
from .noise import noise
from .patches import Patches
from .program import program
from .slicing import num_slices, slice_widths, split_sizes
from .std import merge_moments, moments, std, std_of
from .weight import weight, weight_grad

__all__ = [
    "Patches",
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
    "keeps_steps",
    "linear_backward",
    "linear_forward",
    "mask_shape",
    "matmul",
    "matmul_backward",
    "matmul_dgrad",
    "matmul_wgrad",
    "merge_moments",
    "moments",
    "noise",
    "num_slices",
    "pack_bits",
    "program",
    "slice_widths",
    "split_sizes",
    "std",
    "std_of",
    "unpack_bits",
    "weight",
    "weight_grad",
]
