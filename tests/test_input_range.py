"""SEMANTICS 6 and 7: the input range's gradient, and its update from data."""

import pytest
import torch
from helpers import all_dtypes, all_views, assert_accurate, cut, randn, range_grad_formula, tensor, viewed
from triton.backends.compiler import GPUTarget

from triton_analog import launch, ops, reference
from triton_analog.ops.input_range import (
    ExtremaConfig,
    InputRangeConfig,
    launch_extrema,
    launch_input_range_grad,
    launch_input_range_learn,
)

SHAPES = [(1, 1, 1), (3, 17, 17), (17, 257, 3), (67, 40, 7)]


def counters(values, device, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=device)


# ---- Gradient -------------------------------------------------------------------------------------------------------


@all_dtypes
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("rows", "features", "slices"), SHAPES)
def test_gradients(rows, features, slices, fast, dtype, backend, device):
    x, grad = (randn(rows, features, device=device, dtype=dtype) for _ in range(2))
    r = randn(slices, device=device)
    dx, dr = ops.input_range_grad(grad, x, r, slices, decay=0.1, input_min_percentage=0.3, fast_mode=fast)
    truth_dx, truth = range_grad_formula(grad.double(), x.double(), r.double(), slices, 0.1, 0.3, fast)
    _, plain = range_grad_formula(grad.float(), x.float(), r, slices, 0.1, 0.3, fast)
    assert torch.equal(dx, truth_dx.to(dtype))
    assert_accurate(dr, truth, plain, size=grad.double().abs().sum() / slices)


@all_views
def test_gradients_of_any_memory_layout(view, backend, device):
    x, grad = (randn(7, 45, device=device) for _ in range(2))
    r = tensor([0.5, -0.8], device)
    expected = ops.input_range_grad(grad, x, r, 2)
    actual = ops.input_range_grad(viewed(grad, view), viewed(x, view), viewed(r[:, None], "strided")[:, 0], 2)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_an_expanded_gradient(backend, device):
    x, one = randn(7, 45, device=device), torch.ones((), device=device)
    r = tensor([0.5, -0.8], device)
    actual = ops.input_range_grad(one.expand(7, 45), x, r, 2, fast_mode=True)
    torch.testing.assert_close(actual, range_grad_formula(one.expand(7, 45), x, r, 2, fast=True))


