"""What a calibration keeps of the inputs of one layer, batch by batch, to find its input ranges.

All of it lies on the device of the inputs; its size does not grow with the number of batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import floor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import triton_analog.ops as ops
from triton_analog.reference.grid import wide
from triton_analog.reference.slicing import iter_slices

Estimate = Callable[[Tensor], Tensor]
"""From rows ``[M, K]`` to the ranges ``[S]`` that fit them."""


class RangeStatistic(ABC):
    """Takes rows ``[M, K]``, any number of times, and gives the ranges ``[S]`` that fit all of them."""

    @abstractmethod
    def add(self, rows: Tensor) -> None:
        """Take ``rows [M, K]``, of which there is at least one."""

    @abstractmethod
    def merge(self, group: Any, device: torch.device) -> None:
        """Take what the other ranks of ``group`` took, too, in fp64. All of them must come here."""

    @abstractmethod
    def ranges(self) -> Tensor | None:
        """``[S]`` in fp32 (fp64 for fp64); None before the first rows."""


class LargestOfBatches(RangeStatistic):
    """The largest range that any batch asks for."""

    def __init__(self, estimate: Estimate) -> None:
        self.estimate = estimate
        self.largest: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        found = self.estimate(rows)
        self.largest = found if self.largest is None else torch.maximum(self.largest, found)

    def merge(self, group: Any, device: torch.device) -> None:
        found = _parts(None if self.largest is None else self.largest[None], group, device)
        self.largest = found.amax(0) if len(found) else None

    def ranges(self) -> Tensor | None:
        return self.largest


class MeanOfBatches(RangeStatistic):
    """The mean of the ranges that the batches ask for; every batch counts the same, whatever its size."""

    def __init__(self, estimate: Estimate) -> None:
        self.estimate = estimate
        self.batches = 0
        self.mean: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        found = self.estimate(rows)
        self.batches += 1
        self.mean = found if self.mean is None else self.mean + (found - self.mean) / self.batches

    def merge(self, group: Any, device: torch.device) -> None:
        own = None if self.mean is None else torch.cat([self.mean, self.mean.new_tensor([self.batches])])[None]
        found = _parts(own, group, device)
        means, batches = found[:, :-1], found[:, -1:]
        self.batches = int(batches.sum())
        self.mean = (means * batches).sum(0) / self.batches if len(found) else None

    def ranges(self) -> Tensor | None:
        return self.mean


class RandomRows(RangeStatistic):
    """The range that ``size`` rows ask for, drawn without replacement, each row of the whole stream with equal chance.

    Every row gets a random key, and the rows with the smallest keys stay. Which rows these are does not depend on how the
    stream was cut into batches. The keys are fp64: in fp32 those of a long stream would often be equal.
    """

    def __init__(self, size: int, estimate: Estimate) -> None:
        self.size, self.estimate = size, estimate
        self.rows: Tensor | None = None
        self.keys: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        keys = torch.rand(len(rows), dtype=torch.float64, device=rows.device)
        rows, keys = self._smallest(rows, keys)
        if self.rows is not None and self.keys is not None:
            rows, keys = self._smallest(torch.cat([self.rows, rows]), torch.cat([self.keys, keys]))
        self.rows, self.keys = rows, keys

    def _smallest(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        kept = keys.topk(min(self.size, len(keys)), largest=False).indices
        return rows[kept], keys[kept]

    def merge(self, group: Any, device: torch.device) -> None:
        own = None if self.rows is None or self.keys is None else torch.cat([self.rows, self.keys[:, None]], 1)
        found = _parts(own, group, device)
        if len(found):
            rows, self.keys = self._smallest(found[:, :-1], found[:, -1])
            self.rows = rows if self.rows is None else rows.to(self.rows.dtype)

    def ranges(self) -> Tensor | None:
        return None if self.rows is None else self.estimate(self.rows)


def _parts(own: Tensor | None, group: Any, device: torch.device) -> Tensor:
    """What all ranks of ``group`` have, ``[P, C]`` in fp64, of ``[rows, C]`` each; None is no row. It may be empty."""
    shape = torch.tensor([0, 0] if own is None else own.shape, device=device)
    rows, columns = _gathered(shape, group).unbind(1)
    padded = torch.zeros(int(rows.max()), int(columns.max()), dtype=torch.float64, device=device)
    if own is not None:
        padded[: len(own)] = own
    return torch.cat([part[:count] for part, count in zip(_gathered(padded, group), rows.tolist(), strict=True)])


def _gathered(part: Tensor, group: Any) -> Tensor:
    """``part`` of every rank: ``[ranks, ...]``."""
    everyone = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, part, group=group)
    return torch.stack(everyone)


# ---- Estimates ----------------------------------------------------------------------------------------------------------


def each_group(estimate: Estimate, K: int) -> Estimate:
    """``estimate`` of every group of ``K`` columns of the rows, one group after the other: ``[M, G * K]`` to ``[G * S]``."""
    return lambda rows: torch.cat([estimate(group) for group in rows.split(K, dim=1)])


def slice_maxima(rows: Tensor, slices: int) -> Tensor:
    """Largest magnitude of every slice of ``rows [M, K]``: ``[S]``."""
    return ops.absmax(rows, slices).amax(1)


def slice_quantiles(rows: Tensor, slices: int, q: float, signed: bool) -> Tensor:
    """The ``q``-quantile of the magnitudes (``signed``: of the numbers) in every slice of ``rows [M, K]``: ``[S]``."""
    return torch.stack([quantile(part if signed else part.abs(), q) for part in iter_slices(rows, slices)])


def quantile(x: Tensor, q: float) -> Tensor:
    """The ``q``-quantile of all numbers in ``x``, interpolated as ``torch.quantile`` does: a scalar in fp32 (fp64 for fp64).

    ``torch.quantile`` takes up to 2**24 numbers in fp32. This takes any number of any dtype, and sorts only those beyond
    the quantile, on its nearer side. The numbers must be finite.
    """
    distance = min(q, 1 - q) * (x.numel() - 1)  # of the quantile from the nearer end of the sorted numbers
    whole = floor(distance)
    beyond = x.flatten().topk(min(whole + 2, x.numel()), largest=q >= 0.5).values
    return wide(beyond[whole]).lerp(wide(beyond[-1]), distance - whole)
