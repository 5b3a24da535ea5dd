"""SEMANTICS 4, 5 and 6: weight clip, quantization, noise, and the learned clip's gradient."""

import pytest
import torch
from helpers import (
    all_dtypes,
    all_views,
    assert_accurate,
    cut,
    near_tie,
    num_steps,
    randn,
    round_through,
    seed_of,
    tensor,
    viewed,
)
from hypothesis import given
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget

from triton_analog import launch, ops, reference
from triton_analog.ops.weight import WeightConfig, launch_weight, launch_weight_grad

SHAPES = [(1, 1, 1), (3, 17, 17), (17, 257, 3), (33, 40, 7)]
KINDS = ["none", "per_tensor", "per_channel"]


def scale(wmax, s, kind):
    return wmax[s].max() if kind == "per_tensor" else wmax[s][:, None]


def formula(weight, slices, clip=None, quantization="none", res=0.0):
    """The clipped and quantized weight, and what a rounding the other way would move."""
    parts, slack = [], []
    wmax = clip.abs() if clip is not None else torch.stack([part.abs().amax(-1) for part in cut(weight, slices)])
    for s, part in enumerate(cut(weight, slices)):
        moved = torch.zeros_like(part)
        if quantization != "none":
            n = num_steps(res)
            d = (2 * scale(wmax, s, quantization) / n).expand_as(part)
            steps = torch.clamp(part / d, -n / 2, n / 2)
            part = torch.where(d == 0, 0.0, steps.round() * d)
            moved = torch.where(near_tie(steps), d, 0.0)
        elif clip is not None:
            part = torch.clamp(part, -wmax[s][:, None], wmax[s][:, None])
        parts.append(part)
        slack.append(moved)
    return torch.cat(parts, dim=-1), torch.cat(slack, dim=-1), wmax


def assert_quantizes(weight, slices, clip, quantization, res):
    out, wmax = ops.weight(weight, slices, clip=clip, quantization=quantization, res=res)
    double_clip = None if clip is None else clip.double()
    truth, slack, scales = formula(weight.double(), slices, double_clip, quantization, res)
    assert_accurate(out, truth, truth.to(weight.dtype), slack)
    assert torch.equal(wmax, scales.float())


@all_dtypes
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize(("rows", "features", "slices"), SHAPES)
def test_clips_and_quantizes(rows, features, slices, quantization, clipped, dtype, backend, device):
    if clipped and quantization == "per_tensor":
        quantization = "none"  # a learned clip is per channel
    weight = randn(rows, features, device=device, dtype=dtype)
    clip = randn(slices, rows, device=device) if clipped else None
    bounds = clip if clipped else ops.absmax(weight, slices)
    if dtype != torch.float32 and quantization != "none":  # ratios of short numbers: true ties are common
        _, slack, _ = formula(weight.double(), slices, None if clip is None else bounds.double(), quantization, 30)
        weight = weight.masked_fill(slack > 0, 0)
    assert_quantizes(weight, slices, clip, quantization, 30)


@given(
    rows=st.integers(1, 20),
    features=st.integers(1, 70),
    data=st.data(),
    res=st.sampled_from([2, 30, 254, 1 / 62]),
    quantization=st.sampled_from(KINDS),
    clipped=st.booleans(),
)
def test_any_shape(backend, device, rows, features, data, res, quantization, clipped):
    slices = data.draw(st.integers(1, features))
    clip = randn(slices, rows, device=device) if clipped and quantization != "per_tensor" else None
    assert_quantizes(randn(rows, features, device=device), slices, clip, quantization, res)


@all_views
def test_any_memory_layout(view, backend, device):
    weight = randn(7, 45, device=device)
    clip = randn(2, 7, device=device)
    options = {"quantization": "per_channel", "res": 30}
    out, _ = ops.weight(viewed(weight, view), 2, clip=viewed(clip, view), **options)
    assert out.is_contiguous()
    assert torch.equal(out, ops.weight(weight, 2, clip=clip, **options)[0])


def test_expanded_weight(backend, device):
    row = randn(1, 45, device=device)
    out, wmax = ops.weight(row.expand(5, 45), 2, quantization="per_channel", res=30)
    alone, wmax_alone = ops.weight(row, 2, quantization="per_channel", res=30)
    assert torch.equal(out, alone.expand(5, 45))
    assert torch.equal(wmax, wmax_alone.expand(2, 5))


