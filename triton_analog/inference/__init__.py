"""Evaluation on simulated chips: noise models of devices, programming, drift and its compensation; and calibration before it."""

from triton_analog.calibrate import InputRangeCalibrationType, calibrate_input_ranges
from triton_analog.inference.chip import Chip, program
from triton_analog.inference.evaluation import Evaluation, evaluate
from triton_analog.inference.noise_model import NoiseModel, PolynomialNoiseModel
from triton_analog.inference.noise_models import (
    AdditivePerChannelNoiseModel,
    AnalogFoundationNoiseModel,
    CustomDriftPCMLikeNoiseModel,
    HermesNoiseModel,
    PCMLikeNoiseModel,
    ReRamCMONoiseModel,
    ReRamWan2022NoiseModel,
    StateIndependentNoiseModel,
)

__all__ = [
    "AdditivePerChannelNoiseModel",
    "AnalogFoundationNoiseModel",
    "Chip",
    "CustomDriftPCMLikeNoiseModel",
    "Evaluation",
    "HermesNoiseModel",
    "InputRangeCalibrationType",
    "NoiseModel",
    "PCMLikeNoiseModel",
    "PolynomialNoiseModel",
    "ReRamCMONoiseModel",
    "ReRamWan2022NoiseModel",
    "StateIndependentNoiseModel",
    "calibrate_input_ranges",
    "evaluate",
    "program",
]
