"""Analog layers: drop-in replacements of torch's, and containers for them."""

from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.containers import AnalogSequential, AnalogWrapper
from triton_analog.nn.conv import AnalogConv1d, AnalogConv2d, AnalogConv3d
from triton_analog.nn.expert_matrix import AnalogExpertMatrix
from triton_analog.nn.experts import AnalogBatchedExperts, AnalogExperts, AnalogParallelExperts
from triton_analog.nn.hf_conv1d import AnalogHFConv1D
from triton_analog.nn.linear import AnalogLinear
from triton_analog.nn.rnn import AnalogRNN
from triton_analog.nn.rnn_cells import (
    AnalogGRUCell,
    AnalogLSTMCell,
    AnalogLSTMCellCombinedWeight,
    AnalogVanillaRNNCell,
    LSTMState,
)

__all__ = [
    "AnalogBatchedExperts",
    "AnalogConv1d",
    "AnalogConv2d",
    "AnalogConv3d",
    "AnalogExpertMatrix",
    "AnalogExperts",
    "AnalogGRUCell",
    "AnalogHFConv1D",
    "AnalogLSTMCell",
    "AnalogLSTMCellCombinedWeight",
    "AnalogLayerBase",
    "AnalogLinear",
    "AnalogParallelExperts",
    "AnalogRNN",
    "AnalogSequential",
    "AnalogVanillaRNNCell",
    "AnalogWrapper",
    "LSTMState",
]