def test_the_argument_is_never_changed(backend, device):
    weight = randn(9, 45, device=device).requires_grad_()
    before, version = weight.detach().clone(), weight._version
    options = {"quantization": "per_tensor", "res": 30, "noise_type": "per_channel", "std_dev": 0.3}
    out, _ = ops.weight(weight, 2, seed=seed_of(1, device), **options)
    out.sum().backward()
    assert torch.equal(weight, before)
    assert weight._version == version
    assert out.data_ptr() != weight.data_ptr()


def test_nothing_to_do_gives_the_weight(backend, device):
    weight = randn(9, 45, device=device)
    assert torch.equal(ops.weight(weight, 2)[0], weight)


@pytest.mark.parametrize("quantization", ["per_tensor", "per_channel"])
def test_the_grid_has_one_state_more_than_steps_and_spans_the_scale(quantization, backend, device):
    weight = randn(6, 300, device=device) * tensor([[1.0], [2.0], [3.0], [0.5], [4.0], [0.1]], device)
    weight = torch.stack([weight, -weight], dim=-1).flatten(1)
    out, wmax = ops.weight(weight, 2, quantization=quantization, res=14)
    for s, part in enumerate(cut(out, 2)):
        states = (part / (scale(wmax, s, quantization) / 7)).double()
        torch.testing.assert_close(states, states.round(), atol=1e-5, rtol=0)
        assert states.round().unique().tolist() == list(range(-7, 8))


def test_a_zero_channel_gives_zero(backend, device):
    weight = randn(4, 20, device=device)
    weight[1] = 0
    weight[2, 10:] = 0
    out, wmax = ops.weight(weight, 2, quantization="per_channel", res=30)
    assert out.isfinite().all()
    assert not out[1].any()
    assert not out[2, 10:].any()
    assert not wmax[:, 1].any()
    assert not ops.weight(torch.zeros_like(weight), 2, quantization="per_tensor", res=30)[0].any()


@pytest.mark.parametrize("quantization", ["per_tensor", "per_channel"])
def test_weights_of_three_stay_three(quantization, backend, device):
    weight = tensor([[3.0, -3.0, 1.5, 0.0]], device)
    out, _ = ops.weight(weight, 1, quantization=quantization, res=60)
    torch.testing.assert_close(out, weight)


@pytest.mark.parametrize("quantization", ["none", "per_channel"])
def test_a_learned_clip_bounds_by_its_magnitude(quantization, backend, device):
    weight = randn(3, 40, device=device) * 3
    clip = tensor([[0.5, -0.5, 0.0]], device)
    out, wmax = ops.weight(weight, 1, clip=clip, quantization=quantization, res=30)
    assert torch.equal(wmax, clip.abs())
    torch.testing.assert_close(out.abs().amax(1), clip[0].abs())
    positive, _ = ops.weight(weight, 1, clip=clip.abs(), quantization=quantization, res=30)
    assert torch.equal(out, positive)


def test_nan_stays_in_its_channel(backend, device):
    weight = randn(4, 20, device=device)
    weight[1, 3] = torch.nan
    out, _ = ops.weight(weight, 2, quantization="per_channel", res=30)
    assert out.isnan().any(1).tolist() == [False, True, False, False]
    assert out[1, 10:].isfinite().all()


@pytest.mark.parametrize("quantization", ["per_tensor", "per_channel"])
def test_nan_takes_what_its_scale_covers(quantization, backend, device):
    weight = randn(4, 20, device=device)
    weight[1, 3] = torch.nan
    out, wmax = ops.weight(weight, 2, quantization=quantization, res=30)
    assert wmax.isnan().tolist() == [[False, True, False, False], [False] * 4]
    assert out[:, :10].isnan().all(1).tolist() == [quantization == "per_tensor" or n == 1 for n in range(4)]
    assert out[:, 10:].isfinite().all()


# ---- Integers -------------------------------------------------------------------------------------------------------


