"""How an input dimension is cut into slices, one slice per column of analog tiles (SEMANTICS 1)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from torch import Tensor


def num_slices(features: int, max_input_size: int) -> int:
    """Number of slices of ``features`` inputs when a tile takes at most ``max_input_size`` (``<= 0``: no limit)."""
    return 1 if max_input_size <= 0 else -(-features // max_input_size)


def slice_widths(features: int, slices: int) -> list[int]:
    """Widths of ``slices`` nearly equal slices; the first ``features % slices`` are one wider."""
    base, extra = divmod(features, slices)
    return [base + 1] * extra + [base] * (slices - extra)


def split_sizes(features: int, max_input_size: int) -> list[int]:
    """Widths of the slices of ``features`` inputs; 257 with 128 gives ``[86, 86, 85]``."""
    return slice_widths(features, num_slices(features, max_input_size))


def iter_slices(x: Tensor, slices: int) -> Iterator[Tensor]:
    """Views of ``x[..., K]``, one per slice of its last dimension."""
    ends = list(accumulate(slice_widths(x.shape[-1], slices)))
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        yield x[..., start:end]
