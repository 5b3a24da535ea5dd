"""Below the operations: which backend runs, what the hardware is, which configuration is launched, and the start of kernels."""

from triton_analog.launch.backends import backend, runs_kernel
from triton_analog.launch.devices import (
    Hardware,
    hardware,
    has_wide_tiles,
    input_precision,
    multiprocessors,
    named_hardware,
)
from triton_analog.launch.record import is_recording, recording
from triton_analog.launch.sizes import aligned, block, cdiv, describable, slices_describable
from triton_analog.launch.start import launch

__all__ = [
    "Hardware",
    "aligned",
    "backend",
    "block",
    "cdiv",
    "describable",
    "hardware",
    "has_wide_tiles",
    "input_precision",
    "is_recording",
    "launch",
    "multiprocessors",
    "named_hardware",
    "recording",
    "runs_kernel",
    "slices_describable",
]
