"""SEMANTICS 6: gradient of the product in its weight (and bias)."""

from importlib import import_module
from itertools import product

import pytest
import torch
from helpers import (
    DTYPES,
    all_dtypes,
    all_views,
    assert_accurate,
    cut,
    dac_formula,
    off_ties,
    packed,
    padded_rows,
    product_formula,
    product_grad_formula,
    randn,
    seed_of,
    tensor,
    viewed,
)

from triton_analog import ops
from triton_analog.launch import describable, plan, slices_describable
from triton_analog.ops.matmul_wgrad import MatmulWgradConfig, launch_matmul_wgrad

SHAPES = [(1, 1, 1, 1), (5, 7, 3, 3), (33, 16, 127, 1), (17, 23, 258, 2), (1, 9, 40, 7), (19, 37, 257, 3)]
CONFIGS = {
    "small blocks": MatmulWgradConfig(16, 16, 16, DESCRIPTORS=False),
    "wide blocks": MatmulWgradConfig(64, 32, 128, GROUP_N=1, DESCRIPTORS=False),
    "high blocks": MatmulWgradConfig(32, 128, 32, DESCRIPTORS=False),
    "descriptors": MatmulWgradConfig(16, 32, 64, GROUP_N=2),
}


def make_range(kind, x, slices):
    if kind == "dynamic":
        return ops.absmax(x, slices)
    return None if kind == "none" else tensor([(0.75, -1.5, 2.0)[s % 3] for s in range(slices)], x.device)


def operands(rows, columns, features, slices, kind, res, device, dtype=torch.float32):
    """Gradient, input away from the converter's ties, and range."""
    x = randn(rows, features, device=device, dtype=dtype)
    r = make_range(kind, x, slices)
    return randn(rows, columns, device=device, dtype=dtype), off_ties(x, r, slices, res), r


def random_mask(slices, rows, columns, device):
    flags = randn(slices, rows, columns, device=device) > 0.5
    return flags, packed(flags)


def formula(grad, x_q, slices, flags=None):
    parts = []
    for s, part in enumerate(cut(x_q, slices)):
        parts.append((grad if flags is None else grad.masked_fill(flags[s], 0)).T @ part)
    return torch.cat(parts, dim=-1)


def assert_gradient(dw, grad, x, r, slices, res, flags=None):
    """Plain torch stores the converted input in the dtype of the input."""
    x_q = dac_formula(x.double(), None if r is None else r.double(), slices, res)
    plain = formula(grad.float(), dac_formula(x.float(), r, slices, res).to(x.dtype).float(), slices, flags)
    size = formula(grad.double(), x_q, slices).abs().max()
    assert_accurate(dw, formula(grad.double(), x_q, slices, flags), plain.to(dw.dtype), size=size, terms=len(grad))


@all_dtypes
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("kind", "res"), [("none", -1), ("static", -1), ("static", 254), ("dynamic", 1 / 254)])
@pytest.mark.parametrize(("rows", "columns", "features", "slices"), SHAPES)
def test_gradient(rows, columns, features, slices, kind, res, masked, dtype, backend, device):
    grad, x, r = operands(rows, columns, features, slices, kind, res, device, dtype)
    flags, mask = random_mask(slices, rows, columns, device) if masked else (None, None)
    dw, dbias = ops.matmul_wgrad(grad, x, r, slices, mask, inp_res=res)
    assert dbias.shape == (0,)
    assert_gradient(dw, grad, x, r, slices, res, flags)


@all_dtypes
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_backward_of_the_product(kind, dtype, backend, device):
    """Against autograd through SEMANTICS 3, straight through the roundings; ties carry no gradient here."""
    _, x, r = operands(19, 37, 100, 3, kind, 254, device, dtype)
    weight, bias = randn(37, 100, device=device, dtype=dtype), randn(37, device=device, dtype=dtype)
    wmax = ops.absmax(weight, 3)
    options = {"inp_res": 254, "out_noise": 0.1, "noise_wmax": wmax, "out_bound": 2.0, "bound_wmax": wmax}
    options |= {"out_res": 30, "seed": seed_of(8, device)}
    wide = options | {"noise_wmax": wmax.double(), "bound_wmax": wmax.double()}
    double = (x.double(), weight.double(), bias.double(), r.double(), 3)
    _, flags, slack = product_formula(*double, **wide)
    grad = randn(19, 37, device=device, dtype=dtype).masked_fill(slack > 0, 0)
    leaves = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    ops.matmul(x, *leaves, r, 3, **options)[0].backward(grad)
    assert flags.any()
    _, dw, db = product_grad_formula(grad.double(), *double, **wide)
    plain = (x.float(), weight.float(), bias.float(), r, 3)
    _, plain_dw, plain_db = product_grad_formula(grad.float(), *plain, storage=dtype, **options)
    assert_accurate(leaves[0].grad, dw, plain_dw.to(dtype))
    assert_accurate(leaves[1].grad, db, plain_db.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bfloat16", "float16"])
def test_the_gradient_of_an_fp32_master_weight(dtype, backend, device):
    grad, x, r = operands(200, 9, 33, 1, "static", 254, device, dtype)
    dw, _ = ops.matmul_wgrad(grad, x, r, 1, inp_res=254, dtype=torch.float32)
    assert dw.dtype == torch.float32
    assert_gradient(dw, grad, x, r, 1, 254)


@all_views
def test_any_memory_layout(view, backend, device):
    grad, x, r = operands(7, 23, 45, 2, "static", 254, device)
    _, mask = random_mask(2, 7, 23, device)
    options = {"inp_res": 254, "bias_dtype": torch.float32}
    expected = ops.matmul_wgrad(grad, x, r, 2, mask, **options)
    strided = viewed(r[:, None], "strided")[:, 0]
    actual = ops.matmul_wgrad(viewed(grad, view), viewed(x, view), strided, 2, mask, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 23), (7, 1)])
