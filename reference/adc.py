"""Output noise, bound and quantization of one slice (SEMANTICS 3, steps 5 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import half_steps, to_grid, wide
from .noise import OUTPUT_STREAM, noise

_BIT = [1 << i for i in range(8)]


def pack_bits(flags: Tensor) -> Tensor:
    """``flags [M, N]`` (bool) as ``[M, ceil(N / 8)]`` uint8; column ``n`` is bit ``n % 8`` of byte ``n // 8``."""
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[-1] % 8)).to(torch.uint8)
    weights = torch.tensor(_BIT, dtype=torch.uint8, device=flags.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, columns: int) -> Tensor:
    """The inverse of :func:`pack_bits`: ``[M, columns]`` bool."""
    weights = torch.tensor(_BIT, dtype=torch.uint8, device=mask.device)
    return (mask[..., None] & weights).ne(0).flatten(-2)[..., :columns]


def convert(v: Tensor, bound: Tensor, q_max: float) -> tuple[Tensor, Tensor]:
    """``v`` rounded to the grid (if ``q_max > 0``) and then clamped to ``bound``, and where the clamp acted.

    The decision is taken in units of one step, where it is exact.
    """
    if q_max > 0:
        q = to_grid(v, bound, q_max).clamp(-q_max - 1, q_max + 1).round()
        return q.clamp(-q_max, q_max) * (bound / q_max), ~(q.abs() <= q_max)
    return torch.maximum(torch.minimum(v, bound), -bound), ~(v.abs() <= bound)


def adc(
    y: Tensor,
    input_range: Tensor,
    *,
    out_noise: float = 0.0,
    noise_wmax: Tensor | None = None,
    out_bound: float = 0.0,
    bound_wmax: Tensor | None = None,
    out_res: float = -1.0,
    seed: Tensor | None = None,
    plane: int = 0,
) -> tuple[Tensor, Tensor]:
    """``y [M, N]`` after noise ``out_noise * r * noise_wmax``, rounding and the bound ``out_bound * r * bound_wmax``.

    ``input_range`` is ``[1]`` or ``[M]``, the ``wmax`` are ``[N]`` or ``[1]``. Also returns the packed saturation mask
    ``[M, ceil(N / 8)]`` (no columns without a bound).
    """
    v = wide(y)
    r = input_range.to(v.dtype).abs()[:, None]
    if out_noise > 0:
        assert seed is not None
        assert noise_wmax is not None
        v = v + (out_noise * r * wide(noise_wmax)) * noise(seed, *y.shape, stream=OUTPUT_STREAM, plane=plane)
    if not out_bound > 0:
        return v.to(y.dtype, copy=True), torch.empty(y.shape[0], 0, dtype=torch.uint8, device=y.device)
    assert bound_wmax is not None
    out, saturated = convert(v, out_bound * r * wide(bound_wmax), half_steps(out_res))
    return out.to(y.dtype), pack_bits(saturated)
