"""Evaluation on simulated chips: noise models of devices, programming, drift and its compensation."""

from triton_analog.inference.chip import Chip, program
from triton_analog.inference.evaluate import Evaluation, evaluate
from triton_analog.inference.noise_models import (
    AdditivePerChannelNoiseModel,
    AnalogFoundationNoiseModel,
    CustomDriftPCMLikeNoiseModel,
    HermesNoiseModel,
    NoiseModel,
    PCMLikeNoiseModel,
    PolynomialNoiseModel,
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
    "NoiseModel",
    "PCMLikeNoiseModel",
    "PolynomialNoiseModel",
    "ReRamCMONoiseModel",
    "ReRamWan2022NoiseModel",
    "StateIndependentNoiseModel",
    "evaluate",
    "program",
]
