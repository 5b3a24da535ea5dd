"""Hardware-aware training for analog in-memory computing, as Triton kernels with a thin ``nn`` package on top."""

from triton_analog import functional as functional
from triton_analog import lightning
from triton_analog import nn as nn
from triton_analog import ops as ops
from triton_analog.aihwkit_bridge import export_to_aihwkit, import_from_aihwkit
from triton_analog.analysis import analyze
from triton_analog.calibrate import InputRangeCalibrationType, calibrate_input_ranges
from triton_analog.config import TorchInferenceRPUConfig
from triton_analog.convert import convert_to_analog, convert_to_digital
from triton_analog.launch import lookup
from triton_analog.optim import AnalogOptimizer
from triton_analog.restore import restore_analog
from triton_analog.summary import analog_summary
from triton_analog.tuning.first_use import FIRST_USE
from triton_analog.version import __version__ as __version__

__all__ = [  # without nn, functional and ops: a star import would put them in the place of torch's
    "AnalogOptimizer",
    "InputRangeCalibrationType",
    "TorchInferenceRPUConfig",
    "analog_summary",
    "analyze",
    "calibrate_input_ranges",
    "convert_to_analog",
    "convert_to_digital",
    "export_to_aihwkit",
    "import_from_aihwkit",
    "restore_analog",
]

lightning.install()
lookup.tune_by(FIRST_USE)
