"""SEMANTICS 4: weights clamped to their own unbiased deviations, many at once."""

import pytest
import torch
from helpers import all_dtypes, assert_accurate, randn, viewed

from triton_analog import ops
from triton_analog.ops.clip import COLUMNS, LONGEST, clip_batches

SHAPES = [(1, 2), (7, 45), (48, 32), (3, 2, 5), (6, 4, 3, 3), (70, 16), (9, COLUMNS + 3)]
WIDER = pytest.mark.parametrize("channel_dim", [None, 0, 1], ids=["whole", "rows", "columns"])


def clipped(weight, sigma, channel_dim):
    """By the formula, in the precision of ``weight``."""
    dims = [dim for dim in range(weight.ndim) if dim != channel_dim]
    if weight.numel() < 2 * (1 if channel_dim is None else weight.shape[channel_dim]):
        return weight.clone()
    bound = sigma * weight.std(dim=dims, keepdim=True)
    return weight.clamp(-bound, bound)


def assert_clips(weights, sigmas, channel_dim):
    """Each weight becomes what the formula says, in place."""
    before = [weight.clone() for weight in weights]
    ops.clip(weights, sigmas, channel_dim)
    for weight, old, sigma in zip(weights, before, sigmas, strict=True):
        truth = clipped(old.double(), sigma, channel_dim)
        plain = clipped(old.float(), sigma, channel_dim).to(old.dtype)
        assert_accurate(weight, truth, plain)


def weights_of(shapes, device, dtype=torch.float32):
    return [randn(*shape, device=device, dtype=dtype) * (i + 1) + 0.2 for i, shape in enumerate(shapes)]


@all_dtypes
@WIDER
def test_every_weight_is_clamped_to_its_own_deviations(channel_dim, dtype, backend, device):
    weights = weights_of(SHAPES, device, dtype)
    assert_clips(weights, [0.5 + 0.2 * i for i in range(len(weights))], channel_dim)


@pytest.mark.parametrize("channel_dim", [None, 0])
def test_a_long_channel_takes_several_tiles(channel_dim, backend, device):
    assert_clips(weights_of([(3, 2 * LONGEST + 100)], device), [0.8], channel_dim)


@WIDER
@pytest.mark.parametrize("shape", [(2, 1031), (1031, 2), (70, 90)])
def test_a_large_weight_is_shared_out(shape, channel_dim, backend, device, monkeypatch):
    monkeypatch.setitem(clip_batches.__globals__, "PROGRAM", 512)
    assert_clips(weights_of([shape, (4, 4), shape], device), [1.0, 0.7, 2.0], channel_dim)


@WIDER
@pytest.mark.parametrize("view", ["contiguous", "transposed", "strided", "column_sliced"])
def test_any_memory_layout_and_nothing_beside_it_changes(view, channel_dim, backend, device):
    weight = viewed(randn(9, 33, device=device), view)
    base = weight if weight._base is None else weight._base
    gaps = base.isnan().sum()
    assert_clips([weight], [0.8], channel_dim)
    assert base.isnan().sum() == gaps


@WIDER
def test_channels_last(channel_dim, backend, device):
    weight = randn(6, 5, 3, 3, device=device).to(memory_format=torch.channels_last)
    assert_clips([weight], [0.8], channel_dim)
    assert weight.is_contiguous(memory_format=torch.channels_last)


@WIDER
def test_a_weight_that_starts_anywhere(channel_dim, backend, device):
    memory = randn(16 * 32 + 1, device=device)
    assert_clips([memory[1:].view(16, 32), randn(16, 32, device=device)], [0.8, 0.8], channel_dim)
    before = memory[0].clone()
    assert memory[0] == before


