"""For every operation: calls of it on made-up operands of a layer's shape, in what can be switched on.

A new operation is one more function here; its name is that of the operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import triton_analog.ops as ops
from triton_analog.reference import pack_bits, slice_widths
from triton_analog.testing.accuracy import near_tie
from triton_analog.tuning.cases import Operands

RES = 254


@dataclass(frozen=True)
class Shape:
    """Of a layer and its batch: ``rows`` inputs of ``features`` in ``slices``, and ``columns`` outputs."""

    rows: int
    columns: int
    features: int
    slices: int = 1

    def __str__(self) -> str:
        return f"{self.rows} x {self.features} ({self.slices}) -> {self.columns}"


@dataclass
class Case:
    """One call, and what its results may be off by beyond rounding."""

    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    step: float = 0.0
    """Of a converter behind the result: what a value at a tie may move by."""
    deviation: float = 0.0
    """Largest of the noise in the result."""
    terms: int = 16
    """Of the sums in the result."""
    sizes: tuple[float | None, ...] = ()
    """Per result the magnitudes behind sums whose terms cancel; None: the largest of the result."""


class Numbers(Operands):
    """Operands whose roundings have one right answer, as far as they are known before the operation."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device, filled=True)
        self.shape = shape

    def ranges(self) -> Tensor:
        """``[S]``, of either sign and exact in every dtype."""
        return torch.tensor([(0.75, -1.5, 2.0)[s % 3] for s in range(self.shape.slices)], device=self.device)

    def per_feature(self, per_slice: Tensor) -> Tensor:
        """``[S]`` as ``[K]``, ``[S, M]`` as ``[M, K]``."""
        widths = torch.tensor(slice_widths(self.shape.features, self.shape.slices), device=self.device)
        return per_slice.repeat_interleave(widths, 0).movedim(0, -1)

    def off_ties(self, x: Tensor, bound: Tensor) -> Tensor:
        """``x`` with 0 where a converter of 254 steps to ``bound`` meets a tie."""
        bound = bound.double().abs()
        return x.masked_fill(near_tie(torch.clamp(x.double(), -bound, bound) / (2 * bound / RES)), 0)

    def inputs(self, ranges: Tensor | None = None) -> Tensor:
        """``[M, K]``."""
        x = self.normal(self.shape.rows, self.shape.features)
        return x if ranges is None else self.off_ties(x, self.per_feature(ranges))

    def dynamic(self) -> tuple[Tensor, Tensor]:
        """Inputs and their own ranges ``[S, M]``."""
        x = self.normal(self.shape.rows, self.shape.features)
        ranges = ops.absmax(x, self.shape.slices)
        return self.off_ties(x, self.per_feature(ranges)), ranges

    def weights(self) -> Tensor:
        """``[N, K]``, so that outputs are about as large as inputs."""
        return self.normal(self.shape.columns, self.shape.features) / self.shape.features**0.5

    def grads(self) -> Tensor:
        """``[M, N]``."""
        return self.normal(self.shape.rows, self.shape.columns)

    def saturated(self) -> Tensor:
        """A mask in which a third of the outputs of every slice is marked."""
        shape = self.shape.slices, self.shape.rows, self.shape.columns
        return torch.stack([pack_bits(flags) for flags in torch.rand(shape, device=self.device) < 1 / 3])


Cases = list[Case]


def _absmax(new: Numbers) -> Cases:
    return [Case("", ops.absmax, (new.inputs(), new.shape.slices))]


def _adc(new: Numbers) -> Cases:
    scale, r, seed = 0.3 + torch.rand(new.shape.columns, device=new.device), new.full(1, value=1.5), new.seed()
    bound = {"out_bound": 2.0, "bound_wmax": scale}
    y, largest = new.grads(), scale.max().item()
    noise = {"out_noise": 0.1, "noise_wmax": scale, "seed": seed}
    step = 2 * 2.0 * 1.5 * largest / RES
    return [
        Case("bound", ops.adc, (y, r), bound),
        Case("adc", ops.adc, (new.off_ties(y, 3 * scale), r), {**bound, "out_res": RES}, step=step),
        Case("noise", ops.adc, (y, r), noise, deviation=0.15 * largest),
        Case("noise+adc", ops.adc, (y, r), {**bound, **noise, "out_res": RES}, step=step, deviation=0.15 * largest),
    ]


