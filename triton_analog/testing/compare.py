"""An operation's kernels against its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import triton_analog.launch as launch
from triton_analog.hints import did_you_mean
from triton_analog.testing.accuracy import LARGEST_NOISE_ERROR, NOISE_ERROR, allowed_error, may_flip
from triton_analog.testing.cases import OPERATIONS, Case, Shape, cases

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Comparison:
    """What one call of an operation differs from its reference by."""

    op: str
    variant: str
    dtype: torch.dtype
    shape: Shape
    error: float
    """Largest of a number of the results, in their unit; roundings decided the other way at a tie left out."""
    allowed: float
    """For that result."""
    wrong: str = ""
    """What is not as it has to be; empty if all is."""


def _each(given: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Arguments with every tensor in them changed."""
    if isinstance(given, Tensor):
        return change(given)
    return [_each(one, change) for one in given] if isinstance(given, list) else given


def _double(given: Any) -> Any:
    if isinstance(given, torch.dtype) and given.is_floating_point:
        return torch.float64
    return _each(given, lambda x: x.double() if x.is_floating_point() else x)


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [t for t in _flat(found) if t.numel() > 0]


def _flat(found: Any) -> list[Tensor]:
    """The tensors of lists and tuples in them."""
    if isinstance(found, Tensor):
        return [found]
    return [t for one in found for t in _flat(one)] if isinstance(found, (list, tuple)) else []


def _results(case: Case, change: Callable[[Any], Any]) -> list[Tensor]:
    """What the operation returns, or what it leaves in arguments that it changes in place; on the CPU. ``change`` copies."""
    given = [change(one) for one in case.arguments]
    found = case.function(*given, **{name: change(one) for name, one in case.options.items()})
    return [t.detach().cpu() for t in _tensors(given if found is None else found)]


def _copy(given: Any) -> Any:
    return _each(given, torch.clone)


def _differences(actual: Tensor, truth: Tensor) -> Tensor:
    """How far each number is off; of packed flags each."""
    if actual.dtype in (torch.int32, torch.uint8):
        bits = 1 << torch.arange(8, dtype=torch.uint8)
        return ((actual ^ truth).contiguous().view(torch.uint8)[..., None] & bits).ne(0).flatten().double()
    return (actual.double() - truth.double()).abs()


def _compare(actual: Tensor, truth: Tensor, plain: Tensor, size: float | None, case: Case) -> tuple[float, float, str]:
    """Error, allowed error, and what is wrong."""
    if (actual.shape, actual.dtype) != (plain.shape, plain.dtype):
        return torch.inf, 0.0, f"{actual.dtype} {list(actual.shape)} instead of {plain.dtype} {list(plain.shape)}"
    if not torch.equal(actual.isnan(), plain.isnan()):
        return torch.inf, 0.0, "NaN where the reference has none, or the other way round"
    if not actual.is_floating_point():
        off = _differences(actual, plain)
        flips, largest_off = int((off > 0).sum()), float(off.max())
        if flips > (may_flip(plain.numel()) if case.step else 0):
            return largest_off, 0.0, f"{flips} of {plain.numel()} integers differ"
        return (0.0, 0.0, "") if largest_off <= 1 else (largest_off, 1.0, "an integer is off by more than a step")
    error_of_plain = _differences(plain, truth).flatten().nan_to_num(nan=0.0)
    error = _differences(actual, truth).flatten().nan_to_num(nan=0.0)
    spared = may_flip(error.numel()) * ((case.step > 0) + (case.deviation > 0))
    kept = max(1, error.numel() - spared)  # the smallest ones; of a single number there is no other
    usual = float(error_of_plain.kthvalue(kept).values)
    largest = float(truth.nan_to_num(nan=0.0).abs().max()) if size is None else size
    limit = float(allowed_error(usual, largest, case.terms)) + NOISE_ERROR * case.deviation
    beyond = float(error.max())
    found = beyond if spared == 0 else float(error.kthvalue(kept).values)
    unit = torch.finfo(actual.dtype).eps * float(truth.nan_to_num(nan=0.0).abs().max())
    most = limit + unit + case.step * (1 + 2.0**-8) + LARGEST_NOISE_ERROR * case.deviation
    if found > limit:
        return found, limit, f"off by {found:.3g}, allowed are {limit:.3g}"
    return found, limit, "" if beyond <= most else f"a rounding is off by {beyond:.3g}, allowed are {most:.3g}"


