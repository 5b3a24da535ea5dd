"""SEMANTICS 6: gradients of the product in its input and its input range."""

import pytest
import torch
from helpers import (
    all_dtypes,
    all_views,
    assert_accurate,
    cut,
    off_ties,
    packed,
    product_formula,
    product_grad_formula,
    randn,
    range_grad_formula,
    seed_of,
    tensor,
    viewed,
)

from triton_analog import ops
from triton_analog.ops.matmul_dgrad import MatmulDgradConfig, launch_matmul_dgrad

SHAPES = [(1, 1, 1, 1), (5, 7, 3, 3), (33, 16, 127, 1), (17, 23, 258, 2), (1, 9, 40, 7), (19, 37, 257, 3)]
CONFIGS = [MatmulDgradConfig(16, 16, 16), MatmulDgradConfig(64, 32, 32), MatmulDgradConfig(32, 64, 128)]


def operands(rows, columns, features, device, dtype=torch.float32):
    """Gradient, weight and input; the input is exact in every dtype and often exactly at a range."""
    grad, weight = (
        randn(rows, columns, device=device, dtype=dtype),
        randn(columns, features, device=device, dtype=dtype),
    )
    x = (randn(rows, features, device=device) * 4).round() / 4
    return grad, weight, x.to(dtype)


def make_range(slices, device):
    return tensor([(0.75, -1.5, 2.0)[s % 3] for s in range(slices)], device)


def random_mask(slices, rows, columns, device):
    flags = randn(slices, rows, columns, device=device) > 0.5
    return flags, packed(flags)


def formula(grad, weight, x, r, slices, flags=None, **rule):
    """``dx`` and ``dr`` as SEMANTICS 6 writes them."""
    parts = []
    for s, w_s in enumerate(cut(weight, slices)):
        parts.append((grad if flags is None else grad.masked_fill(flags[s], 0)) @ w_s)
    raw = torch.cat(parts, dim=-1)
    return (raw, raw.new_empty(0)) if r is None else range_grad_formula(raw, x, r, slices, **rule)


def size_of_range_grad(grad, weight, x, slices):
    """The magnitudes that a slice's range gradient adds up."""
    return (grad.double().abs() @ weight.double().abs()).sum() / slices


def assert_gradients(actual, grad, weight, x, r, slices, flags=None, **rule):
    double_r = None if r is None else r.double()
    dx, dr = formula(grad.double(), weight.double(), x.double(), double_r, slices, flags, **rule)
    plain_dx, plain_dr = formula(grad.float(), weight.float(), x.float(), r, slices, flags, **rule)
    assert_accurate(actual[0], dx, plain_dx.to(x.dtype))
    assert_accurate(actual[1], dr, plain_dr, size=size_of_range_grad(grad, weight, x, slices))


@all_dtypes
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ranged", [False, True])
@pytest.mark.parametrize(("rows", "columns", "features", "slices"), SHAPES)
def test_gradients(rows, columns, features, slices, ranged, masked, dtype, backend, device):
    grad, weight, x = operands(rows, columns, features, device, dtype)
    r = make_range(slices, device) if ranged else None
    flags, mask = random_mask(slices, rows, columns, device) if masked else (None, None)
    actual = ops.matmul_dgrad(grad, weight, x, r, slices, mask)
    assert_gradients(actual, grad, weight, x, r, slices, flags)


@pytest.mark.parametrize(
    "rule",
    [{"decay": 0.5, "share": 0.3}, {"decay": 0.5, "share": 0.99}, {"fast": True}],
    ids=["decay", "decay not reached", "fast"],
)
def test_rules_of_the_range(rule, backend, device):
    grad, weight, x = operands(19, 37, 100, device)
    r = make_range(3, device)
    options = {"decay": rule.get("decay", 0.0), "input_min_percentage": rule.get("share", 0.95)}
    actual = ops.matmul_dgrad(grad, weight, x, r, 3, fast_mode=rule.get("fast", False), **options)
    assert_gradients(actual, grad, weight, x, r, 3, **rule)


