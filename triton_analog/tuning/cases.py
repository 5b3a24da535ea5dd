"""For every operation that can be tuned: a call of it on made-up operands, as a problem describes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import triton_analog.ops as ops
from triton_analog.launch.space import Problem, Space
from triton_analog.reference.adc import mask_shape

Call = Callable[[], Any]
"""Runs the operation once; what it returns is what a candidate is checked by."""

SATURATED_WORDS = 100_003
"""Every so many words of a saturation mask one has a bit: saturation is rare."""


@dataclass(frozen=True)
class Operands:
    """Makes operands on a device: normal numbers, or memory as it comes where nothing will read it."""

    dtype: torch.dtype
    device: torch.device
    filled: bool

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        make = torch.randn if self.filled else torch.empty
        return make(*shape, device=self.device, dtype=dtype or self.dtype)

    def full(self, *shape: int, value: float) -> Tensor:
        return torch.full(shape, value, device=self.device)

    def steps(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Numbers of a converter's steps."""
        if not self.filled:
            return torch.empty(*shape, device=self.device, dtype=dtype)
        return torch.randint(-127, 128, shape, device=self.device).to(dtype)

    def seed(self) -> Tensor:
        return torch.tensor([20_001], device=self.device)

    def mask(self, slices: int, rows: int, columns: int) -> Tensor:
        make = torch.zeros if self.filled else torch.empty
        mask = make(mask_shape(slices, rows, columns), device=self.device, dtype=torch.int32)
        if self.filled:
            mask.view(-1)[::SATURATED_WORDS] = 1
        return mask


