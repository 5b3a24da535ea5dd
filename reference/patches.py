"""The patches of a convolution's input, as rows of a matrix, and the way back for their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .grid import wide


class Patches(NamedTuple):
    """Which elements of an input ``[B, C, *size]`` lie under a kernel, for every place of it.

    All but ``padding`` have one number per dimension of ``size``.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    """Zeros before and after each dimension, the last dimension first: as :func:`torch.nn.functional.pad` takes them."""

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Patches:
        """The patches that have these :meth:`numbers`."""
        n = len(numbers) // 5
        parts = numbers[:n], numbers[n : 2 * n], numbers[2 * n : 3 * n], numbers[3 * n :]
        return cls(*map(tuple, parts))

    def numbers(self) -> tuple[int, ...]:
        """All fields in one, as an operator takes them."""
        return *self.kernel_size, *self.stride, *self.dilation, *self.padding

    def rows(self, shape: Sequence[int]) -> int:
        """Patches of an input of ``shape [B, C, *size]``."""
        return shape[0] * prod(self.places(shape))

    def check(self, x: Tensor, columns: int) -> None:
        """``x`` has patches of ``columns`` elements.

        Raises:
            ValueError: ``columns`` are no whole channels, or ``x`` has another number of dimensions or channels, or is smaller
                than the kernel.
        """
        n, size = len(self.kernel_size), prod(self.kernel_size)
        channels = columns // size
        if columns % size != 0:
            raise ValueError(
                f"patches: a kernel of {self.kernel_size} has {size} elements per channel, which {columns} inputs of the "
                "weight, over all groups, are no multiple of; use the kernel that the weight is for"
            )
        if x.ndim != n + 2 or x.shape[1] != channels:
            raise ValueError(f"x: got shape {tuple(x.shape)}; [B, {channels}, ...] with {n} more dimensions is needed")
        if not all(places > 0 for places in self.places(x.shape)):
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, which is smaller than a kernel of {self.kernel_size} with dilation "
                f"{self.dilation}, padding included; use a larger input, more padding or a smaller kernel"
            )

    def places(self, shape: Sequence[int]) -> list[int]:
        """How often the kernel fits along each dimension of an input of ``shape [B, C, *size]``: the output's size."""
        sizes = zip(shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)
        return [
            (size + sum(self._around(dim)) - dilation * (kernel - 1) - 1) // stride + 1
            for dim, (size, kernel, stride, dilation) in enumerate(sizes)
        ]

    def unfold(self, x: Tensor) -> Tensor:
        """The patches of ``x [B, C, *size]`` as rows, in torch's order of weights: ``[B * places, C * prod(kernel_size)]``."""
        places, n = self.places(x.shape), len(self.kernel_size)
        rows, columns = x.shape[0] * prod(places), x.shape[1] * prod(self.kernel_size)
        if any(self.padding):
            x = F.pad(x, self.padding)
        for dim, (kernel, stride, dilation) in enumerate(
            zip(self.kernel_size, self.stride, self.dilation, strict=True)
        ):
            x = x.unfold(2 + dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        return x.movedim(1, 1 + n).reshape(rows, columns)

    def fold(self, grad: Tensor, shape: Sequence[int]) -> Tensor:
        """The gradient of an input of ``shape [B, C, *size]`` from that of its rows.

        Where patches overlap their gradients add up, in fp32 and in a fixed order, one dimension after the other.
        """
        batch, channels, *sizes = shape
        places = self.places(shape)
        total = grad.reshape(batch, *places, channels, *self.kernel_size)
        for dim in reversed(range(len(sizes))):
            stride, dilation = self.stride[dim], self.dilation[dim]
            before, after = self._around(dim)
            if self.kernel_size[dim] == stride == 1 and before == after == 0:
                total = total.squeeze(-1)
                continue
            padded = [*total.shape[: 1 + dim], before + sizes[dim] + after, *total.shape[2 + dim : -1]]
            added = total.new_zeros(padded, dtype=wide(total[:0]).dtype)
            for offset, part in enumerate(total.unbind(-1)):
                first = offset * dilation
                under = slice(first, first + (places[dim] - 1) * stride + 1, stride)
                added[(slice(None),) * (1 + dim) + (under,)] += part
            total = added.narrow(1 + dim, before, sizes[dim])
        return total.movedim(-1, 1).to(grad.dtype)

    def _around(self, dim: int) -> tuple[int, int]:
        """The zeros before and after dimension ``dim`` of the size."""
        pair = 2 * (len(self.kernel_size) - 1 - dim)
        return self.padding[pair], self.padding[pair + 1]
