"""Noise models of devices that were published, with AIHWKIT's names and constants."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from triton_analog.inference.curves import interpolated, logarithmic, polynomial
from triton_analog.inference.noise_model import DAY, NoiseModel, moment_of


@dataclass(frozen=True, kw_only=True)
class PCMLikeNoiseModel(NoiseModel):
    """Phase-change memory as measured by Nandakumar et al. (ICECS 2019), with AIHWKIT's constants."""

    prog_coeff: tuple[float, ...] = (0.26348, 1.9650, -1.1731)
    """Deviation of programming in microsiemens, as a polynomial of ``r``."""
    prog_coeff_g_max_reference: float = 25.0
    """The ``g_max`` that ``prog_coeff`` was fitted at; the deviation is scaled by ``g_max`` over it."""

    def programming_std(self, r: Tensor, time: float | None) -> Tensor:
        return polynomial(self.prog_coeff, r) * (self.g_max / self.prog_coeff_g_max_reference)

    def drift_mean(self, r: Tensor) -> Tensor:
        return logarithmic(-0.0155, 0.0244, 0.049, 0.1, r)

    def drift_std(self, r: Tensor) -> Tensor:
        return logarithmic(-0.0125, -0.0059, 0.008, 0.045, r)

    def read_factor(self, r: Tensor) -> Tensor:
        return (0.0088 / (r**0.65).clamp(min=1e-3)).clamp(max=0.2)


@dataclass(frozen=True, kw_only=True)
class CustomDriftPCMLikeNoiseModel(PCMLikeNoiseModel):
    """:class:`PCMLikeNoiseModel` with exponents of the drift from a table (N. Li et al., Adv. Electron. Mater. 2023)."""

    g_lst: tuple[float, ...]
    """Conductances in microsiemens, ascending, that span ``g_min .. g_max``."""
    nu_mean_lst: tuple[float, ...]
    """Mean of the exponent at each; between them straight lines."""
    nu_std_lst: tuple[float, ...]
    """Its deviation at each."""

    def __post_init__(self) -> None:
        self._require(
            len(self.g_lst) >= 2 and list(self.g_lst) == sorted(set(self.g_lst)),
            "g_lst",
            "two conductances at least are needed, ascending",
        )
        for name in ("nu_mean_lst", "nu_std_lst"):
            self._require(
                len(getattr(self, name)) == len(self.g_lst),
                name,
                f"as many numbers as g_lst has are needed, {len(self.g_lst)}",
            )
        self._require(
            self.g_lst[0] <= self.g_min and self.g_lst[-1] >= self.g_max,
            "g_lst",
            f"it must span g_min to g_max, {self.g_min:g} to {self.g_max:g}",
        )
        super().__post_init__()

    def drift_mean(self, r: Tensor) -> Tensor:
        return interpolated(self.g_lst, self.nu_mean_lst, r * self.g_max)

    def drift_std(self, r: Tensor) -> Tensor:
        return interpolated(self.g_lst, self.nu_std_lst, r * self.g_max)


_HERMES = {
    1: ((0.15781817, 2.32443916, -2.16310839, 0.68841818), 10.35, 200.0),
    2: ((0.16603222, 4.71806468, -8.48101252, 4.68961419), 20.7, 300.0),
}
"""By devices per weight and sign: polynomial of programming, ``g_max`` it was measured at, time of the first reading."""


@dataclass(frozen=True, kw_only=True)
class HermesNoiseModel(NoiseModel):
    """IBM's Hermes project chip (Le Gallo et al. 2023), with AIHWKIT's constants.

    Fields that are None take those of ``num_devices``.
    """

    num_devices: int = 2
    """Devices of a weight's sign that are read together, 1 or 2."""
    g_max: float = None  # type: ignore[assignment]
    t_0: float = None  # type: ignore[assignment]
    t_read: float = 512.0e-9

    def __post_init__(self) -> None:
        self._require(self.num_devices in _HERMES, "num_devices", "allowed are 1 and 2")
        _, measured, first = _HERMES[self.num_devices]
        object.__setattr__(self, "g_max", measured if self.g_max is None else self.g_max)
        object.__setattr__(self, "t_0", first if self.t_0 is None else self.t_0)
        self._require(self.g_max <= measured, "g_max", f"the chip was measured up to {measured} uS")
        super().__post_init__()

    def programming_std(self, r: Tensor, time: float | None) -> Tensor:
        coefficients, measured, _ = _HERMES[self.num_devices]
        return polynomial(coefficients, r) * (self.g_max / measured)

    def drift_mean(self, r: Tensor) -> Tensor:
        low = logarithmic(-0.0387, -0.0182, 0.0720, 0.13, r)
        return torch.where(r < 0.0945, low, polynomial((0.0736, -0.0126, -0.0436), r))

    def drift_std(self, r: Tensor) -> Tensor:
        if self.num_devices == 1:
            low = logarithmic(-0.0120, -0.0023, 0.0124, 0.04, r)
            return torch.where(r < 0.3039, low, polynomial((0.0104, 0.0116, -0.0165), r))
        low = logarithmic(-0.0117, -0.0057, 0.0091, 0.04, r)
        return torch.where(r < 0.3055, low, polynomial((0.0073, 0.0093, -0.0118), r))

    def read_factor(self, r: Tensor) -> Tensor:
        if self.num_devices == 1:
            low = logarithmic(-0.0078, 0.0038, 0.0179, 0.04, r)
            return torch.where(r < 0.1591, low, polynomial((0.0088, 0.0768, -0.1352, 0.0664), r))
        low = logarithmic(-0.0117, -0.0069, 0.015, 0.04, r)
        return torch.where(r < 0.16, low, polynomial((0.0123, 0.0211, -0.0280, 0.0069), r))