def test_two_runs_give_the_same_bits(backend, device):
    x, grad = (randn(100, 65, device=device) for _ in range(2))
    r = tensor([0.5, 0.8], device)
    first, second = (ops.input_range_grad(grad, x, r, 2)[1] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("config", [InputRangeConfig(1, 16), InputRangeConfig(16, 32), InputRangeConfig(64, 128)])
def test_any_blocks_are_right(config, backend, device):
    x, grad = (randn(41, 100, device=device) for _ in range(2))
    r = tensor([0.5, 0.8, 1.5], device)
    dx, dr = launch_input_range_grad(grad, x, r, 3, 0.1, 0.5, False, config)
    truth_dx, truth = range_grad_formula(grad.double(), x.double(), r.double(), 3, 0.1, 0.5)
    assert torch.equal(dx, truth_dx.float())
    assert_accurate(dr, truth, range_grad_formula(grad, x, r, 3, 0.1, 0.5)[1], size=grad.abs().sum() / 3)


def test_a_zero_range_has_no_gradient(backend, device):
    x, grad = (randn(7, 9, device=device) for _ in range(2))
    dx, dr = ops.input_range_grad(grad, x, tensor([0.0], device), 1, decay=0.1)
    assert not dx.any()
    assert dr.tolist() == [0]


# ---- Update from the standard deviation -------------------------------------------------------------------------------


def update(r, count, x, slices, init_from_data=100, init_std_alpha=3.0):
    ops.input_range_update(
        r,
        count,
        torch.zeros_like(r),
        ops.moments(x, slices),
        init_from_data=init_from_data,
        init_std_alpha=init_std_alpha,
    )


@pytest.mark.parametrize("start", [3.0, -3.0])
def test_the_running_mean_of_several_batches(start, backend, device):
    r, count = tensor([start, start, 1.0], device), counters([0, 2, 5], device)
    expected, seen = [start, start, 1.0], [0, 2, 5]
    for _ in range(4):
        x = randn(11, 31, device=device)
        update(r, count, x, 3, init_from_data=6, init_std_alpha=2.0)
        for s, part in enumerate(cut(x.double(), 3)):
            if seen[s] < 6:
                expected[s] = abs((expected[s] * seen[s] + 2.0 * float(part.std())) / (seen[s] + 1))
                seen[s] += 1
    torch.testing.assert_close(r.double(), tensor(expected, device, torch.float64), rtol=1e-6, atol=0)
    assert count.tolist() == seen == [4, 6, 6]


def test_a_slice_without_deviation_waits(backend, device):
    r, count = tensor([3.0, 3.0], device), counters([0, 0], device)
    x = randn(11, 20, device=device)
    x[:, :10] = 1.5
    update(r, count, x, 2)
    assert r[0] == 3
    assert r[1] != 3
    assert count.tolist() == [0, 1]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_data_that_are_not_finite_change_nothing(value, backend, device):
    r, count = tensor([3.0, 3.0], device), counters([4, 4], device)
    x = randn(11, 20, device=device)
    x[3, 3] = value
    update(r, count, x, 2)
    assert r[0] == 3
    assert r[1] != 3
    assert count.tolist() == [4, 5]


def test_after_the_start_up_only_the_sign_is_dropped(backend, device):
    r, count = tensor([3.0, -2.0], device), counters([100, 1000], device)
    update(r, count, randn(11, 20, device=device), 2)
    assert r.tolist() == [3, 2]
    assert count.tolist() == [100, 1000]


@pytest.mark.parametrize("count_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_range_follows_500_batches(dtype, count_dtype, backend, device):
    """Half of them with deviation 1, half with 1.5: late ones move the mean by less than a rounding of it."""
    r, count, residual = tensor([2.0], device, dtype), counters([0], device, count_dtype), tensor([0.0], device, dtype)
    for batch in range(500):
        moments = tensor([[100.0, 0.0, 99.0 if batch < 250 else 99.0 * 1.5**2]], device)
        ops.input_range_update(r, count, residual, moments, init_from_data=500, init_std_alpha=3.0)
    assert count.tolist() == [500]
    assert r.dtype == residual.dtype == dtype
    assert abs(r.item() - 3.75) <= 3.75 * torch.finfo(dtype).eps


def test_a_recomputed_forward_does_not_count(backend, device):
    r, count = tensor([3.0], device), counters([0], device)
    x, low, high = randn(5, 7, device=device), tensor([0.0], device), tensor([0.0], device)

    def update_twice(grad):
        update(r, count, x, 1)
        learn(x, r, count, 1)
        ops.input_range_update_fast(r, count, low, high, ops.extrema(x, 1), init_from_data=9, momentum=0.5)

    leaf = torch.ones((), device=device, requires_grad=True)
    leaf.register_hook(update_twice)
    leaf.backward()
    assert (r.tolist(), count.tolist(), low.tolist(), high.tolist()) == ([3], [0], [0], [0])


# ---- Statistics and update at once ----------------------------------------------------------------------------------


def learn(x, r, count, slices, residual=None, init_from_data=100, init_std_alpha=3.0):
    ops.input_range_learn(x, r, count, residual, slices, init_from_data=init_from_data, init_std_alpha=init_std_alpha)


@all_dtypes
@pytest.mark.parametrize("range_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("rows", "features", "slices"), [(2, 17, 17), (17, 257, 3), (67, 40, 7)])
def test_learning_is_the_update_with_the_moments(
    rows, features, slices, count_dtype, range_dtype, dtype, backend, device
):
    start = randn(slices, device=device, dtype=range_dtype)
    counts = torch.arange(slices, device=device, dtype=count_dtype)
    learned, updated = ((start.clone(), counts.clone(), torch.zeros_like(start)) for _ in range(2))
    for _ in range(3):
        x = randn(rows, features, device=device, dtype=dtype)
        learn(x, *learned[:2], slices, learned[2], init_from_data=4)
        sample = reference.moments(x, slices)
        reference.input_range_update(*updated, sample, init_from_data=4, init_std_alpha=3.0)
    assert torch.equal(learned[1], updated[1])
    stored = [(r.float() + residual.float()) for r, _, residual in (learned, updated)]
    torch.testing.assert_close(*stored, rtol=2e-5 if range_dtype == torch.float32 else 2**-14, atol=0)


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
def test_slices_whose_start_up_is_over_are_not_read(backend, device):
    r, count = tensor([3.0, -2.0, 1.0], device), counters([5, 3, 9], device)
    x = randn(11, 31, device=device)
    first, last = cut(x, 3)[0], cut(x, 3)[2]
    first.fill_(torch.nan)
    last.fill_(torch.nan)
    learn(x, r, count, 3, init_from_data=5, init_std_alpha=2.0)
    expected = abs((-2.0 * 3 + 2.0 * float(cut(x.double(), 3)[1].std())) / 4)
    torch.testing.assert_close(r, tensor([3.0, expected, 1.0], device))
    assert count.tolist() == [5, 4, 9]


@all_views
def test_learning_from_any_memory_layout(view, backend, device):
    x = randn(7, 45, device=device)
    r, count = tensor([3.0, 2.0], device), counters([0, 1], device)
    expected = r.clone()
    learn(x, expected, count.clone(), 2)
    learn(viewed(x, view), r, count, 2)
    torch.testing.assert_close(r, expected, rtol=1e-6, atol=0)
    assert count.tolist() == [1, 2]


def test_learning_without_a_residual_drops_it(backend, device):
    r, count = tensor([2.0], device, torch.bfloat16), counters([0], device)
    residual = torch.zeros_like(r)
    x = randn(50, 9, device=device)
    kept = r.clone()
    learn(x, kept, count.clone(), 1, residual)
    learn(x, r, count, 1)
    assert torch.equal(r, kept)
    assert residual.any()


def test_a_batch_of_one_number_teaches_nothing(backend, device):
    r, count = tensor([3.0, 2.0], device), counters([0, 0], device)
    learn(randn(1, 2, device=device), r, count, 2)
    assert (r.tolist(), count.tolist()) == ([3, 2], [0, 0])


def test_statistics_and_update_are_two_launches():
    x, r, count = (torch.empty(*s, device="meta") for s in ((64, 100), (3,), (3,)))
    started = []
    with launch.recording(lambda kernel, *_: started.append(kernel.__name__), GPUTarget("cuda", 90, 32)):
        launch_input_range_learn(x, r, count.long(), None, 3, 100, 3.0)
        launch_extrema(x, 3)
    assert started == ["moments_kernel", "input_range_learn_kernel", "extrema_kernel", "merge_extrema_kernel"]


X, RANGE, COUNT = torch.ones(4, 6), torch.ones(2), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"x": torch.ones(2, 4, 6)}, ValueError, r"x: got shape \(2, 4, 6\); a matrix is needed"),
        ({"x": torch.ones(0, 6)}, ValueError, r"x: got shape \(0, 6\); nothing can be learned from an empty batch"),
        ({"x": X.to("meta")}, ValueError, "input_range: on cpu, but x is on meta; move both to one device"),
        ({"slices": 7}, ValueError, "slices: got 7 for 6 input features"),
        ({"slices": 3}, ValueError, r"input_range: got shape \(2,\); one range per slice is needed, \(3,\)"),
        ({"count": COUNT.float()}, TypeError, "count: got torch.float32; int32 or int64 is needed"),
        ({"residual": X[0]}, ValueError, r"residual: got shape \(6,\)"),
        ({"init_from_data": -1}, ValueError, "init_from_data: got -1; allowed is"),
        ({"init_std_alpha": -1.0}, ValueError, "init_std_alpha: got -1.0; allowed is"),
    ],
)
def test_learning_refuses_what_does_not_fit(changed, error, match):
    arguments = {"x": X, "r": RANGE, "count": COUNT, "slices": 2} | changed
    with pytest.raises(error, match=match):
        learn(**arguments)


