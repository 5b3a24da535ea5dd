"""What is counted of one layer while a model runs: small tensors on its device, which nothing waits for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as digital_linear

import triton_analog.ops as ops
from triton_analog.calls import Numbers, input_dtype, linear, linear_and_masks, parts_of
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.one_forward import OneForward
from triton_analog.reference.grid import wide
from triton_analog.reference.slicing import iter_slices

AT_ONCE = 2**22
"""Weights of which fourth powers are taken at once."""


class LayerCounts:
    """Sums over the products of one layer.

    Its ``T`` tile rows are the slices of its inputs, group by group. :meth:`collected` has for each of them, in this order:
    inputs clipped, products saturated, energy of the digital output, energy of its difference to the analog one, largest
    magnitude of an input, input range; then count, mean, and the sums of the second to fourth powers of the deviations of its
    weights. What follows are the two energies of the layer's whole output. What is not known is NaN.
    """

    PER_ROW = 11

    def __init__(self, layer: AnalogMatrixLayer) -> None:
        self.layer = layer
        self.vectors = 0
        """Input vectors that were multiplied: rows, patches, time steps."""
        self._numbers: Numbers | None = None
        self._sums: Tensor | None = None
        self._whole: Tensor | None = None
        self._largest: Tensor | None = None
        self._range: Tensor | None = None
        self._weight: Tensor | None = None

    # ---- While the model runs -----------------------------------------------------------------------------------------

    def matmul(self, x: Tensor, one_forward: OneForward | None = None) -> Tensor:
        """The layer's product as it always is, counted."""
        return type(self.layer).analog_matmul(self.layer, x, one_forward, self._counted)

    def _counted(self, x: Tensor, *others: Any) -> Tensor:
        y = linear(x, *others)
        if y.numel() > 0:
            with torch.no_grad():
                self._add(y.detach(), x.detach(), *others)
        return y

    def _add(
        self,
        y: Tensor,
        x: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        input_range: Tensor | None,
        clip: Tensor | None,
        seed: Tensor | None,
        weight_seed: Tensor | None,
        tile: Tensor | None,
        wmax: Tensor | None,
        numbers: Numbers,
    ) -> None:
        G, S = self.layer.groups, self.layer.slices
        rows = self.layer.tile_rows(x.to(input_dtype(x)))
        self.vectors += len(rows)
        self._numbers = numbers
        if self._weight is None:  # now, as offloaded weights are here for the forward alone
            self._weight = _weight_moments(self.layer)
        range_ = None if input_range is None else wide(input_range.detach()).abs()
        largest = torch.cat([ops.extrema(part, S).abs().amax(0) for part in rows.chunk(G, 1)])
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        self._range = range_
        alone = numbers._replace(max_input_size=-1, groups=1, patches=None, save_input="full")
        sums, digital = [], []
        for group, at, columns in self._tile_rows():
            own = group * S + at
            part = parts_of(rows, G, 1)[group][:, columns]
            wanted = digital_linear(part, parts_of(matrix.detach(), G)[group][:, columns])
            given, masks = linear_and_masks(
                part,
                parts_of(matrix.detach(), G)[group][:, columns],
                None,
                None if input_range is None else input_range[own : own + 1],
                None if clip is None else parts_of(clip, G, 1)[group][at : at + 1],
                seed,
                weight_seed,
                None if tile is None else parts_of(tile, G)[group][:, columns],
                None if wmax is None else parts_of(wmax, G, 1)[group][at : at + 1],
                alone,
            )
            clipped = wanted.new_zeros((), dtype=torch.int64)
            if range_ is not None:
                clipped = torch.count_nonzero(part.abs() > range_[own : own + 1])  # one element, or it would be rounded
            saturated = bits_set(masks[0]) if masks else torch.zeros_like(clipped)
            noise = wide(given) - wide(wanted)
            sums.append(torch.stack([clipped.double(), saturated.double(), _energy(wanted), _energy(noise)]))
            if at == 0:
                digital.append(wide(wanted))
            else:
                digital[group] += wide(wanted)
        whole = torch.cat(digital, 1)
        shift = 0 if bias is None else wide(bias.detach())
        found = torch.stack([_energy(whole), _energy(wide(y.reshape_as(whole)) - (whole + shift))])
        self._sums = torch.stack(sums) if self._sums is None else self._sums + torch.stack(sums)
        self._whole = found if self._whole is None else self._whole + found

    def _tile_rows(self) -> Iterator[tuple[int, int, slice]]:
        """Group, slice, and the columns of that, of every tile row."""
        ends = list(accumulate(self.layer.get_split_sizes()))
        columns = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        for group, (at, own) in product(range(self.layer.groups), enumerate(columns)):
            yield group, at, own

    # ---- Afterwards ---------------------------------------------------------------------------------------------------

    @property
    def numbers(self) -> Numbers:
        """What the layer was asked to do."""
        return self.layer._numbers() if self._numbers is None else self._numbers

    def collected(self) -> Tensor:
        """``[T * PER_ROW + 2]`` in fp64, on the layer's device."""
        T = self.layer.groups * self.layer.slices
        weight = _weight_moments(self.layer) if self._weight is None else self._weight

        def known(found: Tensor | None, *shape: int) -> Tensor:
            return weight.new_full(shape, torch.nan) if found is None else found.to(weight).view(shape)

        parts = known(self._sums, T, 4), known(self._largest, T, 1), known(self._range, T, 1), weight
        return torch.cat([torch.cat(parts, 1).flatten(), known(self._whole, 2)])


def bits_set(words: Tensor) -> Tensor:
    """The number of bits that are 1 in a tensor of int32, int64."""
    words = words - (words.bitwise_right_shift(1) & 0x55555555)  # pairs of bits
    words = (words & 0x33333333) + (words.bitwise_right_shift(2) & 0x33333333)
    words = (words + words.bitwise_right_shift(4)) & 0x0F0F0F0F  # bytes
    return words.view(torch.uint8).sum()


def _energy(y: Tensor) -> Tensor:
    """Sum of squares, fp64."""
    return torch.linalg.vector_norm(y, dtype=wide(y[:0]).dtype).double().square()


def _weight_moments(layer: AnalogMatrixLayer) -> Tensor:
    """``[T, 5]``, see :class:`LayerCounts`; NaN for a weight that is elsewhere."""
    G, S = layer.groups, layer.slices
    weight = layer.matrix.detach() if layer.programmed is None else layer.programmed.held()
    if weight.is_meta or weight.shape != layer.tile_shape or hasattr(weight, "to_local"):
        return torch.full((G * S, 5), torch.nan, dtype=torch.float64, device="cpu" if weight.is_meta else weight.device)
    found = []
    for part in weight.chunk(G):
        for low, own in zip(ops.moments(part, S).double(), iter_slices(part, S), strict=True):
            third, fourth = torch.zeros_like(low[0]), torch.zeros_like(low[0])
            for rows in own.split(max(AT_ONCE // own.shape[1], 1)):
                deviation = wide(rows) - low[1:2].to(wide(rows[:0]).dtype)
                square = deviation.square()
                third += (square * deviation).sum(dtype=torch.float64)
                fourth += square.square().sum(dtype=torch.float64)
            found.append(torch.cat([low, third[None], fourth[None]]))
    return torch.stack(found)