def _comparison(op: str, case: Case, dtype: torch.dtype, shape: Shape) -> Comparison:
    with launch.backend("kernel"):
        actual = _results(case, _copy)
    with launch.backend("reference"):
        plain, truth = _results(case, _copy), _results(case, lambda one: _double(_copy(one)))
    sizes = (*case.sizes, *(None for _ in actual[len(case.sizes) :]))
    if len(actual) != len(plain):
        return Comparison(op, case.label, dtype, shape, torch.inf, 0.0, f"{len(actual)} results, not {len(plain)}")
    each = [_compare(*one, case) for one in zip(actual, truth, plain, sizes[: len(actual)], strict=True)]
    error, allowed, wrong = max(each, key=lambda one: (bool(one[2]), one[0] / one[1] if one[1] else one[0]))
    return Comparison(op, case.label, dtype, shape, error, allowed, wrong)


def compare(op: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Comparison]:
    """Every variant of ``op`` on made-up operands, the same ones in every run; torch's generators stay as they are."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)
        with launch.backend("reference"):
            made = cases(op, shape, dtype, torch.device("cpu"))
        for case in made:  # the same numbers on every device
            case.arguments = tuple(_each(one, lambda x: x.to(device)) for one in case.arguments)
            case.options = {name: _each(one, lambda x: x.to(device)) for name, one in case.options.items()}
        return [_comparison(op, case, dtype, shape) for case in made]


def assert_matches_reference(
    op: str,
    *,
    rows: int,
    columns: int,
    features: int,
    slices: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cuda",
) -> None:
    """The kernels of an operation compute what its reference does, on made-up operands of a layer's shape.

    Everything that can be switched on is tried. A result may be twice as far from the reference in fp64 as the reference in
    ``dtype`` is, plus two units in the last place of fp32 of its largest number (of the magnitudes behind it, where it is a sum);
    one of a thousand elements may be rounded the other way where a converter meets a tie.

    Args:
        op: A name of ``OPERATIONS``, that of a function of ``triton_analog.ops``.
        rows: Inputs, the batch; > 0.
        columns: Output features of the layer; > 0.
        features: Input features of the layer; > 0.
        slices: Tiles that these are cut into, ``1 .. features``.
        dtype: Of inputs, weights and gradients: fp32, bf16 or fp16.
        device: A GPU, or the CPU in Triton's interpreter (``TRITON_INTERPRET=1`` before the import).

    Raises:
        AssertionError: a variant does not; names each, with its error and the allowed one.
        ValueError: there is no such operation, shape or dtype.
        RuntimeError: kernels do not run on ``device``.
    """
    if op not in OPERATIONS:
        near = did_you_mean(str(op), OPERATIONS, "", lead="; ")
        raise ValueError(f"op: got {op!r}; allowed are {', '.join(OPERATIONS)}{near}")
    for name, size in (("rows", rows), ("columns", columns), ("features", features)):
        if size < 1:
            raise ValueError(f"{name}: got {size}; give a number above 0")
    if not 1 <= slices <= features:
        raise ValueError(f"slices: got {slices}; allowed are 1 to the {features} features")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}; allowed are {', '.join(map(str, DTYPES))}")
    found = compare(op, Shape(rows, columns, features, slices), dtype, torch.device(device))
    wrong = [f"{op} {one.variant}".rstrip() + f", {dtype}, {one.shape}: {one.wrong}" for one in found if one.wrong]
    if wrong:
        raise AssertionError("\n".join(wrong))
