"""SEMANTICS 6: all gradients of the product at once are those that it has one by one."""

from importlib import import_module

import pytest
import torch
from helpers import all_dtypes, all_views, assert_equal_sums, packed, randn, tensor, viewed

from triton_analog import ops
from triton_analog.launch import plan

KINDS = ["none", "static", "dynamic"]
BIAS = {"dtype": torch.float32, "bias_dtype": torch.float32}


def operands(rows, columns, features, slices, kind, device, dtype=torch.float32):
    """Gradient, weight, input, and a range of the ``kind``."""
    grad = randn(rows, columns, device=device, dtype=dtype)
    weight = randn(columns, features, device=device, dtype=dtype)
    x = (randn(rows, features, device=device) * 4).round() / 4  # exact in every dtype and often exactly at a range
    ranges = {
        "none": None,
        "static": tensor([(0.75, -1.5, 2.0)[s % 3] for s in range(slices)], device),
        "dynamic": ops.absmax(x, slices),
    }
    return grad, weight, x.to(dtype), ranges[kind]


def random_mask(slices, rows, columns, device):
    return packed(randn(slices, rows, columns, device=device) > 0.5)


def one_by_one(grad, weight, x, r, slices, mask, *, inp_res, clipped=None, rule=None, **results):
    static = r if r is not None and r.ndim == 1 else None
    dx, dr, _ = ops.matmul_dgrad(grad, weight, x, static, slices, mask, clipped=clipped, **(rule or {}))
    converted = x.dtype == torch.int8
    return dx, dr, *ops.matmul_wgrad(grad, x, r, slices, mask, inp_res=inp_res, converted=converted, **results)


def assert_same(actual, expected):
    for name, one, other in zip(("dx", "dr", "dw", "dbias"), actual, expected, strict=True):
        assert one.dtype == other.dtype, name
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@all_dtypes
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns", "features", "slices"), [(1, 1, 1, 1), (17, 23, 258, 2), (19, 137, 100, 3)])
def test_gradients(rows, columns, features, slices, kind, masked, dtype, backend, device):
    tensors = operands(rows, columns, features, slices, kind, device, dtype)
    mask = random_mask(slices, rows, columns, device) if masked else None
    res = -1.0 if kind == "none" else 254.0
    actual = ops.matmul_backward(*tensors, slices, mask, inp_res=res, **BIAS)
    expected = one_by_one(*tensors, slices, mask, inp_res=res, **BIAS)
    if backend == "kernel" and kind == "dynamic" and not masked:  # without a range dgrad has no slices: other blocks
        assert_equal_sums(actual[0], expected[0], terms=columns)
        actual = expected[0], *actual[1:]
    assert_same(actual, expected)


@pytest.mark.parametrize(
    "rule",
    [{"decay": 0.5, "input_min_percentage": 0.3}, {"decay": 0.5, "input_min_percentage": 0.99}, {"fast_mode": True}],
    ids=["decay", "decay not reached", "fast"],
)
def test_rules_of_the_range(rule, backend, device):
    tensors, mask = operands(19, 37, 100, 3, "static", device), random_mask(3, 19, 37, device)
    actual = ops.matmul_backward(*tensors, 3, mask, inp_res=254, **rule)
    assert_same(actual, one_by_one(*tensors, 3, mask, inp_res=254, rule=rule))


def test_a_range_without_a_converter(backend, device):
    tensors, mask = operands(19, 37, 100, 3, "static", device), random_mask(3, 19, 37, device)
    assert_same(ops.matmul_backward(*tensors, 3, mask), one_by_one(*tensors, 3, mask, inp_res=-1))


@all_dtypes
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_steps_and_flags_stand_for_the_input(kind, dtype, backend, device):
    grad, weight, x, r = operands(19, 37, 100, 3, kind, device, dtype)
    mask = random_mask(3, 19, 37, device)
    steps, flags = ops.dac_steps(x, r, 3, 254)
    actual = ops.matmul_backward(grad, weight, steps, r, 3, mask, clipped=flags, inp_res=254, **BIAS)
    expected = one_by_one(grad, weight, steps, r, 3, mask, clipped=flags, inp_res=254, **BIAS)
    assert_same(actual, expected)


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_few_slices_at_a_time(at_once, backend, device, monkeypatch):
    """Where there is no memory for what all slices let pass, the bits are the same, and no gradient is masked twice."""
    adc = import_module("triton_analog.ops.adc")
    tensors, mask = operands(35, 145, 37, 5, "static", device), random_mask(5, 35, 145, device)
    expected = ops.matmul_backward(*tensors, 5, mask, inp_res=254, **BIAS)
    monkeypatch.setattr(adc, "PASSED_ELEMENTS", at_once * tensors[0].numel())
    plan.forget()
    masked, launch_adc_grad = [], adc.launch_adc_grad
    monkeypatch.setattr(adc, "launch_adc_grad", lambda g, part: masked.append(len(part)) or launch_adc_grad(g, part))
    assert_same(ops.matmul_backward(*tensors, 5, mask, inp_res=254, **BIAS), expected)
    assert masked == {1: [1] * 5, 2: [2, 2, 1], 3: [3, 2]}[at_once]


def test_what_passes_stands_for_the_mask(backend, device):
    tensors, mask = operands(19, 37, 100, 3, "static", device), random_mask(3, 19, 37, device)
    passed = ops.adc_grad(tensors[0], mask)
    actual = ops.matmul_backward(*tensors, 3, passed, inp_res=254, **BIAS)
    assert_same(actual, one_by_one(*tensors, 3, passed, inp_res=254, **BIAS))
    if backend == "kernel":  # the bits of torch's products may depend on where in memory each slice's part begins
        assert_same(actual, ops.matmul_backward(*tensors, 3, mask, inp_res=254, **BIAS))


@all_views
def test_any_memory_layout(view, backend, device):
    *tensors, r = operands(19, 37, 100, 2, "static", device)
    tensors = *(viewed(t, view) for t in tensors), viewed(r[:, None], "strided")[:, 0]
    mask = random_mask(2, 19, 37, device)
    actual = ops.matmul_backward(*tensors, 2, mask, inp_res=254, **BIAS)
    assert_same(actual, one_by_one(*tensors, 2, mask, inp_res=254, **BIAS))


def test_an_empty_batch(backend, device):
    grad, weight, x = (torch.empty(*shape, device=device) for shape in ((0, 23), (23, 45), (0, 45)))
    r = tensor([1.0, 2.0], device)
    dx, dr, dw, dbias = ops.matmul_backward(grad, torch.zeros_like(weight), x, r, 2, inp_res=254, **BIAS)
    assert dx.shape == (0, 45)
    assert torch.equal(dr, torch.zeros_like(r))
    assert torch.equal(dw, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros(23, device=device))
