"""Clip, quantize and disturb a weight; the gradient of a learned clip (SEMANTICS 4 to 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from .absmax import absmax
from .grid import half_steps, to_grid, wide
from .noise import WEIGHT_STREAM, noise
from .slicing import iter_slices


def _bound(wmax: Tensor, slice_wmax: Tensor | None, s: int, kind: str) -> Tensor:
    """The scale of slice ``s``: a column per channel, or the largest channel's for ``per_tensor``."""
    if kind != "per_tensor":
        return wmax[s][:, None]
    return (wmax[s].amax(0, keepdim=True) if slice_wmax is None else slice_wmax[s])[:, None]


def weight(
    weight: Tensor,
    slices: int,
    *,
    clip: Tensor | None = None,
    quantization: str = "none",
    res: float = 0.0,
    noise_type: str = "none",
    std_dev: float = 0.0,
    seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
    slice_wmax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The weight the tiles hold, ``[N, K]`` in ``dtype`` (default: that of ``weight``), and ``wmax [S, N]``.

    ``clip [S, N]`` is the learned clip; ``quantization`` and ``noise_type`` are ``none``, ``per_tensor`` (one scale per
    slice: ``slice_wmax [S, 1]`` where the slices have more channels than these) or ``per_channel``. In int8 it is the number of
    steps, for a weight that is quantized and not disturbed.
    """
    wmax = wide(clip).abs() if clip is not None else absmax(weight, slices)
    q_max = half_steps(res) if quantization != "none" else 0.0
    parts = []
    for s, part in enumerate(iter_slices(wide(weight), slices)):
        if q_max > 0:
            bound = _bound(wmax, slice_wmax, s, quantization)
            part = to_grid(part, bound, q_max).clamp_(-q_max, q_max).round_()
            if dtype != torch.int8:
                part.mul_(bound / q_max)
        elif clip is not None:
            part = torch.maximum(torch.minimum(part, wmax[s][:, None]), -wmax[s][:, None])
        parts.append(part)
    out = torch.cat(parts, dim=-1)
    if noise_type != "none" and std_dev > 0:
        assert seed is not None
        z = noise(seed, *weight.shape, stream=WEIGHT_STREAM)
        for s, (part, z_s) in enumerate(zip(iter_slices(out, slices), iter_slices(z, slices), strict=True)):
            part.addcmul_(std_dev * _bound(wmax, slice_wmax, s, noise_type), z_s)
    return out.to(dtype or weight.dtype), wmax


def weight_grad(
    grad: Tensor, weight: Tensor, clip: Tensor, slices: int, *, quantization: str = "none", res: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Gradients ``[N, K]`` and ``[S, N]`` of weight and learned clip from ``grad``, that of the modified weight."""
    quantized = quantization != "none"
    q_max = half_steps(res) if quantized else 1.0
    grads, clip_grads = [], []
    for s, (g, w) in enumerate(zip(iter_slices(wide(grad), slices), iter_slices(wide(weight), slices), strict=True)):
        c = wide(clip[s])[:, None]
        outside = w.abs() > c.abs()
        q = to_grid(w, c.abs(), q_max)
        inside_grad = q.round() - q if quantized else torch.zeros_like(q)
        t = torch.where(outside, torch.where(w > 0, q_max, -q_max), inside_grad)
        grads.append(torch.where(outside, 0.0, g))
        sign = torch.where(c < 0, -1.0, 1.0)[:, 0]
        clip_grads.append(sign * (g * t).sum(-1) / (q_max * w.numel()) ** 0.5)
    return torch.cat(grads, dim=-1).to(grad.dtype), torch.stack(clip_grads)