@all_dtypes
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize(("quantization", "res"), [("per_channel", 254), ("per_tensor", 254), ("per_channel", 1 / 5)])
@pytest.mark.parametrize(("rows", "features", "slices"), [*SHAPES, (3, 96, 2)])
def test_integers_are_the_steps_of_the_quantized_weight(
    rows, features, slices, quantization, res, clipped, dtype, backend, device
):
    weight = randn(rows, features, device=device, dtype=dtype)
    clip = randn(slices, rows, device=device) if clipped and quantization == "per_channel" else None
    options = {"clip": clip, "quantization": quantization, "res": res}
    steps, wmax = ops.weight(weight, slices, dtype=torch.int8, **options)
    quantized, expected_wmax = ops.weight(weight, slices, dtype=torch.float32, **options)
    assert steps.dtype == torch.int8
    assert steps.is_contiguous()
    assert torch.equal(wmax, expected_wmax)
    half = num_steps(res) / 2
    for s, (part, whole) in enumerate(zip(cut(steps, slices), cut(quantized, slices), strict=True)):
        assert part.abs().max() <= round(half)
        step = scale(wmax, s, quantization) / torch.tensor(
            half, device=device
        )  # a GPU divides by a number in two roundings
        assert torch.equal(part.float() * step, whole)


def test_integers_of_a_zero_channel_are_zero(backend, device):
    steps, _ = ops.weight(torch.zeros(3, 20, device=device), 2, quantization="per_channel", res=254, dtype=torch.int8)
    assert not steps.any()


def test_integers_have_no_gradient(backend, device):
    weight, clip = randn(4, 20, device=device).requires_grad_(), randn(2, 4, device=device).requires_grad_()
    steps, wmax = ops.weight(weight, 2, clip=clip, quantization="per_channel", res=254, dtype=torch.int8)
    assert not steps.requires_grad
    assert not wmax.requires_grad


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({}, "quantization 'none', 0 states and noise_type 'none'"),
        ({"quantization": "per_channel", "res": 255}, "quantization 'per_channel', 255 states and noise_type 'none'"),
        (
            {"quantization": "per_tensor", "res": 30, "noise_type": "per_tensor", "std_dev": 0.1},
            "quantization 'per_tensor', 30 states and noise_type 'per_tensor'",
        ),
    ],
)
def test_int8_needs_a_fine_enough_quantization_without_noise(options, given):
    message = (
        f"dtype: got torch.int8 with {given}; allowed for int8 is a quantization to at most 254 states without noise"
    )
    with pytest.raises(ValueError, match=message):
        ops.weight(torch.ones(3, 4), 2, seed=seed_of(1), dtype=torch.int8, **options)
    with pytest.raises(TypeError, match=r"dtype: got torch.int16; allowed are .* int8"):
        ops.weight(torch.ones(3, 4), 2, dtype=torch.int16)


# ---- Launches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "noise_type", "clipped", "launches"),
    [
        ("none", "none", False, ["weight_kernel"]),
        ("per_channel", "per_channel", False, ["weight_kernel"]),
        ("per_channel", "per_channel", True, ["weight_kernel"]),
        ("per_tensor", "none", False, ["absmax_kernel", "weight_kernel"]),
        ("per_channel", "per_tensor", False, ["absmax_kernel", "weight_kernel"]),
        ("per_channel", "per_tensor", True, ["absmax_kernel", "weight_kernel"]),
    ],
)
def test_scales_per_channel_need_one_launch_and_others_two(quantization, noise_type, clipped, launches):
    weight, clip = torch.empty(64, 100, device="meta"), torch.empty(3, 64, device="meta") if clipped else None
    started = []
    with launch.recording(lambda kernel, *_: started.append(kernel.__name__), GPUTarget("cuda", 90, 32)):
        launch_weight(weight, 3, clip, quantization, 30, noise_type, 0.1, seed_of(1, "meta"), torch.float32)
    assert started == launches


# ---- Noise ----------------------------------------------------------------------------------------------------------


