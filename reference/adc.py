"""Output noise, bound and quantization of one slice (SEMANTICS 3, steps 5 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import half_steps, to_grid, wide
from .noise import OUTPUT_STREAM, noise

# Eight flags, a byte each, are one 64-bit number. _GATHER times that has flag i at bit 56 + i; _SPREAD times eight bits has
# them in every byte, of which _DIAGONAL keeps bit i in byte i.
_GATHER = sum(1 << 7 * i for i in range(1, 9))
_SPREAD = sum(1 << 8 * i for i in range(8))
_DIAGONAL = sum(1 << 9 * i for i in range(7)) - (1 << 63)


def mask_shape(slices: int, rows: int, columns: int) -> tuple[int, int, int, int]:
    """Shape of the saturation mask of a product ``[rows, columns]``, int32."""
    return slices, -(-columns // 128), rows, 4


def pack_bits(flags: Tensor) -> Tensor:
    """``flags [M, N]`` (bool) as int32 ``[ceil(N / 128), M, 4]``.

    Column ``128 * c + 32 * p + 16 * g + 8 * h + 2 * t + l`` is bit ``8 * p + 4 * g + 2 * h + l`` of word ``[c, m, t]``: one
    word holds the columns that one thread of a tensor core's accumulator does.
    """
    shape = mask_shape(1, *flags.shape)[1:]
    if flags.numel() == 0:  # torch cannot take the elements of an empty tensor for wider ones
        return torch.zeros(shape, dtype=torch.int32, device=flags.device)
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[1] % 128))
    # The two flags of l stay together.
    pairs = padded.view(torch.int16).view(len(flags), shape[0], 4, 4, 4).permute(1, 0, 4, 2, 3)
    eights = pairs.contiguous().view(torch.int64)
    return (eights * _GATHER).bitwise_right_shift_(56).to(torch.uint8).view(*shape, 4).view(torch.int32).view(shape)


def unpack_bits(mask: Tensor, columns: int) -> Tensor:
    """The inverse of :func:`pack_bits`: ``[M, columns]`` bool."""
    if mask.numel() == 0:
        return torch.zeros(mask.shape[1], columns, dtype=torch.bool, device=mask.device)
    eights = mask.view(torch.uint8).to(torch.int64).mul_(_SPREAD).bitwise_and_(_DIAGONAL)
    pairs = eights.view(torch.uint8).ne(0).view(torch.int16).view(*mask.shape, 4, 4).permute(1, 0, 3, 4, 2)
    return pairs.flatten(1).view(torch.bool)[:, :columns]


def convert(v: Tensor, bound: Tensor, q_max: float) -> tuple[Tensor, Tensor]:
    """``v`` rounded to the grid (if ``q_max > 0``) and then clamped to ``bound``, and where the clamp acted.

    The decision is taken in units of one step, where it is exact.
    """
    if q_max > 0:
        q = to_grid(v, bound, q_max).round_()
        clamped = q.clamp(-q_max, q_max)
        saturated = clamped != q
        return clamped.mul_(bound / q_max), saturated
    clamped = torch.maximum(torch.minimum(v, bound), -bound)
    return clamped, clamped != v


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
    """``grad [M, N]`` where each slice of ``mask`` did not saturate, elsewhere 0: ``[S, M, N]``."""
    out = grad.new_empty(mask.shape[0], *grad.shape)
    for bits, passed in zip(mask, out, strict=True):
        passed.copy_(grad).masked_fill_(unpack_bits(bits, grad.shape[1]), 0)
    return out
