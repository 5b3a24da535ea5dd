"""SEMANTICS 2, 3 (steps 1 and 2) and 6: the input converter and its gradients."""

import numpy as np
import pytest
import torch
from helpers import (
    all_dtypes,
    all_views,
    assert_accurate,
    cut,
    dac_formula,
    dac_steps,
    near_tie,
    off_ties,
    randn,
    range_grad_formula,
    step_of,
    tensor,
    viewed,
)
from hypothesis import given
from hypothesis import strategies as st

from triton_analog import ops
from triton_analog.ops.dac import DacConfig, launch_dac, launch_dac_steps


def assert_converts(x, r, slices, res):
    out = ops.dac(x, r, slices, res)
    truth = dac_formula(x.double(), r.double(), slices, res)
    slack = 0.0
    if res > 0:
        widths = [part.shape[1] for part in torch.tensor_split(x, slices, dim=-1)]
        step = step_of(res, r.double().abs()).repeat_interleave(torch.tensor(widths, device=r.device), dim=0)
        slack = near_tie(dac_steps(x, r, slices, res)) * (step if r.ndim == 1 else step.T)
    assert_accurate(out, truth, truth.to(x.dtype), slack)


@all_dtypes
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("res", [-1, 2, 14, 254, 1 / 254])
@pytest.mark.parametrize(("rows", "features", "slices"), [(1, 1, 1), (3, 17, 17), (19, 257, 3)])
def test_clamps_and_rounds(rows, features, slices, res, dynamic, dtype, backend, device):
    x = randn(rows, features, device=device, dtype=dtype)
    r = ops.absmax(x, slices) if dynamic else 0.2 + randn(slices, device=device).abs()
    if dtype != torch.float32:  # ratios of short numbers: true ties are common
        x = off_ties(x, r, slices, res)
    assert_converts(x, r, slices, res)


@given(
    rows=st.integers(1, 9),
    features=st.integers(1, 70),
    data=st.data(),
    res=st.sampled_from([-1, 6, 254, 1 / 30]),
    dynamic=st.booleans(),
)
def test_any_shape(backend, device, rows, features, data, res, dynamic):
    slices = data.draw(st.integers(1, features))
    x = randn(rows, features, device=device)
    assert_converts(x, ops.absmax(x, slices) if dynamic else randn(slices, device=device), slices, res)


@all_views
def test_any_memory_layout(view, backend, device):
    x = randn(7, 45, device=device)
    r = tensor([0.7, 1.3], device)
    out = ops.dac(viewed(x, view), r, 2, 254)
    assert out.is_contiguous()
    assert torch.equal(out, ops.dac(x, r, 2, 254))
    assert torch.equal(out, ops.dac(x, viewed(r[:, None], "strided")[:, 0], 2, 254))


def test_254_steps_are_the_integers_to_127(backend, device):
    r = 1.27
    x = torch.linspace(-2 * r, 2 * r, 5001, device=device)[None]
    steps = ops.dac(x, tensor([r], device), 1, 254).double() / (r / 127)
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert steps.round().unique().tolist() == list(range(-127, 128))


@all_dtypes
def test_a_power_of_two_step_is_exact(dtype, backend, device):
    x = randn(20, 129, device=device, dtype=dtype)
    r = tensor([127 / 64], device)
    expected = (x.double().clamp(-r.double(), r.double()) * 64).round() / 64
    assert torch.equal(ops.dac(x, r, 1, 254), expected.to(dtype))


def test_ties_go_to_the_even_step(backend, device):
    x = tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], device)
    assert ops.dac(x, tensor([127.0], device), 1, 254).tolist() == [[0, 2, 2, 0, -2, -2, 126]]


def test_the_inverse_of_a_resolution_is_the_same_grid(backend, device):
    x = randn(5, 45, device=device)
    r = tensor([0.7, 1.3], device)
    assert torch.equal(ops.dac(x, r, 2, 254), ops.dac(x, r, 2, 1 / 254))