@all_dtypes
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("noise_type", ["per_tensor", "per_channel"])
def test_the_noise_is_the_field_times_its_scale(noise_type, clipped, dtype, backend, device):
    weight, seed = randn(17, 131, device=device, dtype=dtype), seed_of(2**40 + 3, device)
    clip = randn(3, 17, device=device) if clipped else None
    out, _ = ops.weight(weight, 3, clip=clip, noise_type=noise_type, std_dev=0.05, seed=seed)
    truth, _, wmax = formula(weight.double(), 3, None if clip is None else clip.double())
    field = reference.noise(seed, 17, 131, stream=0).double()
    parts = [0.05 * scale(wmax, s, noise_type) * z for s, z in enumerate(cut(field, 3))]
    truth = truth + torch.cat(parts, dim=-1)
    assert_accurate(out, truth, truth.to(dtype))


def test_noise_is_added_to_the_quantized_weight(backend, device):
    weight, seed = randn(17, 40, device=device), seed_of(4, device)
    quantized, wmax = ops.weight(weight, 1, quantization="per_channel", res=30)
    options = {"noise_type": "per_channel", "std_dev": 0.1, "seed": seed}
    out, _ = ops.weight(weight, 1, quantization="per_channel", res=30, **options)
    field = reference.noise(seed, 17, 40, stream=0)
    torch.testing.assert_close(out, quantized + 0.1 * wmax[0][:, None] * field)


def test_the_seed_decides_the_weight(backend, device):
    weight = randn(9, 45, device=device)
    draw = [ops.weight(weight, 2, noise_type="per_tensor", std_dev=0.1, seed=seed_of(n, device))[0] for n in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1])
    assert (draw[0] != draw[2]).all()


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("kinds", [("per_channel", "per_tensor"), ("per_channel", "per_channel"), ("none", "none")])
@pytest.mark.parametrize("slices", [2, 3])
@pytest.mark.parametrize("config", [WeightConfig(1, 16), WeightConfig(16, 32), WeightConfig(64, 128)])
def test_blocks_do_not_change_the_weight(config, slices, kinds, backend, device):
    quantization, noise_type = kinds
    arguments = (randn(17, 96, device=device), slices, None, quantization, 30, noise_type, 0.1, seed_of(6, device))
    expected, given = (launch_weight(*arguments, torch.float32, None, c) for c in (None, config))
    assert torch.equal(given[0], expected[0])
    assert torch.equal(given[1], expected[1])


@all_dtypes
def test_the_result_may_have_another_dtype(dtype, backend, device):
    weight = randn(9, 45, device=device).requires_grad_()
    out, wmax = ops.weight(weight, 2, quantization="per_channel", res=30, dtype=dtype)
    assert torch.equal(out, ops.weight(weight, 2, quantization="per_channel", res=30)[0].to(dtype))
    assert wmax.dtype == torch.float32
    out.float().sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


# ---- Gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_type", ["none", "per_channel"])
@pytest.mark.parametrize("quantization", KINDS)
def test_the_gradient_passes_quantization_and_noise(quantization, noise_type, backend, device):
    weight, grad = randn(9, 45, device=device).requires_grad_(), randn(9, 45, device=device)
    options = {"quantization": quantization, "res": 30, "noise_type": noise_type, "std_dev": 0.1}
    ops.weight(weight, 2, seed=seed_of(1, device), **options)[0].backward(grad)
    assert torch.equal(weight.grad, grad)


def lsq_gradients(grad, weight, clip, slices, quantization, res):
    """LSQ by autograd: the step ``d`` is the parameter, its gradient divided by ``sqrt(Q * numel)``."""
    Q = num_steps(res) / 2 if quantization != "none" else 1.0
    dw, dc = [], []
    for g, w, c in zip(cut(grad, slices), cut(weight, slices), clip, strict=True):
        w, d = w.detach().requires_grad_(), (c.abs() / Q)[:, None].detach().requires_grad_()
        q = torch.clamp(w / d, -Q, Q)
        out = (round_through(q) if quantization != "none" else q) * d
        out.backward(g)
        dw.append(w.grad)
        dc.append(torch.where(c < 0, -1, 1) * d.grad[:, 0] / (Q * w.numel()) ** 0.5)
    return torch.cat(dw, dim=-1), torch.stack(dc)


def keep_off_ties(weight, clip, slices, res):
    ratio = [part / (2 * c.abs() / num_steps(res))[:, None] for part, c in zip(cut(weight, slices), clip, strict=True)]
    return weight.masked_fill(near_tie(torch.cat(ratio, dim=-1).double()), 0)


