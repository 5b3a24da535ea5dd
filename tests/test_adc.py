"""SEMANTICS 3 (steps 5 and 6) and 6: output noise, output converter, its saturation mask and its gradient."""

import pytest
import torch
from helpers import (
    adc_formula,
    all_dtypes,
    all_views,
    assert_accurate,
    near_tie,
    packed,
    randn,
    seed_of,
    step_of,
    tensor,
    unpacked,
    viewed,
)

from triton_analog import ops, reference
from triton_analog.ops.adc import AdcConfig, launch_adc, launch_adc_grad

SHAPES = [(1, 1), (3, 17), (37, 45), (65, 8)]


def saturation(y, input_range, **options):
    """The packed mask, which only the operator itself returns."""
    arguments = {"out_noise": 0.0, "noise_wmax": None, "out_res": -1.0, "seed": None, "plane": 0, **options}
    order = ("out_noise", "noise_wmax", "out_bound", "bound_wmax", "out_res", "seed", "plane")
    return torch.ops.triton_analog.adc(y, input_range, *(arguments[name] for name in order))[1]


@all_dtypes
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("res", [-1, 30, 1 / 254])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_rounds_then_clamps_and_marks_what_saturated(rows, columns, res, dynamic, per_channel, dtype, backend, device):
    y = randn(rows, columns, device=device, dtype=dtype)
    r = 0.5 + randn(rows if dynamic else 1, device=device).abs()
    wmax = 0.5 + randn(columns if per_channel else 1, device=device).abs()
    options = {"out_bound": 0.7, "bound_wmax": wmax, "out_res": res}
    bound = 0.7 * r.double()[:, None] * wmax.double()
    v = y.double()
    truth, saturated, slack = adc_formula(v, bound, res)
    assert_accurate(ops.adc(y, r, **options), truth, truth.to(dtype), slack)
    undecided = slack > 0 if res > 0 else (v.abs() / bound - 1).abs() < 1e-6
    differs = unpacked(saturation(y, r, **options), columns) != saturated
    assert not (differs & ~undecided).any()
    assert differs.sum() <= max(1, y.numel() // 1000)


def test_rounding_comes_before_the_clamp(backend, device):
    """With 5 steps the bound lies between two of them: 2.6 steps are rounded to 3 and cut to the bound, 2.5."""
    y = tensor([[2.6, 2.4, -2.6, 9.0]], device)
    options = {"out_bound": 1.0, "bound_wmax": tensor([2.5], device), "out_res": 5}
    r = tensor([1.0], device)
    assert ops.adc(y, r, **options).tolist() == [[2.5, 2, -2.5, 2.5]]
    assert unpacked(saturation(y, r, **options), 4).tolist() == [[True, False, True, True]]


@pytest.mark.parametrize("res", [-1, 254])
def test_the_bound_itself_passes(res, backend, device):
    y = tensor([[127.0, -127.0, 128.0, -128.0, 0.0]], device)
    options = {"out_bound": 1.0, "bound_wmax": tensor([127.0], device), "out_res": res}
    r = tensor([1.0], device)
    assert ops.adc(y, r, **options).tolist() == [[127, -127, 127, -127, 0]]
    assert unpacked(saturation(y, r, **options), 5).tolist() == [[False, False, True, True, False]]


def test_the_order_of_the_bits(backend, device):
    """Column ``128c + 32p + 16g + 8h + 2t + l`` of row ``m`` is bit ``8p + 4g + 2h + l`` of word ``[c, m, t]``."""
    y = torch.zeros(2, 150, device=device)
    y[0, 0] = y[0, 10] = y[1, 18] = y[1, 127] = y[0, 149] = -5
    mask = saturation(y, tensor([1.0], device), out_bound=1.0, bound_wmax=tensor([1.0], device))
    assert mask.dtype == torch.int32
    assert mask.tolist() == [[[1, 4, 0, 0], [0, 16, 0, -(2**31)]], [[0, 0, 32, 0], [0, 0, 0, 0]]]
    assert torch.equal(unpacked(mask, 150), y < -1)
    assert torch.equal(packed(y < -1), mask)
    assert torch.equal(reference.unpack_bits(mask, 150), y < -1)
    assert torch.equal(reference.pack_bits(y < -1), mask)


@pytest.mark.parametrize("columns", [1, 127, 128, 129])
def test_the_mask_ends_with_whole_words(columns, backend, device):
    y = randn(5, columns, device=device) * 2
    mask = saturation(y, tensor([1.0], device), out_bound=1.0, bound_wmax=tensor([1.0], device))
    assert mask.shape == reference.mask_shape(1, 5, columns)[1:]
    assert torch.equal(unpacked(mask, columns), y.abs() > 1)


@all_dtypes
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_noise_is_the_field_times_its_scale(per_channel, dtype, backend, device):
    y = randn(23, 37, device=device, dtype=dtype)
    wmax = randn(37 if per_channel else 1, device=device).abs()
    seed, r = seed_of(-9, device), tensor([-1.7], device)
    out = ops.adc(y, r, out_noise=0.1, noise_wmax=wmax, seed=seed, plane=3)
    field = reference.noise(seed, 23, 37, stream=1, plane=3)
    truth = y.double() + 0.1 * 1.7 * wmax.double() * field.double()
    assert_accurate(out, truth, truth.to(dtype))
    assert not torch.equal(out, ops.adc(y, r, out_noise=0.1, noise_wmax=wmax, seed=seed, plane=4))


def test_noise_comes_before_the_converter(backend, device):
    seed, one = seed_of(5, device), tensor([1.0], device)
    zeros = torch.zeros(40, 40, device=device)
    noisy = {"out_noise": 0.5, "noise_wmax": one, "seed": seed}
    converter = {"out_bound": 1.0, "bound_wmax": one, "out_res": 14}
    field = reference.noise(seed, 40, 40, stream=1).double() * 0.5
    truth, _, slack = adc_formula(field, one.double(), 14)
    assert_accurate(ops.adc(zeros, one, **noisy, **converter), truth, truth.float(), slack)


@pytest.mark.parametrize("res", [-1, 254])
@pytest.mark.parametrize("zero", ["range", "scale"])
def test_a_zero_bound_gives_zero(zero, res, backend, device):
    y = randn(3, 9, device=device)
    r, wmax = (tensor([float(name != zero)], device) for name in ("range", "scale"))
    out = ops.adc(y, r, out_bound=1.0, bound_wmax=wmax, out_res=res)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("res", [-1, 254])
def test_nan_stays_nan_where_it_is_and_passes_no_gradient(res, backend, device):
    y = randn(3, 9, device=device)
    y[1, 4] = torch.nan
    y.requires_grad_()
    out = ops.adc(y, tensor([1.0], device), out_bound=1.0, bound_wmax=tensor([1.0], device), out_res=res)
    out.backward(torch.ones_like(out))
    assert torch.equal(out.isnan(), y.isnan())
    assert y.grad[1, 4] == 0


@all_views
def test_any_memory_layout(view, backend, device):
    y = randn(7, 45, device=device)
    r, wmax = randn(7, device=device), randn(45, device=device).abs()
    options = {"out_bound": 0.5, "out_res": 30}
    expected = ops.adc(y, r, bound_wmax=wmax, **options)
    column = viewed(r[:, None], "strided")[:, 0]
    assert torch.equal(ops.adc(viewed(y, view), column, bound_wmax=wmax.repeat(2, 1).T[:, 0], **options), expected)


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("config", [AdcConfig(1, 32), AdcConfig(16, 64), AdcConfig(64, 128)])
def test_blocks_do_not_change_the_result(config, backend, device):
    y, one = randn(17, 150, device=device), tensor([1.0], device)
    results = [launch_adc(y, one, 0.2, one, 0.8, one, 30, seed_of(3, device), 1, c) for c in (None, config)]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_everything_off_gives_a_copy(backend, device):
    y = randn(3, 9, device=device)
    out = ops.adc(y, tensor([1.0], device))
    assert torch.equal(out, y)
    assert out.data_ptr() != y.data_ptr()


def test_no_bound_gives_no_mask(backend, device):
    y, one = randn(3, 9, device=device), tensor([1.0], device)
    noise = {"out_noise": 0.1, "noise_wmax": one, "seed": seed_of(1, device)}
    assert saturation(y, one, out_bound=0.0, bound_wmax=None, **noise).shape == (0, 3, 4)


def test_an_empty_batch(backend, device):
    y, one = torch.empty(0, 9, device=device), tensor([1.0], device)
    assert ops.adc(y, one, out_bound=1.0, bound_wmax=one, out_res=254).shape == (0, 9)
    assert saturation(y, one, out_bound=1.0, bound_wmax=one).shape == (1, 0, 4)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("res", [-1, 31, 254])
def test_the_gradient_is_zero_where_the_bound_acted(res, expanded, backend, device):
    y = randn(23, 37, device=device)
    wmax = 0.5 + randn(37, device=device).abs()
    y = torch.where(near_tie(y.double() / step_of(res, wmax.double())), 0.0, y) if res > 0 else y
    grad = torch.ones(1, 1, device=device).expand(23, 37) if expanded else randn(23, 37, device=device)
    leaf, truth_leaf = y.clone().requires_grad_(), y.double().requires_grad_()
    ops.adc(leaf, tensor([-1.0], device), out_bound=1.0, bound_wmax=wmax, out_res=res).backward(grad)
    adc_formula(truth_leaf, wmax.double(), res)[0].backward(grad.double())
    assert torch.equal(leaf.grad, truth_leaf.grad.float())


def test_without_a_bound_the_gradient_passes(backend, device):
    y, grad = randn(5, 9, device=device).requires_grad_(), randn(5, 9, device=device)
    one = tensor([1.0], device)
    ops.adc(y, one, out_noise=0.3, noise_wmax=one, seed=seed_of(1, device)).backward(grad)
    assert torch.equal(y.grad, grad)


# ---- The gradient on its own --------------------------------------------------------------------------------------------


@all_dtypes
@pytest.mark.parametrize(("slices", "rows", "columns"), [(1, 1, 1), (1, 37, 45), (2, 3, 127), (3, 2, 300)])
def test_the_gradient_passes_where_a_slice_did_not_saturate(slices, rows, columns, dtype, backend, device):
    """Infinite gradients elsewhere do not matter."""
    flags = randn(slices, rows, columns, device=device) > 0.5
    grad = randn(rows, columns, device=device, dtype=dtype).masked_fill(flags.all(0), torch.inf)
    out = ops.adc_grad(grad, packed(flags))
    assert out.dtype == dtype
    assert torch.equal(out, grad.expand(slices, rows, columns).masked_fill(flags, 0))


@all_views
def test_gradients_in_any_memory_layout(view, backend, device):
    grad, flags = randn(7, 45, device=device), randn(2, 7, 45, device=device) > 0.5
    out = ops.adc_grad(viewed(grad, view), packed(flags))
    assert out.is_contiguous()
    assert torch.equal(out, grad.expand(2, 7, 45).masked_fill(flags, 0))
    expanded = ops.adc_grad(grad[:1].expand(7, 45), packed(flags))
    assert torch.equal(expanded, grad[:1].expand(2, 7, 45).masked_fill(flags, 0))


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("config", [AdcConfig(1, 16), AdcConfig(16, 64), AdcConfig(64, 128)])
def test_blocks_do_not_change_the_gradient(config, backend, device):
    grad, flags = randn(21, 150, device=device), randn(2, 21, 150, device=device) > 0.5
    assert torch.equal(launch_adc_grad(grad, packed(flags), config), grad.expand(2, 21, 150).masked_fill(flags, 0))


def test_the_gradient_of_an_empty_batch(backend, device):
    grad, mask = torch.empty(0, 9, device=device), torch.empty(2, 1, 0, 4, dtype=torch.int32, device=device)
    assert ops.adc_grad(grad, mask).shape == (2, 0, 9)
