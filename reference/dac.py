"""Input clamp and quantization (SEMANTICS 3, steps 1 and 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import TINY, half_steps, range_of, to_grid, wide
from .noise import INPUT_STREAM, ROUNDING_STREAM, noise, of_inputs, uniform
from .slicing import iter_slices


def dac_slice(
    x: Tensor, r: Tensor, q_max: float, s: int = 0, rounding_seed: Tensor | None = None
) -> tuple[Tensor, Tensor | float]:
    """One slice as ``(operand, unit)`` with ``x_q = operand * unit``: integers and the step, or clamped values and 1.

    With a ``rounding_seed`` it rounds up with the probability of the fraction, by the numbers of slice ``s``.
    """
    if q_max > 0:
        steps = to_grid(x, r, q_max).clamp_(-q_max, q_max)
        if rounding_seed is None:
            return steps.round_(), r / q_max
        down = steps.floor()
        u = uniform(of_inputs(rounding_seed), *x.shape, stream=ROUNDING_STREAM, plane=s)
        return down + (u < steps - down), r / q_max
    return torch.maximum(torch.minimum(x, r), -r), 1.0


def disturbed(operand: Tensor, r: Tensor, q_max: float, s: int, inp_noise: float, seed: Tensor | None) -> Tensor:
    """What comes out of :func:`dac_slice`, in its unit, plus input noise of deviation ``inp_noise * r``; as given without."""
    if inp_noise <= 0:
        return operand
    assert seed is not None
    deviation = inp_noise * (torch.where(r < TINY, 0.0, torch.full_like(r, q_max)) if q_max > 0 else r)
    return operand + deviation * noise(of_inputs(seed), *operand.shape, stream=INPUT_STREAM, plane=s)


def dac(
    x: Tensor,
    input_range: Tensor,
    slices: int,
    inp_res: float = -1.0,
    *,
    inp_noise: float = 0.0,
    inp_sto_round: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """``x [M, K]`` clamped to its range and, if ``inp_res > 0``, quantized, and input noise; dtype of ``x``."""
    q_max = half_steps(inp_res)
    parts = []
    for s, part in enumerate(iter_slices(x, slices)):
        part = wide(part)
        r = range_of(input_range, s, part)
        operand, unit = dac_slice(part, r, q_max, s, seed if inp_sto_round else None)
        parts.append((disturbed(operand, r, q_max, s, inp_noise, seed) * unit).to(x.dtype))
    return torch.cat(parts, dim=-1)


def dac_steps(
    x: Tensor,
    input_range: Tensor,
    slices: int,
    inp_res: float,
    *,
    inp_sto_round: bool = False,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``x [M, K]`` as int8 numbers of steps and, for a static range, packed flags ``[2, M, ceil(K / 8)]``: ``|x| >= r`` and
    ``|x| <= r``, low bit first."""
    q_max = half_steps(inp_res)
    steps, touches, passes = [], [], []
    for s, part in enumerate(iter_slices(x, slices)):
        part = wide(part)
        r = range_of(input_range, s, part)
        q, _ = dac_slice(part, r, q_max, s, seed if inp_sto_round else None)
        touches.append(part.abs() >= r)
        passes.append(part.abs() <= r)
        steps.append(
            torch.where(touches[-1] & (q == 0), part.sign(), q).nan_to_num().to(torch.int8)
        )  # sign for a range of 0
    rows = len(x) if input_range.ndim == 1 else 0
    flags = torch.stack([torch.cat(touches, -1)[:rows], torch.cat(passes, -1)[:rows]])
    return torch.cat(steps, -1), _pack_bytes(flags)


def _pack_bytes(flags: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(flags, (0, -flags.shape[-1] % 8)).to(torch.uint8)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=flags.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def restore(steps: Tensor, clipped: Tensor, input_range: Tensor, slices: int, dtype: torch.dtype) -> Tensor:
    """An input that the clamp and its gradients cannot tell from the one behind :func:`dac_steps`."""
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=steps.device)
    touches, passes = (clipped[..., None] & weights).ne(0).flatten(-2)[..., : steps.shape[1]]
    parts = []
    for s, (q, t, p) in enumerate(zip(*(iter_slices(v, slices) for v in (steps, touches, passes)), strict=True)):
        q = q.to(dtype)
        r = range_of(input_range, s, q)
        parts.append(torch.where(p, torch.where(t, q.sign() * r, 0.0), torch.where(t, q.sign() * torch.inf, torch.nan)))
    return torch.cat(parts, -1)
