"""The quantization grid shared by DAC, ADC and weights (SEMANTICS 2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

MAX_STEPS = 2**22
"""Most steps of a grid: up to here rounding by the addition of a magic number, as the kernels do it, is exact."""

TINY = 2.0**-100
"""A bound below this is a zero bound: its reciprocal would overflow, and the quantized value is 0."""


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype the arithmetic runs in: fp64 stays (for ground truth), everything else is fp32."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(function: Callable[..., Result]) -> Callable[..., Result]:
    """Run ``function(x, ...)`` in the precision it asks for: autocast would redo its products in half precision."""

    @wraps(function)
    def wrapper(x: Tensor, *args: Any, **kwargs: Any) -> Result:
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return wrapper


def half_steps(res: float) -> float:
    """``Q`` of the grid ``{-Q .. Q} * bound / Q``: ``res`` is a number of steps (> 1) or its inverse; 0.0 means off."""
    if res <= 0:
        return 0.0
    return (res if res > 1 else 1.0 / res) / 2


def to_grid(v: Tensor, bound: Tensor, q_max: float) -> Tensor:
    """``v`` in units of one step, before rounding and clamping; 0 where the bound is 0; NaN where either is NaN."""
    return v * torch.where(bound < TINY, 0.0, torch.full_like(bound, q_max) / bound)  # number / tensor rounds twice


def range_of(input_range: Tensor, s: int, x: Tensor) -> Tensor:
    """``|r|`` of slice ``s`` for the wide input ``x [M, K_s]``: a scalar (``input_range [S]``) or a column (``[S, M]``)."""
    r = input_range[s].to(x.dtype).abs()
    return r if r.ndim == 0 else r[:, None]