@dataclass(frozen=True, kw_only=True)
class StateIndependentNoiseModel(NoiseModel):
    """The same noise whatever a device holds: programming, a power law of drift, read noise as a share of conductance."""

    prog_coeff: tuple[float, ...] = (0.2,)
    """Deviation of programming in microsiemens; more numbers make it a polynomial of ``r``."""
    drift_nu_mean: float = 0.1
    """Mean of the drift's exponent."""
    drift_nu_std: float = 0.05
    """Its deviation."""

    def programming_std(self, r: Tensor, time: float | None) -> Tensor:
        return polynomial(self.prog_coeff, r)

    def drift_mean(self, r: Tensor) -> Tensor:
        return torch.full_like(r, self.drift_nu_mean)

    def drift_std(self, r: Tensor) -> Tensor:
        return torch.full_like(r, self.drift_nu_std)

    def read_factor(self, r: Tensor) -> Tensor:
        return torch.full_like(r, 1 / self.g_max)


_WAN = {
    1.0: (0.348, 16.030, -43.853, 45.393, -16.815),
    DAY: (0.701, 22.086, -50.773, 47.095, -16.458),
    2 * DAY: (0.782, 20.274, -43.507, 37.062, -11.934),
}


@dataclass(frozen=True, kw_only=True)
class ReRamWan2022NoiseModel(NoiseModel):
    """ReRAM as published by Wan et al. (Nature 2022): deviations after one second, one day and two days.

    The polynomials give microsiemens whatever ``g_max`` is, as AIHWKIT's model does by default.
    """

    times: ClassVar[tuple[float, ...]] = tuple(_WAN)

    def programming_std(self, r: Tensor, time: float | None) -> Tensor:
        return polynomial(_WAN[1.0 if time is None else time], r)

    def _aged(self, time: float) -> dict[str, Any]:
        return {}


_CMO = {0.2: (0.00081107, 0.00106879), 2.0: (0.0112185391, 0.01129027418)}


@dataclass(frozen=True, kw_only=True)
class ReRamCMONoiseModel(NoiseModel):
    """Filamentary CMO/HfOx ReRAM (Falcone et al.), one device a weight, with AIHWKIT's constants.

    After ``t`` seconds conductances have moved by ``-0.089 ln t`` microsiemens on average, and spread by ``0.042 ln t + 0.412``.
    The read noise is ``0.0277 log10(g) sqrt(ln((t + t_read) / (2 t_read)))`` microsiemens of the programmed conductance
    ``g``, which stays within ``g_min .. g_max``.
    """

    CELL: ClassVar[str] = "single"

    g_max: float = 88.199997
    g_min: float = 9.0
    t_read: float = 1e-6
    acceptance_range: float = 0.2
    """Percent of the wanted conductance at which programming stops, 0.2 or 2."""

    def __post_init__(self) -> None:
        self._require(self.acceptance_range in _CMO, "acceptance_range", "allowed are 0.2 and 2")
        super().__post_init__()

    def programming_std(self, r: Tensor, time: float | None) -> Tensor:
        return polynomial(_CMO[self.acceptance_range], r * self.g_max)

    def read_factor(self, r: Tensor) -> Tensor:
        g = (r * self.g_max).clamp(min=max(self.g_min, 1.0))
        return 0.0277316483 * g.log10() / g

    def at(self, time: float | None) -> dict[str, Any]:
        return super().at(time) | ({} if time is None else {"lowest": self.g_min, "highest": self.g_max})

    def _aged(self, time: float) -> dict[str, Any]:
        if time == 0:
            return {}
        return {
            "shift": -0.08900206 * log(time) * self.drift_scale,
            "spread": max(0.04201137 * log(time) + 0.41183342, 0.0) * self.drift_scale,
            "read": sqrt(max(log((time + self.t_read) / (2 * self.t_read)), 0.0)),
            "moment": moment_of(time),
        }


@dataclass(frozen=True, kw_only=True)
class _NoiseOfWeights(NoiseModel):
    """Noise on the weight itself, with its sign, that does not change with time."""

    CELL: ClassVar[str] = "signed"

    def at(self, time: float | None) -> dict[str, Any]:
        return super().at(time) | {"lowest": -inf}

    def _aged(self, time: float) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, kw_only=True)
class AdditivePerChannelNoiseModel(_NoiseOfWeights):
    """Noise on the weight itself, of ``std`` times the largest weight; it does not change with time."""

    std: float = 0.03
    """Deviation in units of the largest weight."""

    def programming_std(self, r: Tensor, time: float | None) -> Tensor:
        return torch.full_like(r, self.std * self.g_max)


@dataclass(frozen=True, kw_only=True)
class AnalogFoundationNoiseModel(_NoiseOfWeights):
    """The chip's noise that Analog Foundation Models were evaluated with (arXiv 2505.09663): on the weight itself, by its
    magnitude ``g`` where the largest weight is 180. It does not change with time."""

    g_max: float = 180.0

    def programming_std(self, r: Tensor, time: float | None) -> Tensor:
        g = 180.0 * r
        low = polynomial((2.5797, 0.22420, -3.716e-3, 2.940e-5), g)
        high = polynomial((2.1103, 0.24535, -3.0550e-3, 1.2330e-5), g)
        return torch.where(g < 0.6, 0.0, torch.where(g <= 52.5, low, high)) * (self.g_max / 180.0)