def _adc_grad(new: Numbers) -> Cases:
    return [Case("", ops.adc_grad, (new.grads(), new.saturated()))]


def _clip(new: Numbers) -> Cases:
    weights = [new.weights(), new.weights() + 0.2]
    labels = {"whole": None, "rows": 0, "columns": 1}
    return [Case(label, ops.clip, (weights, [1.0, 2.0], dim)) for label, dim in labels.items()]


def _dac(new: Numbers) -> Cases:
    r, slices = new.ranges(), new.shape.slices
    x, (own, dynamic) = new.inputs(r), new.dynamic()
    noise = {"inp_noise": 0.1, "seed": new.seed()}
    step, largest = 2 * 2.0 / RES, dynamic.max().item()
    return [
        Case("clamp", ops.dac, (x, r, slices)),
        Case("dac", ops.dac, (x, r, slices, RES), step=step),
        Case("dynamic", ops.dac, (own, dynamic, slices, RES), step=2 * largest / RES),
        Case("noise", ops.dac, (x, r, slices, RES), noise, step=step, deviation=0.2),
        Case("rounded at random", ops.dac, (x, r, slices, RES), {"inp_sto_round": True, "seed": new.seed()}, step=step),
    ]


def _dac_steps(new: Numbers) -> Cases:
    r, slices = new.ranges(), new.shape.slices
    own, dynamic = new.dynamic()
    return [
        Case("static", ops.dac_steps, (new.inputs(r), r, slices, RES), step=1),
        Case("dynamic", ops.dac_steps, (own, dynamic, slices, RES), step=1),
    ]


def _extrema(new: Numbers) -> Cases:
    return [Case("", ops.extrema, (new.inputs(), new.shape.slices))]


def _input_range_grad(new: Numbers) -> Cases:
    x, grad = new.inputs(), new.inputs()
    size = grad.double().abs().sum().item() / new.shape.slices
    given = grad, x, new.ranges(), new.shape.slices
    return [
        Case("", ops.input_range_grad, given, {"decay": 0.1}, sizes=(None, size)),
        Case("fast", ops.input_range_grad, given, {"fast_mode": True}, sizes=(None, size)),
    ]


def _startup(new: Numbers) -> tuple[Tensor, Tensor]:
    """Ranges and counters, of which every third is at its end."""
    counts = torch.tensor([(3, 0, 100)[s % 3] for s in range(new.shape.slices)], device=new.device)
    return new.ranges(), counts


def _input_range_learn(new: Numbers) -> Cases:
    r, count = _startup(new)
    options = {"init_from_data": 100, "init_std_alpha": 3.0}
    given = new.inputs(), r, count, torch.zeros_like(r), new.shape.slices
    return [Case("", ops.input_range_learn, given, options)]


def _input_range_update(new: Numbers) -> Cases:
    r, count = _startup(new)
    given = r, count, torch.zeros_like(r), ops.moments(new.inputs(), new.shape.slices)
    return [Case("", ops.input_range_update, given, {"init_from_data": 100, "init_std_alpha": 3.0})]


def _input_range_update_fast(new: Numbers) -> Cases:
    r, count = _startup(new)
    given = r, count, -r.abs(), r.abs(), ops.extrema(new.inputs(), new.shape.slices)
    return [Case("", ops.input_range_update_fast, given, {"init_from_data": 100, "momentum": 0.9})]


