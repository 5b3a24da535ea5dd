"""What a noise model of devices is, and one for a device of your own.

A model is a few laws of the relative conductance ``r = g / g_max``; conductances are in microsiemens, times in seconds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf, isfinite, log, log2, sqrt
from numbers import Real
from statistics import NormalDist
from struct import pack, unpack
from typing import Any, ClassVar

import torch
from torch import Tensor

from triton_analog.inference.curves import knots, polynomial

DAY = 86400.0
MOST_SECONDS = 1e30


@dataclass(frozen=True, kw_only=True)
class NoiseModel(ABC):
    """What all noise models have. For a device of your own see :class:`PolynomialNoiseModel`.

    Raises:
        TypeError: a law gives no tensor of the shape of its ``r``.
        ValueError: a field out of its range, or a law that is not finite or a negative deviation, by name and value.
    """

    CELL: ClassVar[str] = "pair"
    """How a weight becomes conductances, as ``cell`` of :func:`triton_analog.ops.program`."""

    g_max: float = 25.0
    """Largest conductance: that of the largest weight of a tile or column."""
    g_min: float = 0.0
    """Smallest conductance."""
    f_lst: tuple[float, ...] = (1.0,)
    """Significances of the pairs of devices of a cell, in the order in which they are used."""
    prog_noise_scale: float = 1.0
    """Times the deviation of programming."""
    read_noise_scale: float = 1.0
    """Times the read noise."""
    drift_scale: float = 1.0
    """Times the exponent of the drift."""
    t_0: float = 20.0
    """Time of the first reading after programming, from which the drift counts."""
    t_read: float = 250.0e-9
    """Duration of a reading."""
    stuck_at_min: float = 0.0
    """Share of the devices that stay at ``g_min``, whatever is programmed."""
    stuck_at_max: float = 0.0
    """Share of the devices that stay at ``g_max``."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.type in ("float", float):
                value = getattr(self, f.name)
                ok = isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) < inf
                self._require(ok, f.name, "a finite number >= 0 is needed")
            elif "tuple" in str(f.type):
                value = getattr(self, f.name)
                ok = isinstance(value, Sequence) and all(isinstance(x, Real) and not isinstance(x, bool) for x in value)
                self._require(ok, f.name, "several numbers are needed, such as (0.2,)")
                object.__setattr__(self, f.name, tuple(map(float, value)))
        self._require(self.g_min < self.g_max, "g_min", f"it must be below g_max, {self.g_max}")
        self._require(self.t_0 > 0 and self.t_read > 0, "t_0" if self.t_0 <= 0 else "t_read", "it must be > 0 seconds")
        self._require(
            len(self.f_lst) >= 1 and all(isfinite(f) and f > 0 for f in self.f_lst), "f_lst", "numbers > 0 are needed"
        )
        self._require(
            self.CELL == "pair" or len(self.f_lst) == 1, "f_lst", f"{type(self).__name__} has one device a cell"
        )
        self._require(self.stuck_at_min + self.stuck_at_max <= 1, "stuck_at_min", "with stuck_at_max it is more than 1")
        for time in self.times or (None, 0.0):
            self._check_curves(time)

    def _require(self, condition: bool, name: str, rule: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}.{name}: got {getattr(self, name)!r}; {rule}")

    def _check_curves(self, time: float | None) -> None:
        r = knots()
        for law in ("drift_mean", "drift_std", "read_factor", "programming_std"):
            given = getattr(self, law)(r, *([time] if law == "programming_std" else []))
            if not isinstance(given, Tensor) or given.shape != r.shape:
                kind = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
                raise TypeError(
                    f"{type(self).__name__}.{law}: gave {kind}; a tensor of the shape of r is needed, here {tuple(r.shape)}"
                )
        curves = self._curves(time)
        if not curves[:, 1].isfinite().all():
            raise ValueError(f"{type(self).__name__}.drift_mean: is not finite from 0 to g_max, {self.g_max:g} uS")
        for column, law in ((0, "programming_std"), (2, "drift_std"), (3, "read_factor")):
            values = curves[:, column]
            worst = int(torch.where(values.isfinite(), values, -inf).argmin())
            g = self.g_max * min(float(r[worst]), 1.0)
            if not 0 <= values[worst] < inf:
                raise ValueError(
                    f"{type(self).__name__}.{law}: is {values[worst]:g} at {g:g} uS; a deviation must be "
                    f"finite and >= 0 from 0 to g_max, {self.g_max:g} uS"
                )

    # ---- Laws ---------------------------------------------------------------------------------------------------------

    times: ClassVar[tuple[float, ...]] = ()
    """The only times that the model knows; none: all."""

    @abstractmethod
    def programming_std(self, r: Tensor, time: float | None) -> Tensor:
        """Deviation of programming in microsiemens at relative conductances ``r``; ``time`` None is right after it."""

    def drift_mean(self, r: Tensor) -> Tensor:
        """Mean of the drift's exponent ``nu``."""
        return torch.zeros_like(r)

    def drift_std(self, r: Tensor) -> Tensor:
        """Its deviation from device to device."""
        return torch.zeros_like(r)

    def read_factor(self, r: Tensor) -> Tensor:
        """Deviation of the read noise as a share of the conductance, per ``sqrt(ln((t + t_0 + t_read) / (2 t_read)))``."""
        return torch.zeros_like(r)

    @property
    def has_read_noise(self) -> bool:
        """Whether there is any at any conductance."""
        return bool(self._curves(self.times[0] if self.times else 0.0)[:, 3].any())

    # ---- What the operation takes -------------------------------------------------------------------------------------

    def _curves(self, time: float | None) -> Tensor:
        """fp64; of what is wanted, which is ``g_max`` at most, and the read noise of what was programmed."""
        r = knots()
        wanted = r.clamp(max=1.0)
        read = self.read_factor(r)
        return torch.stack(
            [
                self.prog_noise_scale * self.programming_std(wanted, time),
                self.drift_scale * self.drift_mean(wanted),
                self.drift_scale * self.drift_std(wanted),
                self.read_noise_scale * torch.where(r > 1.0, read.clamp(min=0.0), read),
            ],
            1,
        )

    def check_time(self, time: float) -> None:
        """``time`` is one that the model knows.

        Raises:
            ValueError: it is before the end of programming, 1e30 s or more, or not one of :attr:`times`.
        """
        is_number = isinstance(time, Real) and not isinstance(time, bool)
        ok = is_number and 0 <= time < MOST_SECONDS
        if not ok:
            raise ValueError(
                f"time: got {time!r}; seconds since the end of programming are needed, >= 0 and < {MOST_SECONDS:g}"
            )
        if self.times and time not in self.times:
            raise ValueError(
                f"time: got {time!r}; {type(self).__name__} was measured at {', '.join(f'{t:g}' for t in self.times)} s alone"
            )

    def at(self, time: float | None) -> dict[str, Any]:
        """Keyword arguments of :func:`triton_analog.ops.program` for what devices hold ``time`` seconds after programming,
        or right after it and unread (None). ``curves`` is on the CPU."""
        arguments = {
            "curves": self._curves(time).float(),
            "cell": self.CELL,
            "significances": self.f_lst,
            "g_min": self.g_min,
            "g_max": self.g_max,
            "stuck_low": _quantile(self.stuck_at_min),
            "stuck_high": -_quantile(self.stuck_at_max),
        }
        return arguments if time is None else arguments | self._aged(time)

    def _aged(self, time: float) -> dict[str, Any]:
        t = time + self.t_0
        return {
            "log2_time": log2(t / self.t_0),
            "read": sqrt(max(log((t + self.t_read) / (2 * self.t_read)), 0.0)),
            "moment": moment_of(time),
        }


