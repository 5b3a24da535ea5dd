"""The analog layer: the operations composed, forward and backward (SEMANTICS 3 to 6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .absmax import absmax
from .dac import dac_steps
from .matmul import matmul
from .matmul_backward import matmul_backward
from .matmul_dgrad import matmul_dgrad
from .matmul_wgrad import matmul_wgrad
from .patches import Patches
from .weight import weight as modified_weight
from .weight import weight_grad


def keeps_steps(save_input: str, needs_grad: bool, x: Tensor, elements: int) -> bool:
    """Whether the backward is left the converter's integers of the rows, of so many ``elements`` with ten bits each, instead
    of ``x``. Not where the patches of a convolution overlap so much that ``x`` is smaller."""
    return save_input == "int8" and needs_grad and 5 * elements < 4 * x.numel() * x.element_size()


def tiles(
    weight: Tensor,
    slices: int,
    clip: Tensor | None,
    quantization: str,
    res: float,
    noise_type: str,
    std_dev: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    slice_wmax: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The weight that the tiles hold, in the forward and again in its backward, and ``wmax`` if it was found on the way."""
    if clip is None and quantization == "none" and (noise_type == "none" or std_dev <= 0):
        return weight.to(dtype), None
    return modified_weight(
        weight, slices, clip=clip, quantization=quantization, res=res, noise_type=noise_type, std_dev=std_dev, seed=seed,
        dtype=dtype, slice_wmax=slice_wmax,
    )  # fmt: skip


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    clip: Tensor | None,
    seed: Tensor | None,
    weight_seed: Tensor | None,
    tile_weight: Tensor | None,
    tile_wmax: Tensor | None,
    slice_wmax: Tensor | None,
    slices: int,
    dynamic_range: bool,
    inp_res: float,
    inp_noise: float,
    inp_sto_round: bool,
    out_noise: float,
    out_noise_per_channel: bool,
    out_bound: float,
    out_bound_per_channel: bool,
    out_res: float,
    weight_quantization: str,
    weight_res: float,
    weight_noise: str,
    weight_noise_std: float,
    save_input: str,
    patches: Sequence[int] | None,
    needs_grad: bool,
) -> list[Tensor]:
    """``y [M, N]``, and what the backward needs beside its arguments: with a bound the saturation mask, the ranges ``[S, M]``
    of a dynamic range, and where :func:`keeps_steps` the input as :func:`dac_steps` keeps it, in two tensors."""
    rows = x if patches is None else Patches.of(patches).unfold(x)
    w, wmax = tile_weight, tile_wmax
    if w is None:
        w, found = tiles(
            weight,
            slices,
            clip,
            weight_quantization,
            weight_res,
            weight_noise,
            weight_noise_std,
            weight_seed,
            x.dtype,
            slice_wmax,
        )
        wmax = wmax if found is None else found
    if wmax is None and (out_noise > 0 or out_bound > 0):
        wmax = absmax(weight, slices)

    def scale(wanted: bool, per_channel: bool) -> Tensor | None:
        if wmax is None or not wanted:
            return None
        if per_channel:
            return wmax
        return wmax.amax(1, keepdim=True) if slice_wmax is None else slice_wmax

    r = absmax(rows, slices) if dynamic_range else input_range
    y, mask = matmul(
        rows, w, bias, r, slices, inp_res=inp_res, out_noise=out_noise,
        noise_wmax=scale(out_noise > 0, out_noise_per_channel), out_bound=out_bound,
        bound_wmax=scale(out_bound > 0, out_bound_per_channel), out_res=out_res, seed=seed, needs_mask=needs_grad,
        inp_noise=inp_noise, inp_sto_round=inp_sto_round,
    )  # fmt: skip
    results = [y]
    if out_bound > 0 and needs_grad:
        results.append(mask)
    if dynamic_range and needs_grad and r is not None:
        results.append(r)
    if r is not None and keeps_steps(save_input, needs_grad, x, rows.numel()):
        results += dac_steps(rows, r, slices, inp_res, inp_sto_round=inp_sto_round, seed=seed)
    return results


def linear_backward(
    grad: Tensor,
    x: Tensor,
    clipped: Tensor | None,
    weight: Tensor,
    input_range: Tensor | None,
    clip: Tensor | None,
    seed: Tensor | None,
    weight_seed: Tensor | None,
    tile_weight: Tensor | None,
    slice_wmax: Tensor | None,
    mask: Tensor | None,
    slices: int,
    inp_res: float,
    inp_noise: float,
    inp_sto_round: bool,
    weight_quantization: str,
    weight_res: float,
    weight_noise: str,
    weight_noise_std: float,
    decay: float,
    input_min_percentage: float,
    fast_mode: bool,
    clips_gradient: bool,
    patches: Sequence[int] | None,
    input_shape: Sequence[int],
    bias_dtype: torch.dtype | None,
    needs_input: bool,
    needs_weight: bool,
) -> list[Tensor]:
    """Gradients of the input (of ``input_shape``) and of a static range, where ``needs_input``; of the weight, of the bias if
    it has a dtype and of a clip, where ``needs_weight``. Without ``clips_gradient`` the input's is that of the converted input,
    and the range has none. ``x`` is the forward's input or what was kept of it; ``input_range`` is ``[S]`` or, dynamic,
    ``[S, M]``."""
    unfolded = patches is not None and x.dtype != torch.int8
    rows = Patches.of(patches).unfold(x) if patches is not None and unfolded else x
    static = input_range if clips_gradient and input_range is not None and input_range.ndim == 1 else None
    w = tile_weight
    if needs_input and w is None:
        w, _ = tiles(
            weight,
            slices,
            clip,
            weight_quantization,
            weight_res,
            weight_noise,
            weight_noise_std,
            weight_seed,
            grad.dtype,
            slice_wmax,
        )
    if needs_input and needs_weight:
        assert w is not None
        dx, drange, dw, dbias = matmul_backward(
            grad, w, rows, input_range, slices, mask, clipped=clipped, decay=decay,
            input_min_percentage=input_min_percentage, fast_mode=fast_mode, inp_res=inp_res, dtype=weight.dtype,
            bias_dtype=bias_dtype, inp_noise=inp_noise, inp_sto_round=inp_sto_round, seed=seed, clips_gradient=clips_gradient,
        )  # fmt: skip
    elif needs_input:
        assert w is not None
        dx, drange, _ = matmul_dgrad(
            grad, w, rows, static, slices, mask, clipped=clipped, decay=decay,
            input_min_percentage=input_min_percentage, fast_mode=fast_mode,
        )  # fmt: skip
    elif needs_weight:
        dw, dbias = matmul_wgrad(
            grad, rows, input_range, slices, mask, inp_res=inp_res, dtype=weight.dtype, converted=x.dtype == torch.int8,
            bias_dtype=bias_dtype, inp_noise=inp_noise, inp_sto_round=inp_sto_round, seed=seed,
        )  # fmt: skip
    results = []
    if needs_input:
        results.append(dx if patches is None else Patches.of(patches).fold(dx, input_shape))
    if needs_input and static is not None:
        results.append(drange)
    if needs_weight and clip is not None:
        dw, dclip = weight_grad(dw, weight, clip, slices, quantization=weight_quantization, res=weight_res)
    if needs_weight:
        results.append(dw)
    if needs_weight and bias_dtype is not None:
        results.append(dbias)
    if needs_weight and clip is not None:
        results.append(dclip.to(clip.dtype))
    return results