@pytest.mark.parametrize("res", [-1, 254])
class TestEdges:
    def test_a_zero_range_gives_zero(self, res, backend, device):
        assert torch.equal(
            ops.dac(randn(3, 9, device=device), tensor([0.0], device), 1, res).abs(), torch.zeros(3, 9).to(device)
        )

    def test_nan_stays_nan_where_it_is(self, res, backend, device):
        x = randn(3, 9, device=device)
        x[1, 4] = torch.nan
        assert torch.equal(ops.dac(x, tensor([1.0], device), 1, res).isnan(), x.isnan())

    def test_infinite_inputs_are_clamped(self, res, backend, device):
        x = tensor([[torch.inf, -torch.inf]], device)
        assert ops.dac(x, tensor([127.0], device), 1, res).tolist() == [[127, -127]]

    def test_the_sign_of_the_stored_range_does_not_matter(self, res, backend, device):
        x = randn(3, 9, device=device)
        r = tensor([0.5, 1.5], device)
        assert torch.equal(ops.dac(x, r, 2, res), ops.dac(x, -r, 2, res))

    def test_the_range_itself_passes(self, res, backend, device):
        r = randn(7, device=device).abs()
        out = ops.dac(torch.stack([r, -r]), r, 7, res)
        torch.testing.assert_close(out, torch.stack([r, -r]), rtol=2**-22, atol=0)

    def test_rows_of_zeros_with_a_dynamic_range(self, res, backend, device):
        x = randn(3, 9, device=device)
        x[1] = 0
        out = ops.dac(x, ops.absmax(x, 2), 2, res)
        assert not out[1].any()
        assert out[[0, 2]].isfinite().all()

    def test_an_empty_batch(self, res, backend, device):
        x = torch.empty(0, 9, device=device, requires_grad=True)
        r = tensor([1.0, 2.0], device).requires_grad_()
        out = ops.dac(x, r, 2, res)
        assert out.shape == (0, 9)
        out.sum().backward()
        assert x.grad.shape == (0, 9)
        assert not r.grad.any()


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("config", [DacConfig(1, 16), DacConfig(16, 16), DacConfig(8, 256)])
def test_blocks_do_not_change_the_result(config, backend, device):
    x = randn(21, 100, device=device)
    r = tensor([0.5, 1.0, 2.0], device)
    assert torch.equal(launch_dac(x, r, 3, 254, config=config), launch_dac(x, r, 3, 254))


# ---- Steps and flags --------------------------------------------------------------------------------------------------


def unpacked_bytes(flags, columns):
    """``[2, M, columns]`` of ``[2, M, ceil(columns / 8)]``, low bit first; no bit lies beyond."""
    bits = torch.from_numpy(np.unpackbits(flags.cpu().numpy(), axis=-1, bitorder="little").astype(bool))
    assert not bits[..., columns:].any()
    return bits[..., :columns].to(flags.device)