# ---- Fast mode ------------------------------------------------------------------------------------------------------


@all_dtypes
@pytest.mark.parametrize(("rows", "features", "slices"), SHAPES)
def test_extrema(rows, features, slices, dtype, backend, device):
    x = randn(rows, features, device=device, dtype=dtype)
    expected = [[part.min() for part in cut(x, slices)], [part.max() for part in cut(x, slices)]]
    assert torch.equal(ops.extrema(x, slices), tensor(expected, device))


@all_views
def test_extrema_of_any_memory_layout(view, backend, device):
    x = randn(7, 45, device=device)
    assert torch.equal(ops.extrema(viewed(x, view), 2), ops.extrema(x, 2))


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("config", [ExtremaConfig(1, 16, 1), ExtremaConfig(16, 32, 9), ExtremaConfig(64, 128)])
def test_blocks_do_not_change_the_extrema(config, backend, device):
    x = randn(41, 100, device=device)
    assert torch.equal(launch_extrema(x, 3, config), ops.extrema(x, 3))


def test_extrema_of_numbers_of_one_sign(backend, device):
    x = randn(7, 45, device=device).abs() + 1
    for signed in (x, -x):
        expected = [[f(part) for part in cut(signed, 2)] for f in (torch.min, torch.max)]
        assert torch.equal(ops.extrema(signed, 2), tensor(expected, device))