def test_expanded_gradients(shape, backend, device):
    _, x, r = operands(7, 23, 45, 2, "static", 254, device)
    grad = randn(*shape, device=device).expand(7, 23)
    dw, dbias = ops.matmul_wgrad(grad, x, r, 2, inp_res=254, bias_dtype=torch.float32)
    assert_gradient(dw, grad, x, r, 2, 254)
    assert_accurate(dbias, grad.double().sum(0), grad.sum(0), size=grad.abs().sum(0).max())


# ---- The bias ---------------------------------------------------------------------------------------------------------


@all_dtypes
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 127), (33, 129), (300, 16)])
def test_the_gradient_of_the_bias_is_the_sum_of_the_columns(rows, columns, dtype, backend, device):
    """In fp32, whatever the dtypes of gradient and bias, and whatever saturated."""
    grad, x, r = operands(rows, columns, 20, 2, "static", 254, device, dtype)
    flags, mask = random_mask(2, rows, columns, device)
    for bias_dtype in (dtype, torch.float32):
        dw, dbias = ops.matmul_wgrad(grad, x, r, 2, mask, inp_res=254, bias_dtype=bias_dtype)
        plain = grad.float().sum(0).to(bias_dtype)
        assert_accurate(dbias, grad.double().sum(0), plain, size=grad.double().abs().sum(0).max())
    assert_gradient(dw, grad, x, r, 2, 254, flags)


@all_views
def test_the_gradient_of_the_bias_in_any_memory_layout(view, backend, device):
    grad, x, _ = operands(37, 45, 8, 1, "none", -1, device)
    _, dbias = ops.matmul_wgrad(viewed(grad, view), x, None, 1, bias_dtype=torch.float32)
    assert_accurate(dbias, grad.double().sum(0), grad.sum(0), size=grad.abs().sum(0).max())


# ---- Steps in place of the input --------------------------------------------------------------------------------------


@all_dtypes
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize(("rows", "columns", "features", "slices"), [(19, 37, 100, 3), (1, 9, 40, 7)])
def test_steps_stand_for_the_input(rows, columns, features, slices, kind, dtype, backend, device):
    """To the last bit: those of ``dac_steps``, and those that ``matmul_dgrad`` leaves."""
    grad, x, r = operands(rows, columns, features, slices, kind, 254, device, dtype)
    if kind == "static":
        r[-1] = 0
    _, mask = random_mask(slices, rows, columns, device)
    options = {"inp_res": 254, "bias_dtype": torch.float32}
    expected = ops.matmul_wgrad(grad, x, r, slices, mask, **options)
    steps, _ = ops.dac_steps(x, r, slices, 254)
    sources = [steps]
    if kind == "static":
        weight = randn(columns, features, device=device, dtype=dtype)
        sources.append(ops.matmul_dgrad(grad, weight, x, r, slices, mask, inp_res=254, needs_steps=True)[2])
    for source in sources:
        dw, dbias = ops.matmul_wgrad(grad, source, r, slices, mask, **options, converted=True)
        assert torch.equal(dw, expected[0])
        assert torch.equal(dbias, expected[1])
    assert expected[0].any()


# ---- Blocks and masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_any_blocks_are_right(config, kind, backend, device):
    """Slices of 8 columns: blocks reach into the next slice."""
    grad, x, r = operands(35, 145, 24, 3, kind, 254, device)
    grad = padded_rows(grad)
    flags, mask = random_mask(3, 35, 145, device)
    sources = [(x, False)]
    if kind == "static":
        sources.append((padded_rows(ops.dac_steps(x, r, 3, 254)[0].float()), True))
        assert describable(grad, sources[-1][0])
        assert slices_describable(sources[-1][0], 3)
    passed = padded_rows(ops.adc_grad(grad, mask))
    assert describable(passed)
    for (source, converted), given in product(sources, (mask, passed)):
        options = {"bias_dtype": torch.float32, "config": config}
        dw, dbias = launch_matmul_wgrad(grad, source, r, 3, given, 254, torch.float32, converted, **options)
        assert_gradient(dw, grad, x, r, 3, 254, flags)
        assert_accurate(dbias, grad.double().sum(0), grad.sum(0), size=grad.abs().sum(0).max())


