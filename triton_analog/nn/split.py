"""What a layer knows of being split over ranks by tensor parallelism: which part is this rank's, and who multiplies with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from triton_analog.calls import Numbers

RANGE_BUFFERS = ("input_range_update_idx", "x_min", "x_max", "input_range_residual")
"""Buffers of a layer with one number for each range that a rank has."""


class Split(ABC):
    """How one layer is split, and the part of it that this rank computes. Copies of the layer share it."""

    features: int
    """Inputs ``K`` of the part."""
    slices: int
    """Slices ``S`` of the part, each with its input range."""
    first_slice: int
    """The slice of the whole layer that is the part's first one."""

    def __deepcopy__(self, memo: Any) -> Split:
        return self

    @property
    def own_ranges(self) -> slice:
        """Which of the stored input ranges of the whole layer are those of the part."""
        return slice(self.first_slice, self.first_slice + self.slices)

    @abstractmethod
    def matmul(self, layer: Any, x: Any, product: Callable[..., Tensor]) -> Any:
        """What ``layer.analog_matmul`` gives for an input in the layout of the split; in that of its outputs."""

    @abstractmethod
    def matmul_without_range(self, layer: Any, numbers: Numbers, x: Any, product: Callable[..., Tensor]) -> Any:
        """What ``layer.matmul_without_range`` gives."""

    @abstractmethod
    def inputs(self, x: Any) -> Tensor:
        """What the part multiplies of an input of the layer: ``[..., K]``, without a gradient."""

    @abstractmethod
    def whole_ranges(self, found: Tensor | None) -> Tensor | None:
        """The ranges of the whole layer where this rank's part has ``found [S]``, alike on all ranks; None where no rank found
        any, and 0 where one did not."""

    @abstractmethod
    def saved(self, buffer: Tensor) -> Tensor:
        """A buffer of the part as a state dict holds that of the whole layer."""

    def loaded(self, value: Any) -> Tensor:
        """The part of a buffer that a state dict holds: of the whole layer, or what :meth:`saved` made."""
        if hasattr(value, "to_local"):
            return value.to_local()
        return value if value.numel() == self.slices else value[self.own_ranges]


def stored_range(layer: nn.Module) -> Tensor:
    """The stored input ranges that a forward of ``layer`` sees on this rank, detached."""
    stored: Any = layer.input_range.detach()  # type: ignore[operator]
    return stored if layer.split is None else stored.to_local()
