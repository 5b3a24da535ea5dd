"""The input range: its update from data and its gradient (SEMANTICS 6 and 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import wide
from .slicing import iter_slices
from .std import moments, std_of


def extrema(x: Tensor, slices: int) -> Tensor:
    """Smallest and largest value of every slice of ``x [M, K]``: ``[2, S]``."""
    pairs = [torch.stack(torch.aminmax(wide(part))) for part in iter_slices(x, slices)]
    return torch.stack(pairs, dim=-1)


def input_range_update(
    input_range: Tensor, count: Tensor, residual: Tensor, moments: Tensor, *, init_from_data: int, init_std_alpha: float
) -> None:
    """Running mean of ``init_std_alpha * std`` over the first ``init_from_data`` batches; in place.

    ``residual`` carries what the range's dtype rounds off: late batches move a mean by less than half a unit of bf16.
    """
    std = std_of(moments)
    n = count.to(std.dtype)
    due = (count < init_from_data) & (std > 0) & (std < torch.inf)
    r = input_range.to(std.dtype) + residual.to(std.dtype)
    r = torch.where(due, (r * n + init_std_alpha * std) / (n + 1), r).abs()
    input_range.copy_(r)
    residual.copy_(r - input_range.to(std.dtype))
    count.add_(due)


def input_range_learn(
    x: Tensor,
    input_range: Tensor,
    count: Tensor,
    residual: Tensor | None,
    slices: int,
    *,
    init_from_data: int,
    init_std_alpha: float,
) -> None:
    """:func:`input_range_update` with the moments of ``x [M, K]``, which is read only where a start-up lasts; in place."""
    residual = torch.zeros_like(input_range) if residual is None else residual
    sample = moments(x, slices, count < init_from_data)
    input_range_update(
        input_range, count, residual, sample, init_from_data=init_from_data, init_std_alpha=init_std_alpha
    )


def input_range_update_fast(
    input_range: Tensor,
    count: Tensor,
    x_min: Tensor,
    x_max: Tensor,
    extrema: Tensor,
    *,
    init_from_data: int,
    momentum: float,
) -> None:
    """Running extreme values over the first ``init_from_data`` batches, momentum -1 for all-time extremes; in place."""
    low, high = extrema
    old_low, old_high = wide(x_min), wide(x_max)
    if momentum == -1:
        new_low, new_high = torch.minimum(old_low, low), torch.maximum(old_high, high)
    else:
        new_low = old_low * momentum + low * (1 - momentum)
        new_high = old_high * momentum + high * (1 - momentum)
    first = count == 0
    new_low, new_high = torch.where(first, low, new_low), torch.where(first, high, new_high)
    due = (count < init_from_data) & low.isfinite() & high.isfinite()
    x_min.copy_(torch.where(due, new_low, old_low))
    x_max.copy_(torch.where(due, new_high, old_high))
    estimate = torch.maximum(new_low.abs(), new_high.abs())
    input_range.copy_(torch.where(due, estimate, wide(input_range)).abs())
    count.add_(due)


def input_range_grad_slice(
    grad: Tensor, x: Tensor, r: Tensor, decay: float, input_min_percentage: float, fast_mode: bool
) -> Tensor:
    """Gradient of one slice's (signed) range from ``grad``, that of the clamped input, before the clip mask.

    With a negative ``decay`` there is none, and two numbers follow that decide about it: how many inputs do not clip, and how
    many there are.
    """
    above, below = x >= r.abs(), x <= -r.abs()
    if fast_mode:
        widen = torch.where(above, grad, 0.0).sum() - torch.where(below, grad, 0.0).sum()
        return torch.where(r < 0, -widen, widen)
    widen = torch.where(above, grad.clamp(max=0), 0.0).sum() - torch.where(below, grad.clamp(min=0), 0.0).sum()
    inside = (x.abs() < r.abs()).sum()
    if decay < 0:
        return torch.stack([r * widen, inside.to(r.dtype), torch.full_like(widen, x.numel())])
    if decay > 0:
        widen = widen + decay * (inside / x.numel() > input_min_percentage)
    return r * widen


def input_range_grad(
    grad: Tensor,
    x: Tensor,
    input_range: Tensor,
    slices: int,
    *,
    decay: float = 0.0,
    input_min_percentage: float = 0.95,
    fast_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients ``[M, K]`` of the input and ``[S]`` of its range from ``grad [M, K]``, that of the clamped input; with a negative
    ``decay`` the latter is ``[3, S]``, as :func:`input_range_grad_slice` gives it."""
    grads, range_grads = [], []
    for s, (g, x_s) in enumerate(zip(iter_slices(wide(grad), slices), iter_slices(wide(x), slices), strict=True)):
        r = input_range[s].to(x_s.dtype)
        range_grads.append(input_range_grad_slice(g, x_s, r, decay, input_min_percentage, fast_mode))
        grads.append(torch.where(x_s.abs() <= r.abs(), g, 0.0).to(grad.dtype))
    return torch.cat(grads, dim=-1), torch.stack(range_grads, dim=-1)
