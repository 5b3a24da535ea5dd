"""The analog matrix product, slice by slice (SEMANTICS 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from .adc import convert, mask_shape, pack_bits
from .dac import dac_slice, disturbed
from .grid import half_steps, range_of, wide, without_autocast
from .noise import OUTPUT_STREAM, noise
from .slicing import iter_slices


@without_autocast
def matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    slices: int,
    *,
    inp_res: float = -1.0,
    out_noise: float = 0.0,
    noise_wmax: Tensor | None = None,
    out_bound: float = 0.0,
    bound_wmax: Tensor | None = None,
    out_res: float = -1.0,
    seed: Tensor | None = None,
    weight_wmax: Tensor | None = None,
    weight_res: float = 0.0,
    needs_mask: bool = True,
    inp_noise: float = 0.0,
    inp_sto_round: bool = False,
) -> tuple[Tensor, Tensor]:
    """``y [M, N]`` in the dtype of ``x`` and the saturation mask of :func:`mask_shape` (empty without a bound or need).

    ``x [M, K]``, ``weight [N, K]`` as the tiles hold it, ``bias [N]``, ``input_range [S]`` or ``[S, M]``, and the
    ``wmax`` that scale noise and bound: ``[S, N]`` or ``[S, 1]``. An int8 weight holds steps of ``weight_wmax / Q``.
    """
    M, N = x.shape[0], weight.shape[0]
    out = wide(x).new_zeros(M, N)
    variance = out.new_zeros(1, 1)
    masks = []
    sigma = out_noise / slices**0.5
    for s, (x_s, w_s) in enumerate(zip(iter_slices(x, slices), iter_slices(weight, slices), strict=True)):
        operand = wide(x_s)
        unit: Tensor | float = 1.0
        if input_range is not None:
            r = range_of(input_range, s, operand)
            q_max = half_steps(inp_res)
            operand, unit = dac_slice(operand, r, q_max, s, seed if inp_sto_round else None)
            operand = disturbed(operand, r, q_max, s, inp_noise, seed)
        if weight.dtype == torch.int8:  # an exact product of integers
            assert weight_wmax is not None
            unit = unit * (wide(weight_wmax[s]) / half_steps(weight_res))
            y_s = (operand.double() @ w_s.double().T).to(operand.dtype) * unit
        else:
            y_s = (operand @ wide(w_s).T).mul_(unit)
        if out_noise > 0:
            assert noise_wmax is not None
            assert seed is not None
            sigma_s = sigma * r * wide(noise_wmax[s])
            if out_bound > 0:
                y_s.addcmul_(sigma_s, noise(seed, M, N, stream=OUTPUT_STREAM, plane=s))
            else:
                variance = variance + sigma_s**2
        if out_bound > 0:
            assert bound_wmax is not None
            y_s, saturated = convert(y_s, out_bound * r * wide(bound_wmax[s]), half_steps(out_res))
            if needs_mask:
                masks.append(pack_bits(saturated))
        out += y_s
    if out_noise > 0 and not out_bound > 0:
        assert seed is not None
        out += variance.sqrt() * noise(seed, M, N, stream=OUTPUT_STREAM)
    if bias is not None:
        out += wide(bias)
    mask = torch.stack(masks) if masks else torch.empty(mask_shape(0, M, N), dtype=torch.int32, device=x.device)
    return out.to(x.dtype), mask
