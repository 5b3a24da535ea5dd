"""SEMANTICS 3: the analog matrix product."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import (
    all_dtypes,
    all_views,
    assert_accurate,
    cut,
    off_ties,
    padded_rows,
    product_formula,
    randn,
    seed_of,
    tensor,
    unpacked,
    viewed,
)
from hypothesis import given
from hypothesis import strategies as st

from triton_analog import ops, reference
from triton_analog.launch import describable, slices_describable
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
CONFIGS = {
    "default": None,
    "smallest blocks": MatmulConfig(16, 32, 16, DESCRIPTORS=False, num_warps=4),
    "small blocks": MatmulConfig(32, 64, 16, GROUP_M=1, DESCRIPTORS=False),
    "large blocks": MatmulConfig(64, 128, 64, DESCRIPTORS=False),
    "two parts": MatmulConfig(32, 64, 16, GROUP_M=2, PARTS=2, DESCRIPTORS=False),
    "two wide parts": MatmulConfig(32, 256, 32, PARTS=2, DESCRIPTORS=False),
    "converting in the loop": MatmulConfig(32, 64, 16, PREPARED=False, DESCRIPTORS=False),
    "descriptors": MatmulConfig(32, 64, 16),
    "descriptors and parts": MatmulConfig(32, 128, 32, GROUP_M=3, PARTS=2),
    "descriptors, converting in the loop": MatmulConfig(32, 64, 32, PARTS=2, PREPARED=False),
}
UNBOUNDED_CONFIGS = {
    **CONFIGS,
    "columns of 16": MatmulConfig(16, 16, 16, DESCRIPTORS=False),
    "four parts": MatmulConfig(32, 128, 32, PARTS=4, PREPARED=False),
    "four parts of 16": MatmulConfig(64, 64, 16, PARTS=4),
}
RANGES = ["none", "static", "dynamic"]
EVERYTHING_OFF = {"inp_res": -1.0, "out_noise": 0.0, "noise_wmax": None, "out_bound": 0.0, "bound_wmax": None}
EVERYTHING_OFF |= {"out_res": -1.0, "seed": None}


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


def assert_is_the_product(x, weight, bias, r, slices, storage=None, config=None, **options):
    x = off_ties(x, r if r is None else r.double(), slices, options.get("inp_res", -1))
    if config is None:
        y, mask = ops.matmul(x, weight, bias, r, slices, **options)
    else:
        y, mask = launch_matmul(x, weight, bias, r, slices, **(EVERYTHING_OFF | options), config=config)
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
    assert mask.shape == reference.mask_shape(0, rows, columns)


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
    slices = data.draw(st.integers(1, min(features, 9)))
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
@pytest.mark.parametrize(
    ("config", "kind"),
    [("small blocks", "static"), ("two parts", "dynamic"), ("converting in the loop", "dynamic")],
)
def test_any_blocks_are_right(config, kind, backend, device):
    x, weight, bias = operands(35, 45, 70, device)
    options = everything(weight, 3, device)
    assert_is_the_product(x, weight, bias, make_range(kind, x, 3), 3, config=CONFIGS[config], **options)


STAGES = {  # and how many columns: the fewest that show it, as noise is slow to interpret
    "nothing": (130, {}),
    "noisy": (45, {"out_noise": 0.5}),
    "converted": (130, {"inp_res": 128}),
    "converted, noisy": (45, {"inp_res": 128, "out_noise": 0.5}),
    "bounded": (45, {"out_bound": 2.0}),
    "quantized": (130, {"inp_res": 128, "out_bound": 2.0, "out_res": 30}),
    "everything": (45, {"inp_res": 128, "out_bound": 2.0, "out_res": 30, "out_noise": 0.5}),
}


def exact_operands(rows, columns, features, device, dtype=torch.float32):
    """Multiples of 1/8 below 1: in whatever order their products are added, the sum is exact."""
    x, weight = (torch.randint(-7, 8, shape) / 8 for shape in ((rows, features), (columns, features)))
    x, weight = (padded_rows(t.to(device, dtype)) for t in (x, weight))
    return x, weight, randn(columns, device=device, dtype=dtype)


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        ("nothing", "static"),
        ("noisy", "static"),
        ("converted", "static"),
        ("converted, noisy", "dynamic"),
        ("bounded", "dynamic"),
        ("quantized", "static"),
        ("everything", "dynamic"),
    ],
)
def test_every_configuration_gives_the_same_result(stage, kind, backend, device):
    """To the last bit, and the same noise: blocks and strategies are a matter of speed alone. Ranges are powers of two, so
    that the steps of the converter are exact."""
    columns, options = STAGES[stage]
    dtype = torch.float32 if kind == "static" else torch.bfloat16
    x, weight, bias = exact_operands(19, columns, 24, device, dtype)
    slices = 3  # of 8 columns: blocks reach into the next slice
    r = tensor([0.5, -1.0, 0.25], device)
    if kind == "dynamic":
        x[:, ::2] = 0.5
        x.clamp_(-0.5, 0.5)
        r = ops.absmax(x, slices)
        assert (r == 0.5).all()
    scales = {"noise_wmax": torch.full((slices, 1), 0.5, device=device)}
    scales |= {"bound_wmax": 0.5 + torch.rand(slices, columns).to(device)}
    options = EVERYTHING_OFF | scales | {"seed": seed_of(3, device)} | options
    configs = CONFIGS if options["out_bound"] > 0 else UNBOUNDED_CONFIGS
    expected, expected_mask = launch_matmul(x, weight, bias, r, slices, **options)
    assert_is_the_product(x, weight, bias, r, slices, config=CONFIGS["large blocks"], **options)
    assert describable(x, weight)
    assert slices_describable(weight, slices)
    for name, config in configs.items():
        y, mask = launch_matmul(x, weight, bias, r, slices, **options, config=config)
        assert torch.equal(y, expected), name
        assert torch.equal(mask, expected_mask), name


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("bound", [0.0, 100.0])
def test_blocks_do_not_change_the_noise(bound, backend, device):
    x, weight = torch.zeros(17, 16, device=device), torch.ones(45, 16, device=device)
    one = torch.ones(2, 1, device=device)
    arguments = (x, weight, None, torch.ones(2, device=device), 2, 254, 0.1, one, bound, one, -1.0, seed_of(3, device))
    configs = CONFIGS if bound > 0 else UNBOUNDED_CONFIGS
    fields = [launch_matmul(*arguments, needs_mask=False, config=config)[0] for config in configs.values()]
    assert fields[0].std() > 0.05
    assert all(torch.equal(fields[0], field) for field in fields[1:])


AWKWARD = [  # rows, columns, features, slices: every width between 1 and one more than a power of two
    (1, 1, 4, 4),
    (1, 127, 9, 3),
    (3, 129, 34, 2),
    (17, 128, 381, 3),
    (1, 17, 258, 2),
    (5, 33, 256, 3),
    (2, 130, 40, 7),
]
AWKWARD_FOR_DESCRIPTORS = [
    (3, 127, 1, 1),
    (1, 1, 3, 1),
    (2, 129, 17, 1),
    (3, 20, 129, 1),
    (1, 128, 24, 3),
    (5, 33, 256, 3),
]


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("prepared", [False, True], ids=["converting in the loop", "prepared"])
@pytest.mark.parametrize(
    ("descriptors", "shape"),
    [
        *((False, shape) for shape in AWKWARD),
        *((True, shape) for shape in AWKWARD_FOR_DESCRIPTORS),
    ],
)
def test_awkward_widths(shape, descriptors, prepared, backend, device):
    """A block of the weight then reaches into the next slice, or beyond the last column, where NaN lies."""
    rows, columns, features, slices = shape
    x, weight, bias = operands(rows, columns, features, device)
    x, weight = padded_rows(x), padded_rows(weight)
    assert describable(x, weight)
    config = MatmulConfig(32, 128, 32, PARTS=2, PREPARED=prepared, DESCRIPTORS=descriptors)
    options = everything(weight, slices, device, scale=2.1) | {"out_noise": 0.1 if prepared else 0.0}
    assert_is_the_product(x, weight, bias, make_range("static", x, slices), slices, config=config, **options)


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
def test_descriptors_leave_out_what_they_cannot_address(backend, device):
    """Rows of 45 numbers, gaps between numbers, an odd offset: the same result through plain loads."""
    x, weight, bias = operands(7, 23, 45, device)
    r, options = tensor([0.7, 1.3], device), everything(weight, 2, device) | {"out_noise": 0.0}
    expected = launch_matmul(x, weight, bias, r, 2, **options)
    for prepared in (False, True):
        config = MatmulConfig(32, 64, 16, PREPARED=prepared)
        for view in ("contiguous", "transposed", "strided", "column_sliced"):
            operands_of_view = viewed(x, view), viewed(weight, view)
            assert not describable(operands_of_view[1])
            y, mask = launch_matmul(*operands_of_view, bias, r, 2, **options, config=config)
            torch.testing.assert_close(y, expected[0], rtol=1e-5, atol=1e-5)
            assert torch.equal(mask, expected[1])


def test_a_mask_that_nobody_needs_is_left_out(backend, device):
    x, weight, bias = operands(7, 23, 45, device)
    r, options = tensor([0.7, 1.3], device), everything(weight, 2, device)
    expected, mask = ops.matmul(x, weight, bias, r, 2, **options)
    y, no_mask = ops.matmul(x, weight, bias, r, 2, **options, needs_mask=False)
    assert torch.equal(y, expected)
    assert mask.shape == reference.mask_shape(2, 7, 23)
    assert no_mask.shape == reference.mask_shape(0, 7, 23)


def test_a_backward_through_a_bound_needs_the_mask(backend, device):
    x, weight, bias = operands(7, 23, 45, device)
    r, options = tensor([0.7, 1.3], device), everything(weight, 2, device)
    weight.requires_grad_()
    with pytest.raises(ValueError, match=r"needs_mask: False, but .* leave it on or run under torch\.no_grad"):
        ops.matmul(x, weight, bias, r, 2, **options, needs_mask=False)
    with torch.no_grad():
        ops.matmul(x, weight, bias, r, 2, **options, needs_mask=False)
    options |= {"out_bound": 0.0, "out_res": -1}
    ops.matmul(x, weight, bias, r, 2, **options, needs_mask=False)[0].sum().backward()
    assert weight.grad.isfinite().all()


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
    assert not unpacked(mask, 23)[:, 3].any()


def test_a_zero_range_gives_the_bias(backend, device):
    x, weight, bias = operands(7, 23, 45, device)
    options = everything(weight, 2, device)
    y, _ = ops.matmul(x, weight, bias, tensor([0.0, 0.0], device), 2, **options)
    assert torch.equal(y, bias.expand(7, 23))


@all_dtypes
@pytest.mark.parametrize("ranges", [(0.0, 1.5, 0.75), (1.5, 0.0, 0.75), (0.75, 1.5, 0.0), (0.0, 0.0, 1.5)])
def test_a_slice_with_a_zero_range_adds_nothing(ranges, dtype, backend, device):
    x, weight, bias = operands(7, 23, 45, device, dtype)
    assert_is_the_product(x, weight, bias, tensor(ranges, device), 3, inp_res=254)
    rows = x.clone()
    for s, r in enumerate(ranges):
        rows[::2, 15 * s : 15 * s + 15] *= r != 0
    assert_is_the_product(rows, weight, bias, ops.absmax(rows, 3), 3, inp_res=254)


def test_ranges_of_very_different_size(backend, device):
    """One accumulator serves all slices without an output converter."""
    x, weight, bias = operands(7, 23, 45, device)
    for r in ([1e-12, 1.0, 1e12], [1e12, 1.0, 1e-12], [1.0, 1e-12, 1e12]):
        scaled = x * tensor(r, device).repeat_interleave(15)
        assert_is_the_product(scaled, weight, bias, tensor(r, device), 3, inp_res=254)


def test_an_empty_batch(backend, device):
    _, weight, bias = operands(1, 23, 45, device)
    x = torch.empty(0, 45, device=device, requires_grad=True)
    weight.requires_grad_()
    y, mask = ops.matmul(x, weight, bias, tensor([1.0, 1.0], device), 2, **everything(weight.detach(), 2, device))
    assert y.shape == (0, 23)
    assert mask.shape == reference.mask_shape(2, 0, 23)
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


# ---- Integers ---------------------------------------------------------------------------------------------------------


def integers(rows, columns, features, device, dtype=torch.float32):
    """Inputs, weights in -127 .. 127 as int8, and bias."""
    x, _, bias = operands(rows, columns, features, device, dtype)
    return x, torch.randint(-127, 128, (columns, features)).to(device, torch.int8), bias


def scaled(weight, wmax, slices):
    """The weight that 254 steps of ``wmax`` stand for, fp64."""
    return torch.cat(
        [part.double() * w[:, None].double() / 127 for part, w in zip(cut(weight, slices), wmax, strict=True)], dim=-1
    )


def assert_is_the_integer_product(x, weight, bias, r, slices, wmax, config=None, **options):
    """Against the same formula as every other product."""
    x = off_ties(x, r.double(), slices, options["inp_res"])
    arguments = (x, weight, bias, r, slices)
    if config is None:
        y, mask = ops.matmul(*arguments, weight_wmax=wmax, weight_res=254, **options)
    else:
        options = EVERYTHING_OFF | options
        y, mask = launch_matmul(*arguments, weight_wmax=wmax, weight_res=254, **options, config=config)
    wide, wide_options = double(x, scaled(weight, wmax, slices), bias, r, slices, **options)
    truth, saturated, slack = product_formula(*wide, **wide_options)
    plain, _, _ = product_formula(
        x.float(), wide[1].float(), None if bias is None else bias.float(), r, slices, **options
    )
    assert_accurate(y, truth, plain.to(x.dtype), slack)
    differs = unpacked(mask, len(weight)) != saturated
    assert not (differs & (slack == 0)).any()
    assert differs.sum() <= max(1, differs.numel() // 1000)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_the_product_of_integers_is_exact(kind, backend, device):
    """Slices add up to more than fp32 has integers for. All steps are powers of two, so each slice is rounded once."""
    features, slices = 4801, 2
    steps, weight = torch.randint(-64, 65, (3, features)), torch.randint(-127, 128, (5, features))
    steps[0], weight[0] = 64, 127
    signs = torch.where(weight[2] < 0, -1, 1)
    steps[1], weight[1] = 63 * signs, 125 * signs  # the sum of an odd number of these is odd
    for part in cut(steps, slices):
        part[:, 0] = 64  # every row and slice reaches its range
    r = torch.full((slices, 3) if kind == "dynamic" else (slices,), 0.5).to(device)
    wmax = torch.full((slices, 1), 16.0).to(device)
    x, int8 = (steps / 128).to(device), weight.to(device, torch.int8)
    y, _ = ops.matmul(x, int8, None, r, slices, inp_res=128, weight_wmax=wmax, weight_res=128)
    products = [a @ b.T for a, b in zip(cut(steps, slices), cut(weight, slices), strict=True)]
    assert any((product.float().long() != product).any() for product in products)
    assert torch.equal(y.cpu(), sum(product.float() for product in products) / 128 / 4)


@all_dtypes
@pytest.mark.parametrize(("kind", "per_channel"), [("static", True), ("dynamic", False)])
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("bound", [0.0, 3.0])
def test_integers_through_the_output_stage(bound, noise, kind, per_channel, dtype, backend, device):
    x, weight, bias = integers(19, 37, 257, device, dtype)
    wmax = 0.05 + torch.rand(3, 37 if per_channel else 1).to(device)
    options = {"out_noise": noise, "noise_wmax": wmax, "out_bound": bound, "bound_wmax": wmax, "inp_res": 254}
    options |= {"out_res": 30 if bound > 0 else -1, "seed": seed_of(-5, device)}
    assert_is_the_integer_product(x, weight, bias, make_range(kind, x, 3), 3, wmax, **options)


@pytest.mark.parametrize(("rows", "columns", "features", "slices"), SHAPES)
def test_integers_of_any_shape(rows, columns, features, slices, backend, device):
    x, weight, bias = integers(rows, columns, features, device)
    wmax = 0.05 + torch.rand(slices, columns).to(device)
    assert_is_the_integer_product(x, weight, bias, make_range("static", x, slices), slices, wmax, inp_res=62)


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("bounded", [False, True])
def test_every_configuration_gives_the_same_integers(bounded, backend, device):
    x, weight, bias = integers(19, 130, 48, device)
    weight = padded_rows(weight)
    wmax = 0.05 + torch.rand(3, 130).to(device)
    options = everything(scaled(weight, wmax, 3).float(), 3, device) | {"weight_wmax": wmax, "weight_res": 254}
    options |= {"out_noise": 0.0} if bounded else {"out_bound": 0.0, "out_res": -1}
    r = tensor([0.5, -1.0, 0.7], device)
    expected, expected_mask = launch_matmul(x, weight, bias, r, 3, **options)
    assert describable(weight)
    assert slices_describable(weight, 3)
    for name, config in CONFIGS.items():
        wide = config and replace(config, BLOCK_K=max(32, config.BLOCK_K))  # as integer products on GPUs need it
        y, mask = launch_matmul(x, weight, bias, r, 3, **options, config=wide)
        assert torch.equal(y, expected), name
        assert torch.equal(mask, expected_mask), name


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("bound", [0.0, 2.0])
def test_nan_among_integers_stays_in_its_row(bound, kind, backend, device):
    x, weight, bias = integers(35, 23, 45, device)
    wmax = torch.ones(2, 1, device=device)
    options = {"inp_res": 254, "out_bound": bound, "bound_wmax": wmax, "out_res": 30 if bound > 0 else -1}
    options |= {"weight_wmax": wmax, "weight_res": 254}
    expected, _ = ops.matmul(x, weight, bias, make_range(kind, x, 2), 2, **options)
    x[3, 5] = x[33, 44] = torch.nan
    y, _ = ops.matmul(x, weight, bias, make_range(kind, x, 2), 2, **options)
    hit = torch.zeros(35, dtype=torch.bool, device=device)
    hit[[3, 33]] = True
    assert y[hit].isnan().all()
    assert torch.equal(y[~hit], expected[~hit])


def test_integers_have_no_backward(backend, device):
    x, weight, bias = integers(7, 23, 45, device)
    r = tensor([0.7, 1.3], device)
    options = {"inp_res": 254, "weight_wmax": torch.ones(2, 1, device=device), "weight_res": 254}
    x.requires_grad_()
    with pytest.raises(ValueError, match=r"weight: an int8 weight has no backward; run under torch\.no_grad"):
        ops.matmul(x, weight, bias, r, 2, **options)
    with torch.no_grad():
        assert ops.matmul(x, weight, bias, r, 2, **options)[0].isfinite().all()
