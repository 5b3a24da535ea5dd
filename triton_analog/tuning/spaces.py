"""What there is to tune: the spaces of all operations."""

from __future__ import annotations

from typing import Any

from triton_analog.launch.space import Space

# From the files, as the package's names are the operations themselves.
from triton_analog.ops.absmax import SPACE as ABSMAX
from triton_analog.ops.adc import GRAD_SPACE as ADC_GRAD
from triton_analog.ops.adc import SPACE as ADC
from triton_analog.ops.dac import SPACE as DAC
from triton_analog.ops.dac import STEPS_SPACE as DAC_STEPS
from triton_analog.ops.input_range import EXTREMA_SPACE as EXTREMA
from triton_analog.ops.input_range import SPACE as INPUT_RANGE_GRAD
from triton_analog.ops.matmul import SPACE as MATMUL
from triton_analog.ops.matmul_dgrad import SPACE as MATMUL_DGRAD
from triton_analog.ops.matmul_wgrad import SPACE as MATMUL_WGRAD
from triton_analog.ops.noise import SPACE as NOISE
from triton_analog.ops.std import SPACE as STD
from triton_analog.ops.weight import GRAD_SPACE as WEIGHT_GRAD
from triton_analog.ops.weight import SPACE as WEIGHT


def spaces() -> dict[str, Space[Any]]:
    """Every operation's space by name."""
    found: list[Space[Any]] = [
        ABSMAX, ADC, ADC_GRAD, DAC, DAC_STEPS, EXTREMA, INPUT_RANGE_GRAD, MATMUL, MATMUL_DGRAD, MATMUL_WGRAD, NOISE, STD,
        WEIGHT, WEIGHT_GRAD,
    ]  # fmt: skip
    return {space.op: space for space in found}