@all_dtypes
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("out_res", [-1, 30])
def test_backward_of_the_product(out_res, noise, dtype, backend, device):
    """Against autograd through SEMANTICS 3, straight through the roundings; ties carry no gradient here."""
    _, weight, _ = operands(1, 37, 100, device, dtype)
    r = make_range(3, device)
    x = off_ties(randn(19, 100, device=device, dtype=dtype), r, 3, 254)
    wmax = ops.absmax(weight, 3)
    options = {"inp_res": 254, "out_noise": noise, "noise_wmax": wmax, "out_bound": 2.0, "bound_wmax": wmax}
    options |= {"out_res": out_res, "seed": seed_of(8, device)}
    wide = options | {"noise_wmax": wmax.double(), "bound_wmax": wmax.double()}
    double = (x.double(), weight.double(), None, r.double(), 3)
    _, flags, slack = product_formula(*double, **wide)
    grad = randn(19, 37, device=device, dtype=dtype).masked_fill(slack > 0, 0)
    leaf, range_leaf = x.clone().requires_grad_(), r.clone().requires_grad_()
    ops.matmul(leaf, weight, None, range_leaf, 3, **options)[0].backward(grad)
    assert flags.any()
    truth = product_grad_formula(grad.double(), *double, **wide)[0]
    plain = product_grad_formula(grad.float(), x.float(), weight.float(), None, r, 3, **options)[0]
    assert_accurate(leaf.grad, truth, plain.to(dtype))
    assert_gradients((leaf.grad, range_leaf.grad), grad, weight, x, r, 3, flags)


def test_a_dynamic_range_clips_nothing(backend, device):
    grad, weight, x = operands(19, 37, 100, device)
    leaf = x.clone().requires_grad_()
    ops.matmul(leaf, weight, None, ops.absmax(x, 3), 3, inp_res=254)[0].backward(grad)
    assert_accurate(leaf.grad, grad.double() @ weight.double(), grad @ weight)


def test_a_slice_does_not_see_the_others(backend, device):
    grad, weight, x = operands(19, 37, 30, device)
    r = make_range(3, device)
    changed = x.clone()
    changed[:, 10:] *= 10
    first, second = (ops.matmul_dgrad(grad, weight, each, r, 3)[1] for each in (x, changed))
    assert first[0] == second[0]
    assert (first[1:] != second[1:]).all()


@all_views
def test_any_memory_layout(view, backend, device):
    tensors = operands(7, 23, 45, device)
    _, mask = random_mask(2, 7, 23, device)
    r = make_range(2, device)
    expected = ops.matmul_dgrad(*tensors, r, 2, mask)
    actual = ops.matmul_dgrad(*(viewed(t, view) for t in tensors), viewed(r[:, None], "strided")[:, 0], 2, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 23), (7, 1)])
def test_expanded_gradients(shape, backend, device):
    _, weight, x = operands(7, 23, 45, device)
    grad = randn(*shape, device=device).expand(7, 23)
    r = make_range(2, device)
    assert_gradients(ops.matmul_dgrad(grad, weight, x, r, 2), grad, weight, x, r, 2)


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("config", CONFIGS)
def test_any_blocks_are_right(config, backend, device):
    grad, weight, x = operands(35, 45, 100, device)
    flags, mask = random_mask(3, 35, 45, device)
    r = make_range(3, device)
    actual = launch_matmul_dgrad(grad, weight, x, r, 3, mask, 0.0, 1.0, False, config)
    assert_gradients(actual, grad, weight, x, r, 3, flags)


def test_two_runs_give_the_same_bits(backend, device):
    grad, weight, x = operands(70, 23, 129, device)
    first, second = (ops.matmul_dgrad(grad, weight, x, make_range(2, device), 2) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_an_infinite_gradient_does_not_leak_through_saturation(backend, device):
    grad, weight, x = operands(7, 23, 45, device)
    grad[3, 5] = torch.inf
    flags = torch.zeros(2, 7, 23, dtype=torch.bool, device=device)
    flags[:, 3, 5] = True
    dx, _ = ops.matmul_dgrad(grad, weight, x, None, 2, packed(flags))
    assert dx.isfinite().all()


def test_an_empty_batch(backend, device):
    grad, weight, x = (torch.empty(*shape, device=device) for shape in ((0, 23), (23, 45), (0, 45)))
    dx, dr = ops.matmul_dgrad(grad, torch.zeros_like(weight), x, make_range(2, device), 2)
    assert dx.shape == (0, 45)
    assert not dr.any()
