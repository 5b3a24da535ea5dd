"""Both gradients of the analog matrix product, slice by slice (SEMANTICS 6).

The kernels are those of :mod:`matmul_dgrad` and :mod:`matmul_wgrad`. Where they do not apply the mask themselves, what a slice's
ADC lets pass of the gradient is made once, for a few slices at a time, and meets the weight and the input while it is there.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton_analog.reference as reference
from triton_analog.ops import _checks as check
from triton_analog.ops._gradients import multiply_passed
from triton_analog.ops._operator import Operator
from triton_analog.ops.input_range import empty_range_grad
from triton_analog.ops.matmul_dgrad import MatmulDgrad
from triton_analog.ops.matmul_wgrad import MatmulWgrad


def launch_matmul_backward(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    clipped: Tensor | None,
    input_range: Tensor | None,
    slices: int,
    mask: Tensor | None,
    decay: float,
    input_min_percentage: float,
    fast_mode: bool,
    inp_res: float,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    inp_noise: float = 0.0,
    inp_sto_round: bool = False,
    seed: Tensor | None = None,
    clips_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if input_range is None and mask is None:  # then slices make no difference
        slices = 1
    static = input_range if clips_gradient and input_range is not None and input_range.ndim == 1 else None
    is_random = inp_noise > 0 or (
        inp_sto_round and x.dtype != torch.int8
    )  # then the converter's own pass draws it again
    needs_steps = static is not None and inp_res > 0 and not is_random
    dgrad = MatmulDgrad(
        grad, weight, x, clipped, static, slices, mask, decay, input_min_percentage, fast_mode, inp_res, needs_steps
    )  # fmt: skip
    converted = needs_steps or x.dtype == torch.int8
    wgrad = MatmulWgrad(
        grad, dgrad.steps if needs_steps else x, input_range, slices, mask, inp_res, dtype, converted, bias_dtype,
        None, inp_noise, inp_sto_round, seed,
    )  # fmt: skip
    multiply_passed(grad, mask, slices, dgrad, wgrad)
    return dgrad.dx, dgrad.range_grad(), wgrad.dw, wgrad.dbias


def _fake(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    input_range: Tensor | None,
    decay: float,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    clips_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (M, K), N = x.shape, weight.shape[0]
    if clips_gradient and input_range is not None and input_range.ndim == 1:
        dr = empty_range_grad(input_range, decay)
    else:
        dr = grad.new_empty(0, dtype=check.wide_dtype(grad))
    dbias = grad.new_empty(0 if bias_dtype is None else N, dtype=bias_dtype or dtype)
    return grad.new_empty(M, K), dr, grad.new_empty(N, K, dtype=dtype), dbias


_matmul_backward = Operator("matmul_backward", launch_matmul_backward, reference.matmul_backward, _fake)


def matmul_backward(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    input_range: Tensor | None,
    slices: int,
    mask: Tensor | None = None,
    *,
    clipped: Tensor | None = None,
    decay: float = 0.0,
    input_min_percentage: float = 0.95,
    fast_mode: bool = False,
    inp_res: float = -1.0,
    dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
    inp_noise: float = 0.0,
    inp_sto_round: bool = False,
    seed: Tensor | None = None,
    clips_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`triton_analog.ops.matmul` in ``x [M, K]``, a static ``input_range [S]``, the weight ``[N, K]`` and the
    bias ``[N]``: those of :func:`triton_analog.ops.matmul_dgrad` and :func:`triton_analog.ops.matmul_wgrad`, with the
    saturation mask and the input converter applied once for both.

    Args:
        grad: Gradient ``[M, N]`` of the product, any strides.
        weight: ``[N, K]``, the weight of the forward.
        x: Inputs ``[M, K]`` of the forward, or what :func:`triton_analog.ops.dac_steps` kept of them (int8).
        input_range: ``[S]``, ``[S, M]`` or None, as in the forward. Only ``[S]`` has a gradient; otherwise it is empty.
        slices: Number of slices of the columns.
        mask: The forward's saturation mask, or what it lets pass of ``grad`` (:func:`triton_analog.ops.adc_grad`); None
            without a bound.
        clipped: The flags of :func:`triton_analog.ops.dac_steps`, needed with an int8 ``x`` and a range.
        decay: Pull of the range towards 0 where almost nothing clips; 0 is off.
        input_min_percentage: Share of unclipped inputs above which ``decay`` acts.
        fast_mode: The plain gradient of a clamp instead of the learned-range rule.
        inp_res: The input converter's resolution, as in the forward.
        dtype: Of the weight's gradient; default that of ``grad``.
        bias_dtype: Of the bias's gradient; None leaves it out (no elements).
        inp_noise, inp_sto_round, seed: As in the forward.
        clips_gradient: False leaves the input's gradient as it is behind the converter, where the range clips too, and the
            range's gradient empty: parts of a product add theirs up first, for :func:`triton_analog.ops.input_range_grad`.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.product_operands(x, weight, slices)
    check.product_grad(grad, x, weight.shape[0], slices, mask)
    check.same_dtype("grad", grad, weight=weight)
    check.range_kind(input_range, slices, x.shape[0])
    check.together("x", x, input_range=input_range, seed=seed)
    check.range_rule(decay, input_min_percentage)
    check.input_converter(inp_res, input_range, grad)
    check.random_input(inp_noise, inp_sto_round, inp_res, input_range, seed)
    if clips_gradient and input_range is not None and input_range.ndim == 1:
        check.clip_bits(x, clipped)
    check.require(
        x.dtype != torch.int8 or inp_res > 0,
        lambda: f"inp_res: got {inp_res}, but x holds steps; give the converter's resolution",
    )
    return _matmul_backward(
        grad, weight, x, clipped, input_range, slices, mask, decay, input_min_percentage, fast_mode, float(inp_res),
        dtype or grad.dtype, bias_dtype, inp_noise, inp_sto_round, seed, clips_gradient,
    )  # fmt: skip
