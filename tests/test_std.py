"""SEMANTICS 8: count, mean, squared deviations and unbiased standard deviation per slice."""

import pytest
import torch
from helpers import all_dtypes, all_views, assert_accurate, assert_within_a_unit, cut, randn, tensor, viewed
from triton.backends.compiler import GPUTarget

from triton_analog import launch, ops, reference
from triton_analog.ops.std import MAX_PROGRAMS, StdConfig, launch_moments, launch_parts

SHAPES = [(2, 1, 1), (1, 17, 5), (3, 129, 1), (5, 257, 3), (67, 131, 2), (130, 40, 7)]


def formula(x, slices):
    return torch.stack([part.std() if part.numel() > 1 else part.new_zeros(()) for part in cut(x, slices)])


@all_dtypes
@pytest.mark.parametrize(("rows", "features", "slices"), SHAPES)
def test_is_the_unbiased_standard_deviation(rows, features, slices, dtype, backend, device):
    x = randn(rows, features, device=device, dtype=dtype) + 0.5
    assert_accurate(ops.std(x, slices), formula(x.double(), slices), formula(x.float(), slices))


def test_moments_are_count_mean_and_squared_deviations(backend, device):
    x = randn(19, 45, device=device)
    parts = cut(x.double(), 2)
    truth = [[part.numel(), part.mean(), ((part - part.mean()) ** 2).sum()] for part in parts]
    torch.testing.assert_close(ops.moments(x, 2).double(), tensor(truth, device, torch.float64), rtol=1e-6, atol=1e-7)


@all_views
def test_any_memory_layout(view, backend, device):
    x = randn(7, 45, device=device)
    # Not to the bit: a GPU spreads the elements over its threads as they lie in memory, which orders the sums.
    torch.testing.assert_close(ops.moments(viewed(x, view), 2), ops.moments(x, 2), rtol=1e-6, atol=1e-7)


def test_expanded_input(backend, device):
    x = randn(1, 45, device=device).expand(40, 45)
    assert_accurate(ops.std(x, 2), formula(x.double(), 2), formula(x, 2))


@pytest.mark.parametrize("shape", [(1, 1), (1, 3)])
def test_one_element_has_no_deviation(shape, backend, device):
    x = randn(*shape, device=device)
    assert torch.equal(ops.std(x, shape[1]), torch.zeros(shape[1], device=device))


@all_dtypes
@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
@pytest.mark.parametrize(("rows", "features", "slices"), SHAPES)
def test_a_constant_slice_has_no_deviation(rows, features, slices, value, dtype, backend, device):
    x = tensor([[value]], device, dtype).expand(rows, features)
    count, mean, m2 = ops.moments(x, slices).unbind(1)
    assert count.tolist() == [part.numel() for part in cut(x, slices)]
    assert torch.equal(mean, x[0, :1].float().expand(slices))
    assert not m2.any()
    assert not ops.std(x, slices).any()


@pytest.mark.parametrize("mean", [1e4, -1e4])
def test_a_small_deviation_around_a_large_mean(mean, backend, device):
    """A mean kept in fp32 would be off by up to half a unit of 1e4, 5 % of the deviation."""
    x = mean + 1e-2 * randn(300, 257, device=device)
    torch.testing.assert_close(ops.std(x, 3).double(), formula(x.double(), 3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_inf_and_nan_stay_in_their_slice(value, backend, device):
    x = randn(5, 45, device=device)
    x[2, 20] = value
    out = ops.std(x, 3)
    assert out.isnan().tolist() == [False, True, False]
    assert torch.equal(out.isnan(), formula(x, 3).isnan())


def test_two_runs_give_the_same_bits(backend, device):
    x = randn(600, 33, device=device)
    assert torch.equal(ops.moments(x, 2), ops.moments(x, 2))
    assert torch.equal(ops.std(x, 2), ops.std(x, 2))


def test_the_deviation_is_that_of_the_moments(backend, device):
    x = randn(600, 33, device=device)
    assert_within_a_unit(ops.std(x, 2), reference.std_of(ops.moments(x, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "features", "slices"),
    [(2**20, 4096, 8), (8192, 2**16, 1), (2, 2**24, 1), (1, 2**20, 7), (2**24, 3, 3), (2**16, 2**12, 2**12)],
)
def test_the_work_is_spread_over_enough_programs_and_not_too_many(rows, features, slices, dtype):
    x = torch.empty(rows, features, dtype=dtype, device="meta")
    with launch.recording(lambda *launched: None, GPUTarget("cuda", 90, 32)):
        parts = launch_parts(x, slices, None)
    programs = parts.shape[0] * parts.shape[2]
    assert MAX_PROGRAMS / 4 <= programs <= max(2 * MAX_PROGRAMS, slices)


def test_few_long_rows(backend, device):
    x = randn(2, 5000, device=device, dtype=torch.bfloat16)
    assert_accurate(ops.std(x, 2), formula(x.double(), 2), formula(x.float(), 2))


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize(
    "config",
    [StdConfig(1, 1, 16), StdConfig(4, 8, 16, programs=6), StdConfig(2, 4, 32, programs=4), StdConfig(8, 8, 128, 1)],
)
def test_any_blocks_are_right(config, backend, device):
    x = randn(61, 100, device=device) + 3
    out = reference.std_of(launch_moments(x, 3, None, config))
    assert_accurate(out, formula(x.double(), 3), formula(x, 3))


@pytest.mark.parametrize("active", [[True, False, True], [False] * 3, [True] * 3])
def test_slices_that_are_not_active_are_not_read(active, backend, device):
    x = randn(9, 31, device=device)
    expected = ops.moments(x, 3)
    for part, wanted, row in zip(cut(x, 3), active, expected, strict=True):
        if not wanted:
            part.fill_(torch.nan)
            row.zero_()
    assert torch.equal(ops.moments(x, 3, tensor(active, device, torch.bool)), expected)


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
def test_a_counter_below_its_limit_opens_a_slice(backend, device):
    x, count = randn(9, 31, device=device), torch.tensor([4, 5, 6], device=device)
    parts = launch_parts(x, 3, count, limit=5)
    assert parts[:, 0].sum(1).tolist() == [9 * 11, 0, 0]
    assert not parts[1:].any()


def test_merged_moments_are_those_of_the_union(backend, device):
    x = randn(60, 33, device=device) + 10
    parts = torch.stack([ops.moments(part, 2) for part in x.split([1, 42, 17])])
    merged = reference.merge_moments(parts)
    torch.testing.assert_close(merged, ops.moments(x, 2), rtol=1e-5, atol=0)
