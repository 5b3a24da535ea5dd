"""How the products of both gradients meet the saturation mask: on the way, or as a gradient that was masked before."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from triton_analog.launch import describable, slices_describable
from triton_analog.launch.space import Problem
from triton_analog.ops.adc import each_passed


class Product(Protocol):
    """A gradient of the analog product, to be launched in one of two ways."""

    takes_mask: bool

    def launch(self, first: int, count: int, passed: Tensor) -> None:
        """``count`` slices from ``first`` on, whose ADCs let ``passed [count or 1, M, N]`` through."""

    def launch_masked(self, grad: Tensor, mask: Tensor | None) -> None:
        """All slices at once, with their packed ``mask``; only where it ``takes_mask``."""


def multiply_passed(grad: Tensor, mask: Tensor | None, slices: int, *products: Product) -> None:
    """Launch ``products``, of which a later one that takes the mask may need what an earlier one wrote."""
    first, *others = products
    if first.takes_mask:
        first.launch_masked(grad, mask)
    plain = [product.launch for product in products if not product.takes_mask]
    if plain:
        each_passed(grad, mask, slices, *plain)
    for product in others:
        if product.takes_mask:
            product.launch_masked(grad, mask)


def pipelines_gradients(problem: Problem) -> bool:
    """Whether the kernels of ``ops/hopper`` run there."""
    return problem.hardware.capability == 90 and problem.dtype.itemsize == 2


def can_be_pipelined(grad: Tensor, other: Tensor, slices: int, mask: Tensor | None) -> bool:
    """Whether TMA can address the gradient and the slices of the ``other`` operand, and the mask, if any, is packed."""
    is_packed = mask is None or not mask.is_floating_point()
    fits = grad.shape[0] > 0 and other.dtype == grad.dtype and other.shape[1] % 8 == 0
    return is_packed and fits and describable(grad, other) and slices_describable(other, slices)
