"""SEMANTICS 6: gradients of the product in its input and its input range."""

from importlib import import_module

import pytest
import torch
from helpers import (
    all_dtypes,
    all_views,
    assert_accurate,
    cut,
    dac_steps,
    off_ties,
    packed,
    padded_rows,
    product_formula,
    product_grad_formula,
    randn,
    range_grad_formula,
    seed_of,
    tensor,
    viewed,
)

from triton_analog import ops
from triton_analog.launch import describable, plan, slices_describable
from triton_analog.ops.matmul_dgrad import MatmulDgradConfig, launch_matmul_dgrad

SHAPES = [(1, 1, 1, 1), (5, 7, 3, 3), (33, 16, 127, 1), (17, 23, 258, 2), (1, 9, 40, 7), (19, 37, 257, 3)]
CONFIGS = {
    "small blocks": MatmulDgradConfig(16, 16, 16, DESCRIPTORS=False),
    "wide blocks": MatmulDgradConfig(64, 32, 128, GROUP_M=1, DESCRIPTORS=False),
    "two parts": MatmulDgradConfig(32, 64, 32, PARTS=2, DESCRIPTORS=False),
    "four parts": MatmulDgradConfig(16, 128, 64, PARTS=4, DESCRIPTORS=False),
    "descriptors": MatmulDgradConfig(32, 16, 32, GROUP_M=2, PARTS=2),
}


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
    assert_accurate(
        actual[0], dx, plain_dx.to(x.dtype), size=(grad.double() @ weight.double()).abs().max(), terms=len(weight)
    )
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