def _matmul(new: Numbers) -> Cases:
    slices, terms = new.shape.slices, new.shape.features
    r, weight, bias, seed = new.ranges(), new.weights(), new.normal(new.shape.columns), new.seed()
    x, (own, dynamic) = new.inputs(r), new.dynamic()
    wmax = ops.absmax(weight, slices)
    integers, scales = ops.weight(weight, slices, quantization="per_channel", res=RES, dtype=torch.int8)
    largest = wmax.max().item()
    dac = {"slices": slices, "inp_res": RES}
    noise = {"out_noise": 0.1, "noise_wmax": wmax, "seed": seed}
    adc = {"out_bound": 8.0, "bound_wmax": wmax, "out_res": RES}
    deviation = 0.1 * 2.0 * largest
    step, own_step = (2 * 8.0 * bound * largest / RES for bound in (2.0, dynamic.max().item()))
    product = torch.no_grad()(ops.matmul)  # otherwise with a mask for the backward, which a tie may change

    def case(label: str, x: Tensor, w: Tensor, r: Tensor | None, options: dict[str, Any], **off: Any) -> Case:
        return Case(label, product, (x, w, bias, r), options, terms=terms, **off)

    return [
        case("plain", x, weight, None, {"slices": slices}),
        case("dac", x, weight, r, dac),
        case("dac+noise", x, weight, r, dac | noise, deviation=deviation),
        case("dac+noise+adc", x, weight, r, dac | noise | adc, deviation=deviation, step=step),
        case("dynamic+adc", own, weight, dynamic, dac | adc, step=own_step),
        case("int8", x, integers, r, dac | {"weight_wmax": scales, "weight_res": RES}),
    ]


def _gradients(new: Numbers) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[float, float, float]]:
    """``grad``, ``weight``, inputs often exactly at their range, ranges, and the magnitudes behind sums over outputs, over
    a slice's inputs, and over rows."""
    grad, weight, r = new.grads(), new.weights(), new.ranges()
    x = new.off_ties((4 * new.inputs()).round() / 4, new.per_feature(r))
    wide = grad.double().abs(), weight.double().abs(), x.double().abs()
    passed = wide[0] @ wide[1]
    sizes = passed.max().item(), passed.sum().item() / new.shape.slices, (wide[0].T @ wide[2]).max().item()
    return grad, weight, x, r, sizes


def _matmul_dgrad(new: Numbers) -> Cases:
    slices, terms = new.shape.slices, new.shape.columns
    grad, weight, x, r, (over_outputs, over_inputs, _) = _gradients(new)
    sizes, given = (over_outputs, over_inputs, None), (grad, weight, x, r, slices)
    steps = {"inp_res": RES, "needs_steps": True}
    return [
        Case("plain", ops.matmul_dgrad, (grad, weight, x, None, slices), terms=terms, sizes=(over_outputs,)),
        Case("range", ops.matmul_dgrad, given, {"decay": 0.1}, terms=terms, sizes=sizes),
        Case("range+mask", ops.matmul_dgrad, (*given, new.saturated()), steps, terms=terms, sizes=sizes),
    ]


def _matmul_wgrad(new: Numbers) -> Cases:
    slices, terms = new.shape.slices, new.shape.rows
    grad, _, x, r, (_, _, over_rows) = _gradients(new)
    bias, size = {"bias_dtype": new.dtype}, grad.double().abs().sum(0).max().item()
    return [
        Case("plain", ops.matmul_wgrad, (grad, x, None, slices), terms=terms, sizes=(over_rows,)),
        Case("dac", ops.matmul_wgrad, (grad, x, r, slices), {"inp_res": RES}, terms=terms, sizes=(over_rows,)),
        Case("dac+mask+bias", ops.matmul_wgrad, (grad, x, r, slices, new.saturated()), {"inp_res": RES, **bias},
             terms=terms, sizes=(over_rows, size)),
    ]  # fmt: skip


def _matmul_backward(new: Numbers) -> Cases:
    grad, weight, x, r, sizes = _gradients(new)
    given, options = (grad, weight, x, r, new.shape.slices, new.saturated()), {"inp_res": RES}
    return [Case("", ops.matmul_backward, given, options, terms=max(new.shape.columns, new.shape.rows), sizes=sizes)]


def _moments(new: Numbers) -> Cases:
    return [Case("", ops.moments, (new.inputs() + 0.5, new.shape.slices))]


def _noise(new: Numbers) -> Cases:
    options = {"stream": 5, "plane": 1}
    return [Case("", ops.noise, (new.seed(), new.shape.rows, new.shape.columns), options, deviation=1.0)]