def slices_for(width: int) -> int:
    """As many as make 4096 features, up to 8."""
    return max(1, min(8, 4096 // width))


def features_for(width: int, even: bool) -> tuple[int, int]:
    """Features and slices of ``width`` columns; if not ``even``, no multiple of 16 features, and one slice narrower if need
    be."""
    slices = slices_for(width)
    if even or width * slices % 16:
        return width * slices, slices
    slices = max(2, slices)
    return width * slices - 1, slices


def _rows_of(new: Operands, p: Problem) -> tuple[Tensor, int]:
    """Rows to read, wide loads possible or not, and slices."""
    (rows, width), (wide_loads,) = p.sizes, p.flags
    features, slices = features_for(width, wide_loads)
    return new.normal(rows, features), slices


def _absmax(new: Operands, p: Problem) -> Call:
    x, slices = _rows_of(new, p)
    return lambda: ops.absmax(x, slices)


def _adc(new: Operands, p: Problem) -> Call:
    (rows, columns), (noise, bound) = p.sizes, p.flags
    y, r, wmax, seed = new.normal(rows, columns), new.full(1, value=3.0), new.full(columns, value=0.3), new.seed()
    options: dict[str, Any] = {"out_noise": 0.04, "noise_wmax": wmax, "seed": seed} if noise else {}
    options |= {"out_bound": 4.0, "bound_wmax": wmax, "out_res": 254} if bound else {}
    return lambda: ops.adc(y, r, **options)


def _adc_grad(new: Operands, p: Problem) -> Call:
    grad, mask = new.normal(*p.sizes), new.mask(1, *p.sizes)
    return lambda: ops.adc_grad(grad, mask)


def _input(new: Operands, rows: int, width: int) -> tuple[Tensor, Tensor, int]:
    slices = slices_for(width)
    return new.normal(rows, width * slices), new.full(slices, value=3.0), slices


def _dac(new: Operands, p: Problem) -> Call:
    (rows, width), (dynamic,) = p.sizes, p.flags
    x, r, slices = _input(new, rows, width)
    r = new.full(slices, rows, value=3.0) if dynamic else r
    return lambda: ops.dac(x, r, slices, 254)


def _dac_steps(new: Operands, p: Problem) -> Call:
    x, r = new.normal(*p.sizes), new.full(1, value=3.0)
    return lambda: ops.dac_steps(x, r, 1, 254)


def _extrema(new: Operands, p: Problem) -> Call:
    x, slices = _rows_of(new, p)
    return lambda: ops.extrema(x, slices)


def _input_range_grad(new: Operands, p: Problem) -> Call:
    x, r, slices = _input(new, *p.sizes)
    grad = torch.empty_like(x) if not new.filled else torch.randn_like(x)
    return lambda: ops.input_range_grad(grad, x, r, slices)


def _matmul(new: Operands, p: Problem) -> Call:
    (rows, columns, width), (per_slice, noise, dynamic) = p.sizes, p.flags
    int8, slices = p.dtype == torch.int8, slices_for(width)
    inputs = torch.bfloat16 if int8 else p.dtype
    x = new.normal(rows, width * slices, dtype=inputs)
    shape = columns, width * slices
    weight = new.steps(*shape, dtype=p.dtype) if int8 else new.normal(*shape)
    if new.filled and not int8:
        weight /= 64
    r = new.full(slices, rows, value=3.0) if dynamic else new.full(slices, value=3.0)
    wmax, seed = new.full(slices, columns, value=0.05), new.seed()
    options: dict[str, Any] = {"out_noise": 0.04, "noise_wmax": wmax, "seed": seed} if noise else {}
    options |= {"weight_wmax": wmax, "weight_res": 254} if int8 else {}
    options |= {"out_bound": 10.0, "bound_wmax": wmax, "out_res": 254} if per_slice and not int8 else {}

    @torch.no_grad()
    def call() -> Any:
        return ops.matmul(x, weight, None, input_range=r, slices=slices, inp_res=254, **options)

    return call


def _matmul_dgrad(new: Operands, p: Problem) -> Call:
    (rows, columns, width), (ranged,) = p.sizes, p.flags
    slices = slices_for(width) if ranged else 1  # otherwise they make no difference
    x, r = new.normal(rows, width * slices), new.full(slices, value=3.0)
    grad, weight = new.normal(rows, columns), new.normal(columns, width * slices)
    options: dict[str, Any] = {"inp_res": 254, "needs_steps": True} if ranged else {}
    return lambda: ops.matmul_dgrad(grad, weight, x, r if ranged else None, slices, **options)


def _matmul_wgrad(new: Operands, p: Problem) -> Call:
    rows, columns, width = p.sizes
    slices = slices_for(width)
    x, r = new.steps(rows, width * slices, dtype=p.dtype), new.full(slices, value=3.0)
    grad = new.normal(rows, columns)
    return lambda: ops.matmul_wgrad(grad, x, r, slices, inp_res=254, dtype=p.dtype, converted=True)


def _noise(new: Operands, p: Problem) -> Call:
    seed, (rows, columns) = new.seed(), p.sizes
    return lambda: ops.noise(seed, rows, columns)


def _std(new: Operands, p: Problem) -> Call:
    x, _, slices = _input(new, *p.sizes)
    return lambda: ops.std(x, slices)


def _weight(new: Operands, p: Problem) -> Call:
    (rows, width), (noise, aligned) = p.sizes, p.flags
    # The launcher adds what a slice's first tile may reach before it.
    features, slices = features_for(width - (0 if aligned else 15), aligned)
    weight, seed = new.normal(rows, features), new.seed()
    options: dict[str, Any] = {"noise_type": "per_channel", "std_dev": 0.02, "seed": seed} if noise else {}

    @torch.no_grad()
    def call() -> Any:
        return ops.weight(weight, slices, quantization="per_channel", res=254, **options)

    return call


def _weight_grad(new: Operands, p: Problem) -> Call:
    weight, _, slices = _input(new, *p.sizes)
    grad, clip = new.normal(*weight.shape), new.full(slices, p.sizes[0], value=2.0)
    return lambda: ops.weight_grad(grad, weight, clip, slices, quantization="per_channel", res=254)


_BUILDERS: dict[str, Callable[[Operands, Problem], Call]] = {
    "absmax": _absmax,
    "adc": _adc,
    "adc_grad": _adc_grad,
    "dac": _dac,
    "dac_steps": _dac_steps,
    "extrema": _extrema,
    "input_range_grad": _input_range_grad,
    "matmul": _matmul,
    "matmul_dgrad": _matmul_dgrad,
    "matmul_wgrad": _matmul_wgrad,
    "noise": _noise,
    "std": _std,
    "weight": _weight,
    "weight_grad": _weight_grad,
}


def call_of(space: Space[Any], problem: Problem, device: torch.device, *, filled: bool = True) -> Call:
    """The operation of ``space`` on operands as ``problem`` describes them.

    Args:
        filled: With numbers. Without, for launches that are only recorded, no memory is touched.
    """
    return _BUILDERS[space.op](Operands(problem.dtype, device, filled), problem)
