"""Arithmetic of blocks, slices and addresses on the host."""

from __future__ import annotations

from torch import Tensor


def aligned(features: int, slices: int) -> bool:
    """Whether every slice starts and ends at a multiple of 16 columns."""
    return features % (16 * slices) == 0


def cdiv(size: int, part: int) -> int:
    """``ceil(size / part)``; ``triton.cdiv`` takes microseconds on the host, and a step calls it some twenty times."""
    return -(-size // part)


def block(size: int, largest: int, smallest: int = 16) -> int:
    """The power of two that covers ``size``, within ``smallest .. largest``: a block no larger than its tensor needs."""
    return max(smallest, min(largest, 1 << (max(size, 1) - 1).bit_length()))


def describable(*matrices: Tensor) -> bool:
    """Whether tensor descriptors can address these (stacks of) matrices: rows of contiguous elements, 16-byte aligned and
    distinct."""
    return all(
        x.stride(-1) == 1
        and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
        and x.data_ptr() % 16 == 0
        for x in matrices
    )


def slices_describable(x: Tensor, slices: int) -> bool:
    """Whether every slice of the columns starts at a multiple of 16 bytes, as a load through a descriptor has to."""
    return slices == 1 or (x.shape[1] % slices == 0 and x.shape[1] // slices * x.element_size() % 16 == 0)
