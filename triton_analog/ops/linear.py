"""The analog layer as two operations, its forward and its backward: all launches of each in one plan (SEMANTICS 3 to 6).

The forward keeps the input, the stored weight, the ranges, the seed and, with an output converter, one bit per product and
slice. The backward makes the noisy weight anew from its seed, and a convolution's patches from the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import triton_analog.reference as reference
from triton_analog.ops import _checks as check
from triton_analog.ops._operator import Operator
from triton_analog.ops.absmax import launch_absmax
from triton_analog.ops.dac import launch_dac_steps
from triton_analog.ops.input_range import empty_range_grad
from triton_analog.ops.matmul import launch_matmul
from triton_analog.ops.matmul_backward import launch_matmul_backward
from triton_analog.ops.matmul_dgrad import launch_matmul_dgrad
from triton_analog.ops.matmul_wgrad import launch_matmul_wgrad
from triton_analog.ops.weight import launch_weight, launch_weight_grad
from triton_analog.reference import Patches, keeps_steps
from triton_analog.reference.grid import half_steps


def _launch_tiles(
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
    return launch_weight(weight, slices, clip, quantization, res, noise_type, std_dev, seed, dtype, slice_wmax)


def _is_integer_product(inp_res: float, quantization: str, res: float, noise_type: str, std_dev: float) -> bool:
    """Inputs and weights are steps of grids that int8 holds."""
    is_disturbed = noise_type != "none" and std_dev > 0
    return quantization != "none" and not is_disturbed and 0 < half_steps(res) <= 127 and 0 < half_steps(inp_res) <= 127


def launch_linear_forward(
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
    rows = x if patches is None else Patches.of(patches).unfold(x)
    w, wmax, int8 = tile_weight, tile_wmax, False
    if w is None:
        modifier = weight_quantization, weight_res, weight_noise, weight_noise_std
        int8 = not needs_grad and inp_noise <= 0 and _is_integer_product(inp_res, *modifier)
        kind = torch.int8 if int8 else x.dtype
        w, found = _launch_tiles(weight, slices, clip, *modifier, weight_seed, kind, slice_wmax)
        wmax = wmax if found is None else found
    if wmax is None and (out_noise > 0 or out_bound > 0):
        wmax = launch_absmax(weight, slices)

    def scale(wanted: bool, per_channel: bool) -> Tensor | None:
        if wmax is None or not wanted:
            return None
        if per_channel:
            return wmax
        return wmax.amax(1, keepdim=True) if slice_wmax is None else slice_wmax

    r = launch_absmax(rows, slices) if dynamic_range else input_range
    y, mask = launch_matmul(
        rows, w, bias, r, slices, inp_res, out_noise, scale(out_noise > 0, out_noise_per_channel), out_bound,
        scale(out_bound > 0, out_bound_per_channel), out_res, seed, scale(int8, weight_quantization == "per_channel"),
        weight_res, needs_grad, inp_noise, inp_sto_round,
    )  # fmt: skip
    results = [y]
    if out_bound > 0 and needs_grad:
        results.append(mask)
    if dynamic_range and needs_grad and r is not None:
        results.append(r)
    if r is not None and keeps_steps(save_input, needs_grad, x, rows.numel()):
        results += launch_dac_steps(rows, r, slices, inp_res, inp_sto_round, seed)
    return results


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    input_range: Tensor | None,
    slices: int,
    dynamic_range: bool,
    out_bound: float,
    save_input: str,
    patches: Sequence[int] | None,
    needs_grad: bool,
) -> list[Tensor]:
    N, K = weight.shape
    M = x.shape[0] if patches is None else Patches.of(patches).rows(x.shape)
    results = [x.new_empty(M, N)]
    if out_bound > 0 and needs_grad:
        results.append(x.new_empty(reference.mask_shape(slices, M, N), dtype=torch.int32))
    if dynamic_range and needs_grad:
        results.append(x.new_empty(slices, M, dtype=check.wide_dtype(x)))
    if keeps_steps(save_input, needs_grad, x, M * K):
        results.append(x.new_empty(M, K, dtype=torch.int8))
        results.append(x.new_empty(2, 0 if dynamic_range else M, (K + 7) // 8, dtype=torch.uint8))
    return results


linear_forward = Operator("linear_forward", launch_linear_forward, reference.linear_forward, _fake_forward)


def launch_linear_backward(
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
    rows = Patches.of(patches).unfold(x) if patches is not None and x.dtype != torch.int8 else x
    static = input_range if clips_gradient and input_range is not None and input_range.ndim == 1 else None
    rule, random = (decay, input_min_percentage, fast_mode), (inp_noise, inp_sto_round, seed)
    w = tile_weight
    if needs_input and w is None:
        modifier = weight_quantization, weight_res, weight_noise, weight_noise_std
        w, _ = _launch_tiles(weight, slices, clip, *modifier, weight_seed, grad.dtype, slice_wmax)
    if needs_input and needs_weight:
        assert w is not None
        dx, drange, dw, dbias = launch_matmul_backward(
            grad, w, rows, clipped, input_range, slices, mask, *rule, inp_res, weight.dtype, bias_dtype, *random,
            clips_gradient,
        )  # fmt: skip
    elif needs_input:
        assert w is not None
        dx, drange, _ = launch_matmul_dgrad(grad, w, rows, clipped, static, slices, mask, *rule)
    elif needs_weight:
        converted = x.dtype == torch.int8
        dw, dbias = launch_matmul_wgrad(
            grad, rows, input_range, slices, mask, inp_res, weight.dtype, converted, bias_dtype, *random
        )
    results = []
    if needs_input:
        results.append(dx if patches is None else Patches.of(patches).fold(dx, input_shape))
    if needs_input and static is not None:
        results.append(drange)
    if needs_weight and clip is not None:
        dw, dclip = launch_weight_grad(dw, weight, clip, slices, weight_quantization, weight_res)
    if needs_weight:
        results.append(dw)
    if needs_weight and bias_dtype is not None:
        results.append(dbias)
    if needs_weight and clip is not None:
        results.append(dclip.to(clip.dtype))
    return results


def _fake_backward(
    grad: Tensor,
    weight: Tensor,
    input_range: Tensor | None,
    clip: Tensor | None,
    decay: float,
    clips_gradient: bool,
    input_shape: Sequence[int],
    bias_dtype: torch.dtype | None,
    needs_input: bool,
    needs_weight: bool,
) -> list[Tensor]:
    results = []
    if needs_input:
        results.append(grad.new_empty(input_shape))
    if needs_input and clips_gradient and input_range is not None and input_range.ndim == 1:
        results.append(empty_range_grad(input_range, decay))
    if needs_weight:
        results.append(torch.empty_like(weight, memory_format=torch.contiguous_format))
    if needs_weight and bias_dtype is not None:
        results.append(grad.new_empty(len(weight), dtype=bias_dtype))
    if needs_weight and clip is not None:
        results.append(torch.empty_like(clip, memory_format=torch.contiguous_format))
    return results


linear_backward = Operator("linear_backward", launch_linear_backward, reference.linear_backward, _fake_backward)