AWKWARD = [(1, 1, 4, 4), (1, 127, 9, 3), (3, 129, 34, 2), (17, 128, 381, 3), (1, 17, 258, 2), (5, 33, 256, 3)]
AWKWARD_FOR_DESCRIPTORS = [
    (3, 127, 1, 1),
    (1, 1, 3, 1),
    (2, 129, 17, 1),
    (3, 20, 129, 1),
    (1, 128, 24, 3),
    (5, 33, 256, 3),
]


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize(
    ("descriptors", "shape"),
    [
        *((False, shape) for shape in AWKWARD),
        *((True, shape) for shape in AWKWARD_FOR_DESCRIPTORS),
    ],
)
def test_awkward_widths(shape, descriptors, backend, device):
    """A block of the input then reaches into the next slice, or beyond the last column, where NaN lies."""
    rows, columns, features, slices = shape
    grad, x, r = operands(rows, columns, features, slices, "static", 254, device)
    steps = padded_rows(ops.dac_steps(x, r, slices, 254)[0].float())
    grad = padded_rows(grad)
    flags, mask = random_mask(slices, rows, columns, device)
    passed = padded_rows(ops.adc_grad(grad, mask))
    assert describable(grad, passed, steps)
    config = MatmulWgradConfig(16, 32, 64, DESCRIPTORS=descriptors)
    for given in (mask, passed):
        dw, _ = launch_matmul_wgrad(grad, steps, r, slices, given, 254, torch.float32, True, config=config)
        assert_gradient(dw, grad, x, r, slices, 254, flags)


def test_gradients_that_no_slice_lets_pass_leave_no_trace(backend, device):
    grad, x, r = operands(40, 150, 37, 2, "static", 254, device)
    flags = torch.zeros(2, 40, 150, dtype=torch.bool, device=device)
    flags[:, 17] = flags[:, :, 127] = flags[:, 16:32, 32:64] = True
    infinite = grad.masked_fill(flags[0], -torch.inf)
    dw, _ = ops.matmul_wgrad(infinite, x, r, 2, packed(flags), inp_res=254)
    assert_gradient(dw, grad, x, r, 2, 254, flags)


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_few_slices_at_a_time(at_once, backend, device, monkeypatch):
    """Where there is no memory for what all slices let pass. The bias's gradient is that of all."""
    grad, x, r = operands(35, 145, 37, 5, "static", 254, device)
    flags, mask = random_mask(5, 35, 145, device)
    options = {"inp_res": 254, "bias_dtype": torch.float32}
    expected = ops.matmul_wgrad(grad, x, r, 5, mask, **options)
    assert_gradient(expected[0], grad, x, r, 5, 254, flags)
    monkeypatch.setattr(import_module("triton_analog.ops.adc"), "PASSED_ELEMENTS", at_once * grad.numel())
    plan.forget()
    for actual, same in zip(ops.matmul_wgrad(grad, x, r, 5, mask, **options), expected, strict=True):
        assert torch.equal(actual, same)


@all_dtypes
def test_what_passes_stands_for_the_mask(dtype, backend, device):
    grad, x, r = operands(19, 37, 100, 3, "static", 254, device, dtype)
    flags, mask = random_mask(3, 19, 37, device)
    options = {"inp_res": 254, "bias_dtype": torch.float32}
    dw, dbias = ops.matmul_wgrad(grad, x, r, 3, mask, **options)
    dw_of_passed, dbias_of_passed = ops.matmul_wgrad(grad, x, r, 3, ops.adc_grad(grad, mask), **options)
    assert torch.equal(dbias_of_passed, dbias)
    assert_gradient(dw_of_passed, grad, x, r, 3, 254, flags)
    if backend == "kernel":  # the bits of torch's products may depend on where in memory each slice's part begins
        assert torch.equal(dw_of_passed, dw)


# ---- Edges ------------------------------------------------------------------------------------------------------------


def test_two_runs_give_the_same_bits(backend, device):
    grad, x, r = operands(150, 23, 45, 2, "static", 254, device)
    options = {"inp_res": 254, "bias_dtype": torch.float32}
    first, second = (ops.matmul_wgrad(grad, x, r, 2, **options) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_a_zero_range_has_no_gradient(backend, device):
    grad, x, _ = operands(7, 23, 45, 2, "none", -1, device)
    for res in (-1, 254):
        assert not ops.matmul_wgrad(grad, x, tensor([0.0, 0.0], device), 2, inp_res=res)[0].any()


def test_an_empty_batch_has_no_gradient(backend, device):
    grad, x = torch.empty(0, 23, device=device), torch.empty(0, 45, device=device)
    dw, dbias = ops.matmul_wgrad(grad, x, None, 2, bias_dtype=torch.float32)
    assert torch.equal(dw, torch.zeros(23, 45, device=device))
    assert torch.equal(dbias, torch.zeros(23, device=device))