def assert_has_steps_and_flags(x, r, slices, res):
    """``x`` without NaN."""
    steps, flags = ops.dac_steps(x, r, slices, res)
    assert steps.dtype == torch.int8
    exact = dac_steps(x, r, slices, res)
    decided = ~near_tie(exact)
    assert torch.equal(steps[decided].double(), exact.round()[decided])
    assert (steps - exact).abs().max() < 0.5 + 1e-4
    assert flags.dtype == torch.uint8
    rows, columns = x.shape
    if r.ndim == 2:
        assert flags.shape == (2, 0, -(-columns // 8))
        return
    assert flags.shape == (2, rows, -(-columns // 8))
    widths = torch.tensor([part.shape[1] for part in cut(x, slices)], device=x.device)
    size, limit = x.double().abs(), r.double().abs().repeat_interleave(widths)
    assert torch.equal(unpacked_bytes(flags, columns), torch.stack([size >= limit, size <= limit]))


@all_dtypes
@pytest.mark.parametrize("res", [2, 14, 1 / 254])
@pytest.mark.parametrize(("rows", "features", "slices"), [(1, 1, 1), (3, 17, 17), (19, 257, 3), (2, 4099, 2)])
def test_steps_and_flags(rows, features, slices, res, dtype, backend, device):
    """Slices begin anywhere in a byte of flags; a quarter of the inputs is exactly at a range, on either side."""
    x = randn(rows, features, device=device, dtype=dtype)
    r = tensor([(0.75, -1.5, 2.0)[s % 3] for s in range(slices)], device)
    for part, r_s in zip(cut(x, slices), r, strict=True):
        part[:, 1::8], part[:, 3::8] = r_s, -r_s
    assert_has_steps_and_flags(x, r, slices, res)
    if dtype == torch.float32:  # ratios of short numbers: true ties are common
        assert_has_steps_and_flags(x, ops.absmax(x, slices), slices, res)


def test_steps_and_flags_of_every_kind_of_input(backend, device):
    x = tensor([[1.0, -1.0, 1.5, -1.5, 0.5, -0.25, 0.0, torch.inf, -torch.inf]], device)
    for r in (1.0, -1.0):
        steps, flags = ops.dac_steps(x, tensor([r], device), 1, 8)
        assert steps.tolist() == [[4, -4, 4, -4, 2, -1, 0, 4, -4]]
        touches, passes = unpacked_bytes(flags, 9)
        assert touches.tolist() == [[True, True, True, True, False, False, False, True, True]]
        assert passes.tolist() == [[True, True, False, False, True, True, True, False, False]]


def test_nan_has_no_flag(backend, device):
    x = randn(3, 20, device=device)
    x[1, 4] = x[2, 19] = torch.nan
    _, flags = ops.dac_steps(x, tensor([0.5, 1.0], device), 2, 254)
    touches, passes = unpacked_bytes(flags, 20)
    assert torch.equal(touches | passes, ~x.isnan())


def test_steps_keep_the_side_of_a_range_of_zero(backend, device):
    """All inputs but 0 are beyond such a range, and the gradient of the range asks on which side."""
    x = tensor([[3.0, -2.0, 0.0, 1e-30]], device)
    steps, flags = ops.dac_steps(x, tensor([0.0], device), 1, 254)
    assert steps.sign().tolist() == [[1, -1, 0, 1]]
    touches, passes = unpacked_bytes(flags, 4)
    assert touches.tolist() == [[True] * 4]
    assert passes.tolist() == [[False, False, True, False]]


def test_steps_of_rows_of_zeros_with_a_dynamic_range(backend, device):
    x = randn(3, 9, device=device)
    x[1] = 0
    steps, _ = ops.dac_steps(x, ops.absmax(x, 2), 2, 254)
    assert not steps[1].any()
    assert all((part.abs().amax(1) == 127).all() for part in cut(steps[[0, 2]], 2))


@all_views
def test_steps_of_any_memory_layout(view, backend, device):
    x, r = randn(7, 45, device=device), tensor([0.7, 1.3], device)
    expected = ops.dac_steps(x, r, 2, 254)
    for actual in (
        ops.dac_steps(viewed(x, view), r, 2, 254),
        ops.dac_steps(x, viewed(r[:, None], "strided")[:, 0], 2, 254),
    ):
        assert actual[0].is_contiguous()
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("config", [DacConfig(1, 16), DacConfig(16, 32), DacConfig(8, 256)])
def test_blocks_do_not_change_steps_and_flags(config, backend, device):
    x, r = randn(21, 100, device=device), tensor([0.5, 1.0, 2.0], device)
    results = [launch_dac_steps(x, r, 3, 254, config=c) for c in (None, config)]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_steps_of_an_empty_batch(backend, device):
    steps, flags = ops.dac_steps(torch.empty(0, 9, device=device), tensor([1.0, 2.0], device), 2, 254)
    assert steps.shape == (0, 9)
    assert flags.shape == (2, 0, 2)


# ---- Gradients ------------------------------------------------------------------------------------------------------

RULES = {
    "learned": {},
    "decay": {"decay": 0.3, "input_min_percentage": 0.5},
    "decay not reached": {"decay": 0.3, "input_min_percentage": 0.99},
    "fast": {"fast_mode": True},
}


@all_dtypes
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_gradients(rule, dtype, backend, device):
    x = randn(23, 67, device=device, dtype=dtype)
    r = tensor([1.0, -1.5, 0.25], device)
    x[0, :23], x[1, :23], x[2, 23:45], x[3, 23:45] = 1.0, -1.0, 1.5, -1.5  # at the range exactly: passes, and widens it
    grad = randn(23, 67, device=device, dtype=dtype)
    inputs = x.clone().requires_grad_(), r.clone().requires_grad_()
    ops.dac(*inputs, 3, 254, **rule).backward(grad)
    options = (rule.get("decay", 0.0), rule.get("input_min_percentage", 0.95), rule.get("fast_mode", False))
    dx, dr = range_grad_formula(grad.double(), x.double(), r.double(), 3, *options)
    _, plain = range_grad_formula(grad.float(), x.float(), r, 3, *options)
    assert torch.equal(inputs[0].grad, dx.to(dtype))
    assert_accurate(inputs[1].grad, dr, plain, size=grad.double().abs().sum() / 3)


def test_decay_acts_above_its_share_only(backend, device):
    r = tensor([1.0], device)
    x = tensor([[0.5, 0.5, 0.5, 2.0]], device)  # three of four do not clip
    for share, expected in ((0.74, 0.1), (0.75, 0.0), (0.76, 0.0)):
        leaf = r.clone().requires_grad_()
        ops.dac(x, leaf, 1, decay=0.1, input_min_percentage=share).backward(torch.zeros_like(x))
        torch.testing.assert_close(leaf.grad, tensor([expected], device))


def test_a_slice_does_not_see_the_others(backend, device):
    x, grad = randn(9, 30, device=device), randn(9, 30, device=device)
    gradients = []
    for scale in (1.0, 100.0):
        r = tensor([0.5, 0.7, 0.9], device).requires_grad_()
        factors = tensor([1.0] * 10 + [scale] * 20, device)
        ops.dac(x * factors, r, 3).backward(grad * factors)
        gradients.append(r.grad)
    assert gradients[0][0] == gradients[1][0]
    assert (gradients[0][1:] != gradients[1][1:]).all()


def test_a_dynamic_range_is_a_constant_and_nothing_clips(backend, device):
    x = randn(9, 30, device=device).requires_grad_()
    grad = randn(9, 30, device=device)
    ops.dac(x, ops.absmax(x.detach(), 3), 3, 254).backward(grad)
    assert torch.equal(x.grad, grad)


def test_an_expanded_gradient(backend, device):
    x = randn(9, 30, device=device).requires_grad_()
    r = tensor([0.5, 0.7], device).requires_grad_()
    ops.dac(x, r, 2).sum().backward()
    dx, dr = range_grad_formula(torch.ones(9, 30, device=device), x.detach(), r.detach(), 2)
    assert torch.equal(x.grad, dx)
    torch.testing.assert_close(r.grad, dr)