def launched(grad, weight, x, r, slices, mask, config, clipped=None, **options):
    return launch_matmul_dgrad(
        grad, weight, x, clipped, r, slices, mask, 0.0, 1.0, False, **options, config=config
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_any_blocks_are_right(config, backend, device):
    """Slices of 8 columns: blocks reach into the next slice."""
    grad, weight, x = operands(35, 145, 24, device)
    grad, weight = padded_rows(grad), padded_rows(weight)
    flags, mask = random_mask(3, 35, 145, device)
    r, passed = make_range(3, device), padded_rows(ops.adc_grad(grad, mask))
    assert describable(grad, passed, weight)
    assert slices_describable(weight, 3)
    for given in (mask, passed):
        assert_gradients(launched(grad, weight, x, r, 3, given, config), grad, weight, x, r, 3, flags)
    assert_gradients(launched(grad, weight, x, None, 3, None, config), grad, weight, x, None, 1)


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
    """A block of the weight then reaches into the next slice, or beyond the last column, where NaN lies."""
    rows, columns, features, slices = shape
    grad, weight, x = operands(rows, columns, features, device)
    grad, weight, x = (padded_rows(t) for t in (grad, weight, x))
    flags, mask = random_mask(slices, rows, columns, device)
    r, passed = make_range(slices, device), padded_rows(ops.adc_grad(grad, mask))
    assert describable(grad, passed, weight)
    config = MatmulDgradConfig(16, 32, 64, PARTS=2, DESCRIPTORS=descriptors)
    for given in (mask, passed):
        assert_gradients(launched(grad, weight, x, r, slices, given, config), grad, weight, x, r, slices, flags)


# ---- What the slices let pass -----------------------------------------------------------------------------------------


def test_gradients_that_no_slice_lets_pass_leave_no_trace(backend, device):
    grad, weight, x = operands(40, 150, 37, device)
    flags = torch.zeros(2, 40, 150, dtype=torch.bool, device=device)
    flags[:, 17] = flags[:, :, 127] = flags[:, 16:32, 32:64] = True
    r, infinite = make_range(2, device), grad.masked_fill(flags[0], -torch.inf)
    assert_gradients(ops.matmul_dgrad(infinite, weight, x, r, 2, packed(flags)), grad, weight, x, r, 2, flags)


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("ranged", [False, True])
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_a_few_slices_at_a_time(at_once, ranged, backend, device, monkeypatch):
    """Where there is no memory for what all slices let pass."""
    grad, weight, x = operands(35, 145, 37, device)
    flags, mask = random_mask(5, 35, 145, device)
    r = make_range(5, device) if ranged else None
    options = {"inp_res": 254.0, "needs_steps": True} if ranged else {}
    expected = ops.matmul_dgrad(grad, weight, x, r, 5, mask, **options)
    assert_gradients(expected, grad, weight, x, r, 5, flags)
    monkeypatch.setattr(import_module("triton_analog.ops.adc"), "PASSED_ELEMENTS", at_once * grad.numel())
    plan.forget()
    for actual, same in zip(ops.matmul_dgrad(grad, weight, x, r, 5, mask, **options), expected, strict=True):
        assert torch.equal(actual, same)


@all_dtypes
def test_what_passes_stands_for_the_mask(dtype, backend, device):
    grad, weight, x = operands(19, 37, 100, device, dtype)
    flags, mask = random_mask(3, 19, 37, device)
    r, passed = make_range(3, device), ops.adc_grad(grad, mask)
    by_passed, by_mask = (ops.matmul_dgrad(grad, weight, x, r, 3, each) for each in (passed, mask))
    assert_gradients(by_passed, grad, weight, x, r, 3, flags)
    if backend == "kernel":  # the bits of torch's products may depend on where in memory each slice's part begins
        assert all(map(torch.equal, by_passed, by_mask))
    transposed = passed.transpose(0, 2).contiguous().transpose(0, 2)
    assert_gradients(ops.matmul_dgrad(grad, weight, x, r, 3, transposed), grad, weight, x, r, 3, flags)


# ---- Steps in place of the input --------------------------------------------------------------------------------------

RULES = {
    "learned": {},
    "decay": {"decay": 0.5, "input_min_percentage": 0.3},
    "decay not reached": {"decay": 0.5, "input_min_percentage": 0.99},
    "fast": {"fast_mode": True},
}


@all_dtypes
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_steps_and_flags_stand_for_the_input(rule, dtype, backend, device):
    """With inputs exactly at a range, of 0, NaN and infinite, and with a range of 0. The order in which the range's gradient
    is summed up may differ."""
    rows, columns, features, slices = 19, 37, 50, 3  # of 17, 17 and 16 columns
    grad, weight, x = operands(rows, columns, features, device, dtype)
    x[0, :3] = x.new_tensor([torch.nan, torch.inf, -torch.inf])
    r = make_range(slices, device)
    r[-1] = 0
    _, mask = random_mask(slices, rows, columns, device)
    expected = ops.matmul_dgrad(grad, weight, x, r, slices, mask, **rule)
    steps, clipped = ops.dac_steps(x, r, slices, 254)
    actual = ops.matmul_dgrad(grad, weight, steps, r, slices, mask, clipped=clipped, **rule)
    assert actual[0].dtype == dtype
    assert torch.equal(actual[0], expected[0])
    assert_accurate(actual[1], expected[1], expected[1], size=size_of_range_grad(grad, weight, x.nan_to_num(), slices))
    assert expected[0].isfinite().all()
    assert (expected[1][:-1] != 0).any()


def test_steps_need_no_flags_where_nothing_clips(backend, device):
    grad, weight, x = operands(19, 37, 100, device)
    steps, _ = ops.dac_steps(x, ops.absmax(x, 3), 3, 254)
    dx, dr, _ = ops.matmul_dgrad(grad, weight, steps, None, 3)
    assert torch.equal(dx, ops.matmul_dgrad(grad, weight, x, None, 3)[0])
    assert dr.shape == (0,)


@all_dtypes
@pytest.mark.parametrize("res", [62, 1 / 254])
def test_the_converter_s_integers_on_demand(res, dtype, backend, device):
    grad, weight, x = operands(19, 37, 100, device, dtype)
    r = make_range(3, device)
    x = off_ties(randn(19, 100, device=device, dtype=dtype), r, 3, res)
    expected = ops.matmul_dgrad(grad, weight, x, r, 3)
    assert expected[2].shape == (0, 100)
    actual = ops.matmul_dgrad(grad, weight, x, r, 3, inp_res=res, needs_steps=True)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert actual[2].dtype == dtype
    assert torch.equal(actual[2].double(), dac_steps(x, r, 3, res).round())
    steps, clipped = ops.dac_steps(x, r, 3, res)
    again = ops.matmul_dgrad(grad, weight, steps, r, 3, clipped=clipped, inp_res=res, needs_steps=True)
    assert torch.equal(again[2], actual[2])


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_blocks_do_not_change_the_steps(config, backend, device):
    grad, weight, x = operands(35, 45, 24, device)
    r = make_range(3, device)
    grad, weight = padded_rows(grad), padded_rows(weight)
    steps, clipped = ops.dac_steps(x, r, 3, 254)
    results = [
        launched(grad, weight, source, r, 3, None, config, clipped=flags, inp_res=254, needs_steps=True)
        for source, flags in ((x, None), (steps, clipped))
    ]
    (dx, dr, integers), (dx_again, dr_again, integers_again) = results
    assert torch.equal(dx, dx_again)
    assert_accurate(dr_again, dr, dr, size=size_of_range_grad(grad, weight, x, 3))
    assert torch.equal(integers, integers_again)
    assert torch.equal(integers, steps.float())


# ---- Edges ------------------------------------------------------------------------------------------------------------


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
    dx, _, _ = ops.matmul_dgrad(grad, weight, x, None, 2, packed(flags))
    assert dx.isfinite().all()


def test_an_empty_batch(backend, device):
    grad, weight, x = (torch.empty(*shape, device=device) for shape in ((0, 23), (23, 45), (0, 45)))
    dx, dr, _ = ops.matmul_dgrad(grad, torch.zeros_like(weight), x, make_range(2, device), 2)
    assert dx.shape == (0, 45)
    assert not dr.any()
