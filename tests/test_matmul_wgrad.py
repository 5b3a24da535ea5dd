"""SEMANTICS 6: gradient of the product in its weight (and bias)."""

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
    product_formula,
    product_grad_formula,
    randn,
    seed_of,
    tensor,
    viewed,
)

from triton_analog import ops
from triton_analog.ops.matmul_wgrad import MatmulWgradConfig, launch_matmul_wgrad

SHAPES = [(1, 1, 1, 1), (5, 7, 3, 3), (33, 16, 127, 1), (17, 23, 258, 2), (1, 9, 40, 7), (19, 37, 257, 3)]
CONFIGS = [MatmulWgradConfig(16, 16, 16), MatmulWgradConfig(64, 32, 32), MatmulWgradConfig(32, 64, 128)]


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
    assert_accurate(dw, formula(grad.double(), x_q, slices, flags), plain.to(dw.dtype))


@all_dtypes
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("kind", "res"), [("none", -1), ("static", -1), ("static", 254), ("dynamic", 1 / 254)])
@pytest.mark.parametrize(("rows", "columns", "features", "slices"), SHAPES)
def test_gradient(rows, columns, features, slices, kind, res, masked, dtype, backend, device):
    grad, x, r = operands(rows, columns, features, slices, kind, res, device, dtype)
    flags, mask = random_mask(slices, rows, columns, device) if masked else (None, None)
    dw = ops.matmul_wgrad(grad, x, r, slices, mask, inp_res=res)
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
    dw = ops.matmul_wgrad(grad, x, r, 1, inp_res=254, dtype=torch.float32)
    assert dw.dtype == torch.float32
    assert_gradient(dw, grad, x, r, 1, 254)


@all_views
def test_any_memory_layout(view, backend, device):
    grad, x, r = operands(7, 23, 45, 2, "static", 254, device)
    _, mask = random_mask(2, 7, 23, device)
    expected = ops.matmul_wgrad(grad, x, r, 2, mask, inp_res=254)
    strided = viewed(r[:, None], "strided")[:, 0]
    actual = ops.matmul_wgrad(viewed(grad, view), viewed(x, view), strided, 2, mask, inp_res=254)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 23), (7, 1)])
def test_expanded_gradients(shape, backend, device):
    _, x, r = operands(7, 23, 45, 2, "static", 254, device)
    grad = randn(*shape, device=device).expand(7, 23)
    assert_gradient(ops.matmul_wgrad(grad, x, r, 2, inp_res=254), grad, x, r, 2, 254)


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("config", CONFIGS)
def test_any_blocks_are_right(config, kind, backend, device):
    grad, x, r = operands(35, 45, 100, 3, kind, 254, device)
    flags, mask = random_mask(3, 35, 45, device)
    dw = launch_matmul_wgrad(grad, x, r, 3, mask, 254, torch.float32, config)
    assert_gradient(dw, grad, x, r, 3, 254, flags)


def test_two_runs_give_the_same_bits(backend, device):
    grad, x, r = operands(150, 23, 45, 2, "static", 254, device)
    first, second = (ops.matmul_wgrad(grad, x, r, 2, inp_res=254) for _ in range(2))
    assert torch.equal(first, second)


def test_a_zero_range_has_no_gradient(backend, device):
    grad, x, _ = operands(7, 23, 45, 2, "none", -1, device)
    for res in (-1, 254):
        assert not ops.matmul_wgrad(grad, x, tensor([0.0, 0.0], device), 2, inp_res=res).any()


def test_an_empty_batch_has_no_gradient(backend, device):
    dw = ops.matmul_wgrad(torch.empty(0, 23, device=device), torch.empty(0, 45, device=device), None, 2)
    assert torch.equal(dw, torch.zeros(23, 45, device=device))