def test_several_dtypes_at_once(backend, device):
    weights = [randn(5, 40, device=device, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    truth = [clipped(weight.double(), 1.0, 0) for weight in weights]
    ops.clip(weights, [1.0] * 3, 0)
    assert torch.equal(weights[2], truth[2])
    for weight, expected in zip(weights[:2], truth[:2], strict=True):
        torch.testing.assert_close(weight, expected.to(weight.dtype))


def test_one_weight_twice_is_clipped_twice_in_order(backend, device):
    weight = randn(12, 40, device=device)
    expected = clipped(clipped(weight.double(), 1.0, 0), 0.5, 0)
    ops.clip([weight, weight], [1.0, 0.5], 0)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "channel_dim"), [((1, 1), None), ((5, 1), 0), ((1, 5), 1), ((0, 3), 0), ((3, 0), 0), ((0,), None)]
)
def test_a_single_number_has_no_deviation(shape, channel_dim, backend, device):
    weight = randn(*shape, device=device)
    before = weight.clone()
    ops.clip([weight], [0.1], channel_dim)
    assert torch.equal(weight, before)


@WIDER
@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_equal_numbers_have_no_deviation(value, channel_dim, backend, device):
    weight = torch.full((4, 600), value, device=device)
    ops.clip([weight], [1.0], channel_dim)
    assert weight.abs().max() <= 1e-6 * abs(value)


@WIDER
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_inf_and_nan_make_nan_of_what_shares_their_deviation(value, channel_dim, backend, device):
    weight = randn(5, 300, device=device)
    weight[2, 130] = value
    expected = clipped(weight, 1.0, channel_dim)
    ops.clip([weight], [1.0], channel_dim)
    assert torch.equal(weight.isnan(), expected.isnan())
    assert weight.isnan().any()


@WIDER
def test_two_runs_give_the_same_bits(channel_dim, backend, device):
    weights = weights_of([(70, 1100)], device)
    twins = [weight.clone() for weight in weights]
    ops.clip(weights, [1.0], channel_dim)
    ops.clip(twins, [1.0], channel_dim)
    assert torch.equal(weights[0], twins[0])


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@WIDER
def test_weights_of_one_kind_are_one_batch_that_serves_again(channel_dim, backend, device):
    weights = weights_of([(32, 48)] * 20, device)
    (batch,) = clip_batches(weights, [1.0] * 20, [channel_dim] * 20)
    for _ in range(2):
        expected = [clipped(weight.double(), 1.0, channel_dim) for weight in weights]
        batch.run()
        for weight, truth in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight.double(), truth, rtol=1e-5, atol=1e-6)
        for weight in weights:
            weight.normal_()


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
def test_the_number_of_launches_does_not_grow_with_the_weights(backend, device, monkeypatch):
    started = []
    module = clip_batches.__globals__
    monkeypatch.setitem(module, "launch", lambda kernel, *args, **options: started.append(kernel.__name__))
    for count in (1, 30):
        weights = weights_of([(32, 48)] * count, device)
        for channel_dim in (None, 0, 1):
            ops.clip(weights, [1.0] * count, channel_dim)
    once = ["part_moments_kernel", "clamp_parts_kernel", "clip_channels_kernel", "clip_channels_kernel"]
    assert started == 2 * once


def test_what_autograd_and_others_look_at(backend, device):
    weight = torch.nn.Parameter(randn(5, 40, device=device))
    version = weight._version
    ops.clip([weight], [0.5], 0)
    assert weight._version > version
    assert weight.is_leaf
    assert weight.grad_fn is None


def test_nothing_to_do(backend):
    ops.clip([], [])


def test_wrong_arguments():
    weight = torch.ones(4, 6)
    for weights, sigmas, channel_dim, error, message in [
        ([weight], [1.0, 1.0], 0, ValueError, "sigmas: got 2 for 1 weights; one for each weight is needed"),
        ([weight], [0.0], 0, ValueError, r"sigmas: got \[0.0\]; allowed are numbers of standard deviations > 0"),
        (
            [weight],
            [1.0],
            2,
            ValueError,
            "channel_dim: got 2 for weights of 2 dimensions and more; allowed are None and",
        ),
        ([weight], [1.0], -1, ValueError, "channel_dim: got -1"),
        ([weight.long()], [1.0], 0, TypeError, "weights: got dtype torch.int64; allowed are float32"),
        ([4.0], [1.0], 0, TypeError, "weights: got float; a torch.Tensor is needed"),
    ]:
        with pytest.raises(error, match=message):
            ops.clip(weights, sigmas, channel_dim)