def _program(new: Numbers) -> Cases:
    weight = new.weights()
    wmax = ops.absmax(weight, new.shape.slices)
    x = torch.linspace(0, 1, 64, device=new.device)
    curves = torch.stack([0.5 + x, 0.1 - 0.05 * x, 0.02 + 0.01 * x, 0.05 - 0.03 * x], 1)
    given, largest = (weight, wmax, new.seed(), curves), wmax.max().item()
    aged = {"log2_time": 3.0, "read": 1.0, "moment": 7}

    def program(weight: Tensor, wmax: Tensor, seed: Tensor, curves: Tensor, **options: Any) -> Tensor:
        return ops.program(weight, wmax, seed, curves.float(), **options)  # curves are fp32, whatever the weight is

    return [
        Case(cell, program, given, {"cell": cell, **aged}, deviation=largest) for cell in ("pair", "single", "signed")
    ]


def _std(new: Numbers) -> Cases:
    return [Case("", ops.std, (new.inputs() + 0.5, new.shape.slices))]


def _weight(new: Numbers) -> Cases:
    given, slices = new.weights(), new.shape.slices
    wmax = ops.absmax(given, slices)
    largest, step = wmax.max().item(), 2 * wmax.max().item() / RES
    own = new.off_ties(given, new.per_feature(wmax))
    shared = new.off_ties(given, new.per_feature(wmax.amax(1)))
    clip = 0.5 * wmax
    noise = {"noise_type": "per_channel", "std_dev": 0.1, "seed": new.seed()}
    weight = torch.no_grad()(ops.weight)

    def per(kind: str) -> dict[str, Any]:
        return {"quantization": kind, "res": RES}

    return [
        Case("noise", weight, (given, slices), noise, deviation=0.1 * largest),
        Case("clip", weight, (given, slices), {"clip": clip}),
        Case("per channel", weight, (own, slices), per("per_channel"), step=step),
        Case("per tensor", weight, (shared, slices), per("per_tensor"), step=step),
        Case("per channel+noise", weight, (own, slices), per("per_channel") | noise, step=step, deviation=0.1 * largest),
        Case("int8", weight, (own, slices), per("per_channel") | {"dtype": torch.int8}, step=1),
    ]  # fmt: skip


def _weight_grad(new: Numbers) -> Cases:
    weight, grad = new.weights(), new.normal(new.shape.columns, new.shape.features)
    clip = 0.5 * ops.absmax(weight, new.shape.slices)
    size = RES * grad.double().abs().sum(1).max().item() / (RES / 2 * weight.numel() / new.shape.slices) ** 0.5
    given = grad, new.off_ties(weight, new.per_feature(clip)), clip, new.shape.slices
    options = {"quantization": "per_channel", "res": RES}
    return [
        Case("clip", ops.weight_grad, given, sizes=(None, size)),
        Case("clip+quantize", ops.weight_grad, given, options, sizes=(None, size)),
    ]


_MAKERS: dict[str, Callable[[Numbers], Cases]] = {
    "absmax": _absmax,
    "adc": _adc,
    "adc_grad": _adc_grad,
    "clip": _clip,
    "dac": _dac,
    "dac_steps": _dac_steps,
    "extrema": _extrema,
    "input_range_grad": _input_range_grad,
    "input_range_learn": _input_range_learn,
    "input_range_update": _input_range_update,
    "input_range_update_fast": _input_range_update_fast,
    "matmul": _matmul,
    "matmul_backward": _matmul_backward,
    "matmul_dgrad": _matmul_dgrad,
    "matmul_wgrad": _matmul_wgrad,
    "moments": _moments,
    "noise": _noise,
    "program": _program,
    "std": _std,
    "weight": _weight,
    "weight_grad": _weight_grad,
}
OPERATIONS = tuple(_MAKERS)


def cases(op: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Cases:
    """Calls of ``op``; which numbers they have is torch's generators' to say."""
    return _MAKERS[op](Numbers(shape, dtype, device))
