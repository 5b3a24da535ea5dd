"""SEMANTICS 3: the analog matrix product."""

import math

import pytest
import torch
from helpers import (
    all_dtypes,
    all_views,
    assert_accurate,
    off_ties,
    product_formula,
    randn,
    seed_of,
    tensor,
    unpacked,
    viewed,
)
from hypothesis import given
from hypothesis import strategies as st

from triton_analog import ops
from triton_analog.ops.matmul import MatmulConfig, launch_matmul

SHAPES = [
    (1, 1, 1, 1),
    (5, 7, 3, 3),
    (3, 17, 17, 1),
    (33, 16, 127, 1),
    (17, 23, 258, 2),
    (1, 9, 40, 7),
    (19, 37, 257, 3),
]
CONFIGS = [MatmulConfig(16, 16, 16, 1), MatmulConfig(64, 32, 32), MatmulConfig(32, 128, 16, 2)]
RANGES = ["none", "static", "dynamic"]


def operands(rows, columns, features, device, dtype=torch.float32):
    x, weight = randn(rows, features, device=device), randn(columns, features, device=device)
    return x.to(dtype), (weight / features**0.5).to(dtype), randn(columns, device=device, dtype=dtype)


def make_range(kind, x, slices):
    """Ranges that every dtype holds exactly, negative ones too."""
    if kind == "dynamic":
        return ops.absmax(x, slices)
    return None if kind == "none" else tensor([(0.75, -1.5, 2.0)[s % 3] for s in range(slices)], x.device)


def double(*tensors, **options):
    """Everything in fp64 but the seed, for the truth."""
    wide = [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]
    return wide, {k: v.double() if k.endswith("wmax") else v for k, v in options.items()}