@all_dtypes
@pytest.mark.parametrize("quantization", ["none", "per_channel"])
@pytest.mark.parametrize(("rows", "features", "slices"), SHAPES)
def test_learned_clip_gradients(rows, features, slices, quantization, dtype, backend, device):
    clip = randn(slices, rows, device=device)
    weight = keep_off_ties(randn(rows, features, device=device, dtype=dtype), clip, slices, 30)
    grad = randn(rows, features, device=device, dtype=dtype)
    leaves = weight.clone().requires_grad_(), clip.clone().requires_grad_()
    ops.weight(leaves[0], slices, clip=leaves[1], quantization=quantization, res=30)[0].backward(grad)
    dw, dc = lsq_gradients(grad.double(), weight.double(), clip.double(), slices, quantization, 30)
    _, plain = lsq_gradients(grad.float(), weight.float(), clip, slices, quantization, 30)
    assert_accurate(leaves[0].grad, dw, dw.to(dtype))
    size = 15 * grad.double().abs().sum(1).max() / (15 * rows * features / slices) ** 0.5
    assert_accurate(leaves[1].grad, dc, plain, size=size)


@pytest.mark.parametrize("quantization", ["none", "per_channel"])
def test_a_zero_clip_stops_the_weight_s_gradient_and_can_grow(quantization, backend, device):
    weight, grad = tensor([[0.5, -0.25, 1.0]], device), tensor([[1.0, 10.0, -100.0]], device)
    dw, dc = ops.weight_grad(grad, weight, tensor([[0.0]], device), 1, quantization=quantization, res=30)
    Q = 15 if quantization == "per_channel" else 1
    assert not dw.any()
    torch.testing.assert_close(dc, tensor([[Q * (1 - 10 - 100) / (Q * 3) ** 0.5]], device))


def test_a_weight_at_the_clip_passes(backend, device):
    dw, dc = ops.weight_grad(tensor([[1.0, 1.0]], device), tensor([[0.5, -0.5]], device), tensor([[0.5]], device), 1)
    assert dw.tolist() == [[1, 1]]
    assert dc.tolist() == [[0]]


def test_a_nan_gradient_stays_in_its_slice_and_channel(backend, device):
    weight, grad, clip = (randn(*shape, device=device) for shape in ((4, 45), (4, 45), (3, 4)))
    grad[1, 15] = torch.nan
    dw, dc = ops.weight_grad(grad, weight, clip.abs() + 9, 3, quantization="per_channel", res=30)
    assert dw.isnan().nonzero().tolist() == [[1, 15]]
    assert dc.isnan().nonzero().tolist() == [[1, 1]]


@all_views
def test_gradients_of_any_memory_layout(view, backend, device):
    weight, grad, clip = (randn(*shape, device=device) for shape in ((7, 45), (7, 45), (2, 7)))
    options = {"quantization": "per_channel", "res": 30}
    expected = ops.weight_grad(grad, weight, clip, 2, **options)
    actual = ops.weight_grad(viewed(grad, view), viewed(weight, view), viewed(clip, view), 2, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-5)
    one = torch.ones((), device=device)
    expanded = ops.weight_grad(one.expand(7, 45), weight, clip, 2, **options)
    filled = ops.weight_grad(torch.ones(7, 45, device=device), weight, clip, 2, **options)
    torch.testing.assert_close(expanded, filled, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("config", [WeightConfig(1, 16), WeightConfig(16, 32), WeightConfig(64, 128)])
def test_any_blocks_give_the_gradients(config, backend, device):
    weight, grad, clip = (randn(*shape, device=device) for shape in ((21, 100), (21, 100), (3, 21)))
    weight = keep_off_ties(weight, clip, 3, 30)
    dw, dc = launch_weight_grad(grad, weight, clip, 3, "per_channel", 30, config)
    truth_dw, truth_dc = lsq_gradients(grad.double(), weight.double(), clip.double(), 3, "per_channel", 30)
    assert torch.equal(dw, truth_dw.float())
    assert_accurate(dc, truth_dc, lsq_gradients(grad, weight, clip, 3, "per_channel", 30)[1])
