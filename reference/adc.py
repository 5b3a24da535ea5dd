"""Output noise, bound and quantization of one slice (SEMANTICS 3, steps 5 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import half_steps, to_grid, wide
from .noise import OUTPUT_STREAM, noise

_BIT = [1 << i for i in range(8)]


def mask_shape(slices: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """Shape of the saturation mask of a product ``[rows, columns]``, int32."""
    return slices, -(-columns // 128), rows, 4


def pack_bits(flags: Tensor) -> Tensor:
    """``flags [M, N]`` (bool) as int32 ``[ceil(N / 128), M, 4]``.

    Column ``128 * c + 32 * p + 16 * g + 8 * h + 2 * t + l`` is bit ``8 * p + 4 * g + 2 * h + l`` of word ``[c, m, t]``: one
    word holds the columns that one thread of a tensor core's accumulator does.
    """
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[1] % 128)).to(torch.uint8)
    shape = mask_shape(1, *flags.shape)[1:]
    bits = padded.view(len(flags), shape[0], 4, 4, 4, 2).permute(1, 0, 4, 2, 3, 5).reshape(*shape, 4, 8)
    weights = torch.tensor(_BIT, dtype=torch.uint8, device=flags.device)
    return (bits * weights).sum(-1, dtype=torch.uint8).view(torch.int32).view(shape)


def unpack_bits(mask: Tensor, columns: int) -> Tensor:
    """The inverse of :func:`pack_bits`: ``[M, columns]`` bool."""
    weights = torch.tensor(_BIT, dtype=torch.uint8, device=mask.device)
    bits = (mask.view(torch.uint8)[..., None] & weights).ne(0).unflatten(-1, (4, 2))  # [c, m, 4 t * 4 p, 2 g * 2 h, 2 l]
    return bits.unflatten(2, (4, 4)).permute(1, 0, 3, 4, 2, 5).flatten(1)[:, :columns]


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
    of :func:`pack_bits` (no blocks of columns without a bound).
    """
    v = wide(y)
    r = input_range.to(v.dtype).abs()[:, None]
    if out_noise > 0:
        assert seed is not None
        assert noise_wmax is not None
        v = v + (out_noise * r * wide(noise_wmax)) * noise(seed, *y.shape, stream=OUTPUT_STREAM, plane=plane)
    if not out_bound > 0:
        return v.to(y.dtype, copy=True), torch.empty(0, y.shape[0], 4, dtype=torch.int32, device=y.device)
    assert bound_wmax is not None
    out, saturated = convert(v, out_bound * r * wide(bound_wmax), half_steps(out_res))
    return out.to(y.dtype), pack_bits(saturated)


def adc_grad(grad: Tensor, mask: Tensor) -> Tensor:
    """``grad [M, N]`` where the slice behind ``mask`` did not saturate, elsewhere 0."""
    return torch.where(unpack_bits(mask, grad.shape[1]), 0.0, grad)