def assert_is_the_product(x, weight, bias, r, slices, storage=None, **options):
    x = off_ties(x, r if r is None else r.double(), slices, options.get("inp_res", -1))
    y, mask = ops.matmul(x, weight, bias, r, slices, **options)
    arguments, wide_options = double(x, weight, bias, r, slices, **options)
    truth, saturated, slack = product_formula(*arguments, **wide_options)
    wide = [t.float() if isinstance(t, torch.Tensor) else t for t in (x, weight, bias)]
    plain, _, _ = product_formula(*wide, r, slices, storage=storage, **options)
    assert_accurate(y, truth, plain.to(x.dtype), slack)
    differs = unpacked(mask, weight.shape[0]) != saturated
    assert not (differs & (slack == 0)).any()
    assert differs.sum() <= max(1, differs.numel() // 1000)


# ---- Without converters -----------------------------------------------------------------------------------------------


@all_dtypes
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "columns", "features", "slices"), SHAPES)
def test_an_ideal_device_is_linear(rows, columns, features, slices, biased, dtype, backend, device):
    x, weight, bias = operands(rows, columns, features, device, dtype)
    bias = bias if biased else None
    y, mask = ops.matmul(x, weight, bias, None, slices)
    truth = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert_accurate(y, truth, torch.nn.functional.linear(x, weight, bias))
    assert mask.shape == (0, rows, -(-columns // 8))


# ---- With converters --------------------------------------------------------------------------------------------------


@all_dtypes
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("inp_res", [-1, 254])
@pytest.mark.parametrize(("rows", "columns", "features", "slices"), SHAPES)
def test_the_input_converter(rows, columns, features, slices, inp_res, kind, dtype, backend, device):
    x, weight, bias = operands(rows, columns, features, device, dtype)
    assert_is_the_product(x, weight, bias, make_range(kind, x, slices), slices, inp_res=inp_res)


@all_dtypes
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_the_output_converter_of_every_slice(noise, kind, per_channel, dtype, backend, device):
    x, weight, bias = operands(19, 37, 257, device, dtype)
    wmax = ops.absmax(weight, 3)
    wmax = wmax if per_channel else wmax.amax(1, keepdim=True)
    options = {"out_noise": noise, "noise_wmax": wmax, "out_bound": 3.0, "bound_wmax": wmax, "out_res": 30}
    r = make_range(kind, x, 3)
    assert_is_the_product(x, weight, bias, r, 3, inp_res=254, seed=seed_of(-5, device), **options)


def test_a_bound_without_rounding(backend, device):
    x, weight, bias = operands(19, 37, 257, device)
    r = make_range("static", x, 3)
    assert_is_the_product(x, weight, bias, r, 3, out_bound=3.0, bound_wmax=ops.absmax(weight, 3))


@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    features=st.integers(1, 70),
    data=st.data(),
    kind=st.sampled_from(RANGES),
    inp_res=st.sampled_from([-1, 62, 1 / 254]),
    out_noise=st.sampled_from([0.0, 0.1]),
    out_bound=st.sampled_from([0.0, 2.1]),
    out_res=st.sampled_from([-1, 30]),
    biased=st.booleans(),
)
def test_any_shape_and_flags(
    backend, device, rows, columns, features, data, kind, inp_res, out_noise, out_bound, out_res, biased
):
    slices = data.draw(st.integers(1, features))
    x, weight, bias = operands(rows, columns, features, device)
    options = {}
    if kind != "none":
        wmax = ops.absmax(weight, slices)
        options = {"inp_res": inp_res, "out_noise": out_noise, "noise_wmax": wmax.amax(1, keepdim=True)}
        options |= {"out_bound": out_bound, "bound_wmax": wmax, "out_res": out_res if out_bound > 0 else -1}
    r = make_range(kind, x, slices)
    bias = bias if biased else None
    assert_is_the_product(x, weight, bias, r, slices, seed=seed_of(1, device), **options)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("steps", [1022, 2**12])
def test_more_steps_than_bf16_has_integers(steps, kind, backend, device):
    """Beyond 512 steps the integers are rounded to bf16, as plain torch rounds the converted input."""
    x, weight, bias = operands(9, 17, 129, device, torch.bfloat16)
    assert_is_the_product(x, weight, bias, make_range(kind, x, 1), 1, inp_res=steps, storage=torch.bfloat16)


@pytest.mark.parametrize("inp_res", [-1, 254, 2**16])
def test_fp16_up_to_its_largest_values(inp_res, backend, device):
    x, weight, _ = operands(9, 17, 129, device, torch.float16)
    x = (x.float() / x.float().abs().max() * 60000).half()
    weight = weight / 16
    y, _ = ops.matmul(x, weight, None, tensor([65504.0], device), 1, inp_res=inp_res)
    truth = x.double() @ weight.double().T
    step = 2 * 65504 / inp_res if inp_res > 0 else 0
    converter = (step / 2 + 2**-11 * x.double().abs()) @ weight.double().abs().T  # half a step, and fp16's own rounding
    assert ((y.double() - truth).abs() <= 2**-11 * truth.abs() + converter).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sum_and_bias_are_rounded_once(dtype, backend, device):
    """Slices of 256 and -256 and a bias of 2**-9: rounding any partial sum would lose the bias."""
    x, weight = tensor([[256.0, -256.0, 1.0]], device, dtype), tensor([[1.0, 1.0, 2**-9]], device, dtype)
    y, _ = ops.matmul(x, weight, tensor([2**-9], device, dtype), None, 3)
    assert y.item() == 2**-8


# ---- Layout, blocks, edges --------------------------------------------------------------------------------------------


def everything(weight, slices, device, scale=2.0):
    wmax = ops.absmax(weight, slices)
    options = {"inp_res": 254, "out_noise": 0.1, "noise_wmax": wmax, "out_bound": scale, "bound_wmax": wmax}
    return options | {"out_res": 30, "seed": seed_of(11, device)}


@all_views
def test_any_memory_layout(view, backend, device):
    x, weight, bias = operands(7, 23, 45, device)
    options = everything(weight, 2, device)
    expected = ops.matmul(x, weight, bias, tensor([0.7, 1.3], device), 2, **options)
    options |= {name: viewed(options[name], view) for name in ("noise_wmax", "bound_wmax")}
    r, bias = (viewed(t[:, None], "strided")[:, 0] for t in (tensor([0.7, 1.3], device), bias))
    actual = ops.matmul(viewed(x, view), viewed(weight, view), bias, r, 2, **options)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(actual[1], expected[1])


def test_expanded_operands(backend, device):
    x, weight, bias = operands(1, 1, 45, device)
    y, _ = ops.matmul(x.expand(5, 45), weight.expand(9, 45), bias.expand(9), tensor([1.0], device).expand(2), 2)
    alone, _ = ops.matmul(x, weight, bias, tensor([1.0, 1.0], device), 2)
    torch.testing.assert_close(y, alone.expand(5, 9))


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("config", CONFIGS)
def test_any_blocks_are_right(config, kind, backend, device):
    x, weight, bias = operands(35, 45, 70, device)
    r = make_range(kind, x, 3)
    x = off_ties(x, r, 3, 254)
    options = everything(weight, 3, device)
    y, mask = launch_matmul(x, weight, bias, r, 3, **options, config=config)
    arguments, wide_options = double(x, weight, bias, r, 3, **options)
    truth, saturated, slack = product_formula(*arguments, **wide_options)
    assert_accurate(y, truth, product_formula(x, weight, bias, r, 3, **options)[0], slack)
    assert not ((unpacked(mask, 45) != saturated) & (slack == 0)).any()


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("bound", [0.0, 100.0])
def test_blocks_do_not_change_the_noise(bound, backend, device):
    x, weight = torch.zeros(35, 70, device=device), torch.ones(45, 70, device=device)
    one = torch.ones(3, 1, device=device)
    arguments = (x, weight, None, torch.ones(3, device=device), 3, 254, 0.1, one, bound, one, -1.0, seed_of(3, device))
    fields = [launch_matmul(*arguments, config=config)[0] for config in (None, *CONFIGS)]
    assert all(torch.equal(fields[0], field) for field in fields[1:])


def test_a_row_of_nan_stays_in_its_row(backend, device):
    x, weight, bias = operands(7, 23, 45, device)
    options = everything(weight, 2, device)
    r = tensor([0.7, 1.3], device)
    expected, _ = ops.matmul(x, weight, bias, r, 2, **options)
    x[3, 5] = torch.nan
    y, _ = ops.matmul(x, weight, bias, r, 2, **options)
    others = [0, 1, 2, 4, 5, 6]
    assert y[3].isnan().all()
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_row_of_zeros_gives_the_bias(kind, backend, device):
    x, weight, bias = operands(7, 23, 45, device)
    x[3] = 0
    wmax = ops.absmax(weight, 2)
    options = {"inp_res": 254, "out_bound": 2.0, "bound_wmax": wmax, "out_res": 30}
    y, mask = ops.matmul(x, weight, bias, make_range(kind, x, 2), 2, **options)
    assert torch.equal(y[3], bias)
    assert not mask[:, 3].any()


def test_a_zero_range_gives_the_bias(backend, device):
    x, weight, bias = operands(7, 23, 45, device)
    options = everything(weight, 2, device)
    y, _ = ops.matmul(x, weight, bias, tensor([0.0, 0.0], device), 2, **options)
    assert torch.equal(y, bias.expand(7, 23))


def test_an_empty_batch(backend, device):
    _, weight, bias = operands(1, 23, 45, device)
    x = torch.empty(0, 45, device=device, requires_grad=True)
    weight.requires_grad_()
    y, mask = ops.matmul(x, weight, bias, tensor([1.0, 1.0], device), 2, **everything(weight.detach(), 2, device))
    assert y.shape == (0, 23)
    assert mask.shape == (2, 0, 3)
    y.sum().backward()
    assert x.grad.shape == (0, 45)
    assert not weight.grad.any()


def test_fp64_keeps_its_precision(backend, device):
    x, weight, bias = (t.double() for t in operands(7, 23, 45, device))
    y, _ = ops.matmul(x, weight, bias, tensor([0.75, 1.5], device, torch.float64), 2, inp_res=254)
    truth, _, _ = product_formula(x, weight, bias, tensor([0.75, 1.5], device, torch.float64), 2, inp_res=254)
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)


