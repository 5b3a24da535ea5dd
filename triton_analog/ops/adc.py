"""The output stage of one slice: noise, rounding, bound (SEMANTICS 3, steps 5 and 6).

``v = y + out_noise * r * noise_wmax * z``, then ``round(v / step) * step`` clamped to ``+-bound`` with
``bound = out_bound * r * bound_wmax`` and ``step = bound / Q``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import triton_analog.reference as reference
from triton_analog.lang import OUTPUT_STREAM, cast, convert, load_seed, normal_tile, pack_bits
from triton_analog.launch import block, cdiv, launch
from triton_analog.launch.lookup import choose
from triton_analog.launch.space import POWERS, Problem, Space, tile_fits
from triton_analog.ops import _checks as check
from triton_analog.ops._operator import Operator
from triton_analog.ops._tiles import saturated, store_bits
from triton_analog.ops._transforms import Gradient
from triton_analog.reference.adc import mask_shape
from triton_analog.reference.grid import half_steps
from triton_analog.reference.noise import is_placed

PASSED_ELEMENTS = 2**27
"""Of the gradients that slices let pass, kept at one time (or one slice's): 256 MiB of bf16."""


@dataclass(frozen=True)
class AdcConfig:
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int = 4


def default_config(problem: Problem) -> AdcConfig:
    rows, columns = problem.sizes
    return AdcConfig(BLOCK_M=block(rows, 32), BLOCK_N=block(columns, 64, smallest=32))


def _fits(problem: Problem, config: AdcConfig) -> bool:
    return tile_fits(problem, config.BLOCK_M, config.BLOCK_N, least=512, most=8192, smallest=16)


_VALUES = {"BLOCK_M": POWERS[4:8], "BLOCK_N": POWERS[5:8], "num_warps": (4, 8)}
SPACE = Space(
    "adc", AdcConfig, sizes=("rows", "columns"), flags=("noise", "bound"), formula=default_config, fits=_fits, values=_VALUES
)  # fmt: skip


@triton.jit(do_not_specialize=["M", "plane"])
def adc_kernel(
    y_ptr, range_ptr, noise_wmax_ptr, bound_wmax_ptr, seed_ptr, out_ptr, mask_ptr,
    M, N, stride_m, stride_n, range_stride, noise_stride, bound_stride, out_noise, out_bound, q_max, plane,
    NOISE: tl.constexpr, PLACED: tl.constexpr, BOUND: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    first_n = tl.program_id(1).to(tl.int64) * BLOCK_N
    m = first_m + tl.arange(0, BLOCK_M)[:, None]
    n = first_n + tl.arange(0, BLOCK_N)[None, :]
    inside = (m < M) & (n < N)
    r = tl.abs(tl.load(range_ptr + m * range_stride, mask=m < M, other=0.0).to(tl.float32))
    v = tl.load(y_ptr + m * stride_m + n * stride_n, mask=inside, other=0.0).to(tl.float32)
    if NOISE:
        wmax = tl.load(noise_wmax_ptr + n * noise_stride, mask=n < N, other=0.0).to(tl.float32)
        seed, row, column, first_plane = load_seed(seed_ptr, PLACED)
        z = normal_tile(
            seed, row + first_m, column + first_n, first_plane + plane, OUTPUT_STREAM, BLOCK_M, BLOCK_N
        )  # fmt: skip
        v += (out_noise * r * wmax) * z
    if BOUND:
        wmax = tl.load(bound_wmax_ptr + n * bound_stride, mask=n < N, other=0.0).to(tl.float32)
        v, saturated = convert(v, out_bound * r * wmax, q_max, QUANTIZE)
        words = pack_bits(saturated & inside, BLOCK_M, BLOCK_N)
        store_bits(mask_ptr, words, 0, first_m, first_n, M, N, BLOCK_M, BLOCK_N)
    tl.store(out_ptr + m * N + n, cast(v, out_ptr.dtype.element_ty), mask=inside)


def launch_adc(
    y: Tensor,
    input_range: Tensor,
    out_noise: float,
    noise_wmax: Tensor | None,
    out_bound: float,
    bound_wmax: Tensor | None,
    out_res: float,
    seed: Tensor | None,
    plane: int,
    config: AdcConfig | None = None,
) -> tuple[Tensor, Tensor]:
    M, N = y.shape
    config = config or choose(SPACE, y.device, y.dtype, (M, N), (out_noise > 0, out_bound > 0))
    q_max = half_steps(out_res)
    out = torch.empty(M, N, dtype=y.dtype, device=y.device)
    mask = torch.empty(*mask_shape(1, M, N if out_bound > 0 else 0)[1:], dtype=torch.int32, device=y.device)
    columns = cdiv(N, 128) * 128 if out_bound > 0 else N  # whole words of the mask
    grid = (cdiv(M, config.BLOCK_M), cdiv(columns, config.BLOCK_N))
    strides = [0 if t is None or t.numel() == 1 else t.stride(0) for t in (input_range, noise_wmax, bound_wmax)]
    launch(
        adc_kernel, grid, y.device, y, input_range, noise_wmax, bound_wmax, seed, out, mask, M, N, *y.stride(), *strides,
        out_noise, out_bound, q_max, plane, NOISE=out_noise > 0, PLACED=is_placed(seed), BOUND=out_bound > 0,
        QUANTIZE=q_max > 0, **vars(config),
    )  # fmt: skip
    return out, mask


@triton.jit(do_not_specialize=["M"])
def adc_grad_kernel(
    grad_ptr, mask_ptr, out_ptr, M, N, S, stride_m, stride_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    first_n = tl.program_id(1).to(tl.int64) * BLOCK_N
    m = first_m + tl.arange(0, BLOCK_M)[:, None]
    n = first_n + tl.arange(0, BLOCK_N)[None, :]
    inside = (m < M) & (n < N)
    grad = tl.load(grad_ptr + m * stride_m + n * stride_n, mask=inside, other=0.0)
    address = out_ptr + m * N + n
    for s in range(S):
        passed = tl.where(saturated(mask_ptr, s, first_m, first_n, M, N, BLOCK_M, BLOCK_N), 0.0, grad)
        tl.store(address + M.to(tl.int64) * N * s, passed, mask=inside)


def default_grad_config(problem: Problem) -> AdcConfig:
    rows, columns = problem.sizes
    return AdcConfig(BLOCK_M=block(rows, 32), BLOCK_N=block(columns, 128, smallest=32))


GRAD_SPACE = Space(
    "adc_grad", AdcConfig, sizes=("rows", "columns"), formula=default_grad_config, fits=_fits, values=_VALUES
)


def launch_adc_grad(grad: Tensor, mask: Tensor, config: AdcConfig | None = None) -> Tensor:
    (M, N), S = grad.shape, mask.shape[0]
    config = config or choose(GRAD_SPACE, grad.device, grad.dtype, (M, N))
    out = torch.empty(S, M, N, dtype=grad.dtype, device=grad.device)
    grid = (cdiv(M, config.BLOCK_M), cdiv(N, config.BLOCK_N))
    launch(adc_grad_kernel, grid, grad.device, grad, mask, out, M, N, S, *grad.stride(), **vars(config))
    return out


def slices_at_once(elements: int) -> int:
    """For how many slices what passes of a gradient of so many ``elements`` may be kept at one time."""
    return max(1, PASSED_ELEMENTS // max(1, elements))


def each_passed(grad: Tensor, mask: Tensor | None, slices: int, *launches: Callable[[int, int, Tensor], None]) -> None:
    """Hand ``launches`` the first slice, the number of slices, and their gradients ``[count, M, N]``, until all had theirs.

    Without a mask one gradient ``[1, M, N]`` serves all slices. ``mask`` may also be what passes already.
    """
    if mask is None or mask.is_floating_point():
        for run in launches:
            run(0, slices, grad.unsqueeze(0) if mask is None else mask)
        return
    at_once = slices_at_once(grad.numel())
    for first in range(0, slices, at_once):
        part = mask[first : first + at_once]
        passed = launch_adc_grad(grad, part)
        for run in launches:
            run(first, len(part), passed)
        del passed  # before the next ones are made


def _fake_grad(grad: Tensor, mask: Tensor) -> Tensor:
    return grad.new_empty(mask.shape[0], *grad.shape)


_adc_grad = Operator("adc_grad", launch_adc_grad, reference.adc_grad, _fake_grad)


def adc_grad(grad: Tensor, mask: Tensor) -> Tensor:
    """``grad [M, N]`` where each slice's product did not saturate, elsewhere 0: ``[S, M, N]``, contiguous.

    Args:
        grad: Gradient of the output converter's result, any strides.
        mask: int32 ``[S, ceil(N / 128), M, 4]``: a product's saturation mask, or that of some of its slices.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes outside the above.
    """
    check.matrix("grad", grad)
    check.together("grad", grad, mask=mask)
    check.saturation_mask(mask, mask_shape(mask.shape[0] if mask.ndim == 4 else 1, *grad.shape))
    return _adc_grad(grad, mask)


def _fake(y: Tensor, out_bound: float) -> tuple[Tensor, Tensor]:
    M, N = y.shape
    mask = y.new_empty(mask_shape(1, M, N if out_bound > 0 else 0)[1:], dtype=torch.int32)
    return torch.empty_like(y, memory_format=torch.contiguous_format), mask


_adc = Operator("adc", launch_adc, reference.adc, _fake)


class _Adc(Gradient):
    NAME = "adc"

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _adc(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, mask = output
        ctx.save_for_backward(mask)
        ctx.bounded = inputs[4] > 0
        ctx.mark_non_differentiable(mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        if ctx.bounded:
            grad = _adc_grad(grad, mask.unsqueeze(0)).squeeze(0)
        return grad, *(None,) * 8


_adc.gradient = _Adc


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
) -> Tensor:
    """One slice's product ``y [M, N]`` as it leaves the tile: with noise, rounded, bounded; in the dtype of ``y``.

    Differentiable in ``y``: straight through the rounding, 0 where the bound acted. Range and scales are constants.

    Args:
        y: Products ``[M, N]`` of one slice, contiguous or not.
        input_range: The slice's range, ``[1]`` or ``[M]`` (dynamic); its absolute value is used.
        out_noise: Standard deviation of the noise in units of ``r * noise_wmax``; 0 is off. Divide by ``sqrt(S)`` yourself.
        noise_wmax: ``[N]`` or ``[1]``.
        out_bound: Bound in units of ``r * bound_wmax``; ``<= 0`` is off.
        bound_wmax: ``[N]`` or ``[1]``.
        out_res: Number of steps between the bounds (> 1) or its inverse; ``<= 0`` does not round. Needs a bound.
        seed: int64 tensor with one element, or of a part of the products (:func:`triton_analog.seeds.placed`); needed for noise.
        plane: The slice's index, which picks its field of noise.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.matrix("y", y)
    M, N = y.shape
    check.output_stage(input_range, out_noise, noise_wmax, out_bound, bound_wmax, out_res, seed)
    check.require(
        check.shape_of(input_range) in ((1,), (M,)),
        lambda: f"input_range: got shape {check.shape_of(input_range)}; allowed are (1,) and ({M},)",
    )
    for name, wmax in (("noise_wmax", noise_wmax), ("bound_wmax", bound_wmax)):
        if wmax is not None and check.shape_of(wmax) not in ((1,), (N,)):
            raise ValueError(f"{name}: got shape {check.shape_of(wmax)}; allowed are (1,) and ({N},)")
    check.together("y", y, input_range=input_range, noise_wmax=noise_wmax, bound_wmax=bound_wmax, seed=seed)
    check.require(0 <= plane < 2**31, lambda: f"plane: got {plane}; allowed are 0 to 2**31 - 1")
    return _adc(y, input_range, out_noise, noise_wmax, out_bound, bound_wmax, float(out_res), seed, plane)[0]