@pytest.mark.parametrize("nan", [torch.nan, -torch.nan])
def test_nan_of_either_sign_takes_both_extrema(nan, backend, device):
    x = randn(7, 45, device=device)
    x[2, 30] = nan
    assert ops.extrema(x, 2).isnan().tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize(("value", "expected"), [(torch.inf, [False, True]), (-torch.inf, [True, False])])
def test_extrema_of_infinite_values(value, expected, backend, device):
    x = randn(7, 45, device=device)
    x[2, 30] = value
    assert ops.extrema(x, 2)[:, 1].isinf().tolist() == expected
    assert ops.extrema(x, 2)[:, 0].isfinite().all()
    x[3, 31] = torch.nan
    assert ops.extrema(x, 2).isnan().tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize("momentum", [-1, 0.0, 0.9])
def test_running_extreme_values(momentum, backend, device):
    r, count = tensor([3.0, -3.0], device), counters([0, 0], device)
    x_min, x_max = torch.zeros(2, device=device), torch.zeros(2, device=device)
    low = high = None
    for batch in range(5):
        x = randn(11, 20, device=device) + tensor([2.0] * 10 + [-5.0] * 10, device)
        ops.input_range_update_fast(r, count, x_min, x_max, ops.extrema(x, 2), init_from_data=4, momentum=momentum)
        new_low, new_high = (torch.stack([f(part) for part in cut(x.double(), 2)]) for f in (torch.min, torch.max))
        if batch == 0:
            low, high = new_low, new_high
        elif batch < 4 and momentum == -1:
            low, high = torch.minimum(low, new_low), torch.maximum(high, new_high)
        elif batch < 4:
            low, high = (momentum * old + (1 - momentum) * new for old, new in ((low, new_low), (high, new_high)))
    torch.testing.assert_close(x_min, low.float())
    torch.testing.assert_close(x_max, high.float())
    torch.testing.assert_close(r, torch.maximum(low.abs(), high.abs()).float())
    assert count.tolist() == [4, 4]


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_extreme_values_that_are_not_finite_change_nothing(value, backend, device):
    r, count = tensor([3.0, -3.0], device), counters([1, 1], device)
    x_min, x_max = tensor([-1.0, -1.0], device), tensor([1.0, 1.0], device)
    extrema = tensor([[-2.0, -2.0], [value, 4.0]], device)
    ops.input_range_update_fast(r, count, x_min, x_max, extrema, init_from_data=9, momentum=-1)
    assert (r.tolist(), count.tolist()) == ([3, 4], [1, 2])
    assert (x_min.tolist(), x_max.tolist()) == ([-1, -2], [1, 4])