# ---- Output noise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounded", [False, True], ids=["folded", "per slice"])
@pytest.mark.parametrize("slices", [1, 3])
def test_the_noise_has_its_variance_over_all_slices(slices, bounded, backend, device):
    side, out_noise, r, wmax = 128, 0.3, 2.0, 0.5
    x, weight = torch.zeros(side, 6, device=device), torch.ones(side, 6, device=device)
    ranges, scales = torch.full((slices,), -r, device=device), torch.full((slices, 1), wmax, device=device)
    options = {"out_noise": out_noise, "noise_wmax": scales, "seed": seed_of(77, device)}
    if bounded:
        options |= {"out_bound": 1e4, "bound_wmax": scales}
    y, _ = ops.matmul(x, weight, None, ranges, slices, **options)
    z = y.double() / (out_noise * r * wmax)
    assert abs(z.mean()) < 5 / side
    assert abs((z**2).mean() - 1) < 5 * math.sqrt(2) / side
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96) / side


@all_dtypes
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_folded_noise_is_one_field_of_the_summed_variance(per_channel, kind, dtype, backend, device):
    x, weight, bias = operands(19, 37, 100, device, dtype)
    wmax = ops.absmax(weight, 3)
    wmax = wmax if per_channel else wmax.amax(1, keepdim=True)
    options = {"out_noise": 0.2, "noise_wmax": wmax, "seed": seed_of(2**50, device)}
    assert_is_the_product(x, weight, bias, make_range(kind, x, 3), 3, inp_res=254, **options)


def test_the_seed_decides_the_output(backend, device):
    x, weight, _ = operands(7, 23, 45, device)
    wmax, r = ops.absmax(weight, 2), tensor([1.0, 1.0], device)
    a, b, c = (
        ops.matmul(x, weight, None, r, 2, out_noise=0.1, noise_wmax=wmax, seed=seed_of(n, device))[0] for n in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert (a != c).all()
