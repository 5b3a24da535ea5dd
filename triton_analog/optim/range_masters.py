"""Input ranges that an optimizer steps by a copy ("master"): their shift and their decay go into that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.before_step import decays_of
from triton_analog.nn.parts import is_partitioned, is_stepped_elsewhere
from triton_analog.nn.range_shift import RangeShift
from triton_analog.optim.layers import KnownLayers
from triton_analog.optim.masters import Masters, held


class _Part(NamedTuple):
    """What this rank steps for a range."""

    master: Tensor
    start: int
    """The slice of its first number."""


class RangeMasters:
    """The masters of the ranges of ``layers``.

    A step of what holds them may consist of several steps of the optimizer inside, each of a few masters: :meth:`begin` comes
    before the first, :meth:`prepare` before each of them and :meth:`end` after the last.
    """

    def __init__(self, layers: KnownLayers, masters: Masters) -> None:
        self._layers, self._masters = layers, masters
        self._dues: dict[int, Tensor] = {}
        self.claim()

    def claim(self) -> list[RangeShift]:
        """The layers whose ranges have masters, which are told so."""
        claimed = [layer for layer in self._layers() if isinstance(layer, RangeShift) and self._has_master(layer)]
        for layer in claimed:
            layer.has_range_master = True
        return claimed

    def _has_master(self, layer: AnalogLayerBase) -> bool:
        range_ = layer._parameters.get("input_range")
        return range_ is not None and range_.requires_grad and self._masters.has(range_)

    def begin(self) -> None:
        """Find the decays of the step. All ranks come here together."""
        self._dues = {id(layer): due for layer, _, due in decays_of(self.claim())}

    @torch.no_grad()
    def prepare(self, optimizer: Optimizer) -> None:
        """Bring shift and decay into the masters that ``optimizer`` is about to step, and into their gradients."""
        stepped = held(optimizer)
        for layer in self.claim():
            for part in self._parts_of(layer):
                flat = next((tensor for tensor in stepped if _holds(tensor, part.master)), None)
                if flat is None:
                    continue
                if layer.is_shifted():
                    layer.fold_shift(part.master, part.start)
                due = self._dues.get(id(layer))
                if due is not None and flat.grad is not None:
                    size, offset = part.master.numel(), part.master.storage_offset() - flat.storage_offset()
                    grad = flat.grad.view(-1)[offset : offset + size]
                    grad.addcmul_(part.master.view(-1).to(grad), due[part.start : part.start + size].to(grad))

    def end(self) -> None:
        """The masters were stepped, and what forwards see follows them."""
        for layer in self.claim():
            layer.drop_shift()
        self._dues = {}

    def _parts_of(self, layer: RangeShift) -> Iterator[_Part]:
        range_: Any = layer.input_range
        if not is_stepped_elsewhere(range_):
            yield _Part(self._masters.read(range_), 0)
        elif is_partitioned(range_):
            zero = range_._z3_optimizer
            master, _ = zero._get_fp32_opt_state_partition(range_, release_swap_buffers=True)
            start = zero._get_param_partition_rank(range_) * range_.partition_numel()
            size = min(master.numel(), range_.ds_numel - start)
            if size > 0:
                yield _Part(master[:size], start)
        elif range_._hp_mapping is not None:
            yield _Part(range_._hp_mapping.get_hp_fragment(), range_._hp_mapping.lp_fragment_address.start)


def _holds(flat: Tensor, part: Tensor) -> bool:
    """Whether ``part`` lies in the memory of ``flat``."""
    if flat.untyped_storage().data_ptr() != part.untyped_storage().data_ptr():
        return False
    offset = part.storage_offset() - flat.storage_offset()
    return 0 <= offset and offset + part.numel() <= flat.numel()