def _quantile(share: float) -> float:
    """The number that a share of all normals is below."""
    return NormalDist().inv_cdf(share) if 0 < share < 1 else inf if share == 1 else -inf


def moment_of(time: float) -> int:
    """A number of 31 bits for each time: that of its nearest fp32 value."""
    return int(unpack("<I", pack("<f", min(time, 3e38)))[0]) & 0x7FFFFFFF


@dataclass(frozen=True, kw_only=True)
class PolynomialNoiseModel(NoiseModel):
    """A device of your own: polynomials ``c_0 + c_1 r + c_2 r**2 + ...`` of the relative conductance."""

    prog_coeff: tuple[float, ...]
    """Deviation of programming, in microsiemens."""
    drift_mean_coeff: tuple[float, ...] = ()
    """Mean of the drift's exponent; none: no drift."""
    drift_std_coeff: tuple[float, ...] = ()
    """Its deviation."""
    read_coeff: tuple[float, ...] = ()
    """Read noise as a share of the conductance, see :meth:`NoiseModel.read_factor`."""

    def programming_std(self, r: Tensor, time: float | None) -> Tensor:
        return polynomial(self.prog_coeff, r)

    def drift_mean(self, r: Tensor) -> Tensor:
        return polynomial(self.drift_mean_coeff, r)

    def drift_std(self, r: Tensor) -> Tensor:
        return polynomial(self.drift_std_coeff, r)

    def read_factor(self, r: Tensor) -> Tensor:
        return polynomial(self.read_coeff, r)
