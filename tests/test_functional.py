"""``analog_linear``: the composed layer against independent formulas, finite differences and torch itself."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triton_analog import ops
from triton_analog.functional import analog_linear, draw_seed, update_input_range
from triton_analog.launch import backend as run_on
from triton_analog.reference import split_sizes

M, K, N, TILE = 37, 50, 21, 20
SEED = 1234
EVERYTHING = {
    "max_input_size": TILE,
    "inp_res": 254,
    "out_noise": 0.04,
    "out_bound": 2.0,
    "out_bound_per_channel": True,
    "out_res": 254,
    "weight_noise": "per_channel",
    "weight_noise_std": 0.03,
    "range_decay": 0.01,
    "input_min_percentage": 0.5,
}


def tensors(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    x, w, b = normal(M, K), 0.2 * normal(N, K), normal(N)
    r = torch.tensor([1.0, -1.5, 2.0], dtype=dtype, device=device)
    clip = (0.15 + 0.2 * normal(3, N).abs()).to(dtype)
    return [t.requires_grad_() for t in (x, w, b, r, clip)]


def seed_on(device="cpu"):
    return torch.tensor([SEED], device=device)


# ---- An independent model: straight-through estimators and torch's own autograd, in fp64 -----------------------------------


class RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return v.round()

    @staticmethod
    def backward(ctx, g):
        return g


class LearnedRangeClamp(torch.autograd.Function):
    """SEMANTICS 6: only gradients that would widen the range count, plus the decay."""

    @staticmethod
    def forward(ctx, x, r, decay, share):
        ctx.save_for_backward(x, r)
        ctx.rule = decay, share
        return x.clamp(-r.abs(), r.abs())

    @staticmethod
    def backward(ctx, g):
        x, r = ctx.saved_tensors
        decay, share = ctx.rule
        dr = g[x >= r.abs()].clamp(max=0).sum() - g[x <= -r.abs()].clamp(min=0).sum()
        dr = dr + decay * float((x.abs() < r.abs()).double().mean() > share)
        return g * (x.abs() <= r.abs()), r * dr, None, None


def plain_model(x, w, b, r, clip, *, seed, inp_res, out_noise, out_bound, out_res, weight_res, std, decay, share):
    """Everything on, written down directly; noise is the library's field, tested elsewhere."""
    round_ = RoundStraightThrough.apply
    z_w = ops.noise(seed, N, K, stream=0).double()
    widths = split_sizes(K, TILE)
    y, start = b, 0
    for s, width in enumerate(widths):
        cut = slice(start, start + width)
        start += width
        x_c = LearnedRangeClamp.apply(x[:, cut], r[s], decay, share)
        step = 2 * r[s].detach().abs() / inp_res
        x_q = round_(x_c / step) * step
        c, q_max = clip[s][:, None], weight_res / 2
        scale = 1 / (q_max * N * width) ** 0.5
        scaled_c = c * scale + (c * (1 - scale)).detach()  # the gradient of c is scaled, its value is not
        v = w[:, cut] / (scaled_c / q_max)
        w_q = round_(v.clamp(-q_max, q_max)) * (scaled_c / q_max)
        w_noisy = w_q + std * c.detach() * z_w[:, cut]
        y_s = x_q @ w_noisy.T
        sigma = out_noise / len(widths) ** 0.5 * r[s].detach().abs() * clip[s].detach().max()
        y_s = y_s + sigma * ops.noise(seed, M, N, stream=1, plane=s).double()
        bound = (out_bound * r[s].abs() * clip[s]).detach()
        y_s = round_(y_s / (2 * bound / out_res)) * (2 * bound / out_res)
        y = y + y_s.clamp(-bound, bound)
    return y


def test_outputs_and_every_gradient_equal_autograd_through_a_plain_model():
    ours, theirs = tensors(torch.float64), tensors(torch.float64)
    x, w, b, r, clip = ours
    y = analog_linear(
        x,
        w,
        b,
        input_range=r,
        weight_clip=clip,
        weight_quantization="per_channel",
        weight_res=30,
        seed=seed_on(),
        **EVERYTHING,
    )
    y_plain = plain_model(
        *theirs,
        seed=seed_on(),
        inp_res=254,
        out_noise=0.04,
        out_bound=2.0,
        out_res=254,
        weight_res=30,
        std=0.03,
        decay=0.01,
        share=0.5,
    )
    torch.testing.assert_close(y, y_plain)
    g = torch.randn_like(y)
    y.backward(g)
    y_plain.backward(g)
    # Autograd through the step c / Q gives t / Q per weight, where SEMANTICS 6 has t.
    theirs[4].grad *= 30 / 2
    for name, a, p in zip(("x", "weight", "bias", "range", "clip"), ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, p.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_smooth_parts_pass_finite_differences():
    x, w, b, r, clip = tensors(torch.float64)
    x, w = x[:5].detach().requires_grad_(), w.detach().requires_grad_()
    clip = w.detach().abs().max() + torch.ones(3, N, dtype=torch.float64)  # a constant scale that clips nothing

    def layer(x, w, b, r):
        return analog_linear(
            x,
            w,
            b,
            input_range=r,
            weight_clip=clip,
            max_input_size=TILE,
            out_bound=0.5,
            weight_noise="per_channel",
            weight_noise_std=0.01,
            fast_mode=True,
            seed=seed_on(),
        )

    r = r.detach()  # the bound moves with the range, and its gradient is not part of the rule
    y = layer(x, w, b, r)
    assert ((y - b).abs() > 0.5).any(), "the bound should act somewhere"
    assert torch.autograd.gradcheck(lambda *a: layer(*a, r), (x, w, b))


def test_fast_mode_is_the_clamps_own_gradient():
    x, w, b, r, _ = tensors(torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, r: analog_linear(x, w, b, input_range=r, max_input_size=TILE, fast_mode=True), (x, r)
    )


# ---- Both backends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["static", "dynamic", "none"])
def test_kernels_and_references_agree_on_outputs_and_gradients(dtype, kind, device):
    results = []
    for name in ("kernel", "reference"):
        x, w, b, r, clip = tensors(dtype, device)
        options = dict(EVERYTHING)
        if kind == "none":
            options |= {"inp_res": -1, "out_noise": 0.0, "out_bound": 0.0, "out_res": -1}
        with run_on(name):
            y = analog_linear(
                x,
                w,
                b,
                input_range=r if kind == "static" else None,
                dynamic_input_range=kind == "dynamic",
                weight_clip=clip,
                seed=seed_on(device),
                **options,
            )
            y.backward(torch.ones_like(y))
        results.append([y, x.grad, w.grad, b.grad, clip.grad] + ([r.grad] if kind == "static" else []))
    epsilon = torch.finfo(dtype).eps
    for a, e in zip(*results, strict=True):
        assert a.dtype == e.dtype
        error = (a.double() - e.double()).norm() / e.double().norm()
        # Two roundings to the storage dtype, and now and then one step of a converter where a value sits on a tie.
        assert error < max(2 * epsilon, 2e-3), error


@pytest.mark.parametrize("shape", [(K,), (1, K), (2, 3, K), (0, K), (2, 0, K)], ids=str)
def test_any_number_of_leading_dimensions(backend, device, shape):
    _, w, b, r, _ = tensors(device=device)
    x = torch.randn(shape, device=device, requires_grad=True)
    y = analog_linear(x, w, b, input_range=r, **EVERYTHING)
    assert y.shape == (*shape[:-1], N)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert w.grad.shape == w.shape
    assert r.grad.isfinite().all()


def test_the_ideal_device_is_torchs_linear(backend, device):
    x, w, b, _, _ = tensors(device=device)
    torch.testing.assert_close(analog_linear(x, w, b), F.linear(x, w, b))
    torch.testing.assert_close(analog_linear(x, w), F.linear(x, w))


def test_non_contiguous_inputs_weights_and_gradients(backend, device):
    x, w, b, r, _ = tensors(device=device)
    options = EVERYTHING | {"seed": seed_on(device)}
    expected = analog_linear(x, w, b, input_range=r, **options)
    expected.sum().backward()
    x_t = x.detach().T.contiguous().T.requires_grad_()
    w_t = torch.cat([w.detach(), w.detach()], dim=1)[:, K:].requires_grad_()
    y = analog_linear(x_t, w_t, b, input_range=r, **options)
    y.sum().backward()  # the gradient of a sum is expanded: stride 0
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x_t.grad, x.grad)
    torch.testing.assert_close(w_t.grad, w.grad)


# ---- Defects of the predecessor, one each --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "features", "tile"), [(torch.float16, 4098, 2049), (torch.bfloat16, 11008, 512)], ids=["fp16", "bf16"]
)
def test_slice_borders_are_exact_in_narrow_dtypes(dtype, features, tile):
    """Borders computed in the layer's dtype would drop the last inputs."""
    x = torch.zeros(1, features, dtype=dtype)
    x[0, -1] = 1
    w = torch.randn(3, features).to(dtype)
    torch.testing.assert_close(analog_linear(x, w, max_input_size=tile), w[:, -1][None])


def test_the_bound_does_not_depend_on_the_scale_of_the_output_noise(backend, device):
    x, w, b, r, _ = tensors(device=device)
    options = EVERYTHING | {"out_bound_per_channel": False, "weight_noise": "none", "out_noise": 1e-12}
    outputs = [
        analog_linear(x, w, b, input_range=r, **options, out_noise_per_channel=per_channel)
        for per_channel in (False, True)
    ]
    torch.testing.assert_close(*outputs)


def test_clips_above_1_are_not_taken_for_step_sizes(backend, device):
    _, w, _, _, _ = tensors(device=device)
    x, w = torch.eye(K, device=device), 10 * w.detach()
    clip = torch.full((3, N), 3.0, device=device)
    y = analog_linear(x, w, weight_clip=clip, max_input_size=TILE)
    torch.testing.assert_close(y, w.clamp(-3, 3).T)
    step = 3 / 15
    y = analog_linear(x, w, weight_clip=clip, max_input_size=TILE, weight_quantization="per_channel", weight_res=30)
    torch.testing.assert_close(y, ((w / step).clamp(-15, 15).round() * step).T)


def test_per_tensor_noise_leaves_per_channel_quantization_alone(backend, device):
    x, w, _, _, _ = tensors(device=device)
    quantization = {"max_input_size": TILE, "weight_quantization": "per_channel", "weight_res": 30}
    expected = analog_linear(x, w, **quantization)
    y = analog_linear(x, w, weight_noise="per_tensor", weight_noise_std=1e-9, **quantization)
    torch.testing.assert_close(y, expected)


# ---- Noise ----------------------------------------------------------------------------------------------------------------


def test_forward_leaves_the_weight_alone(backend, device):
    x, w, b, r, _ = tensors(device=device)
    before, version = w.detach().clone(), w._version
    for training in (True, False):
        for quantization in ("none", "per_channel"):
            analog_linear(
                x,
                w,
                b,
                input_range=r,
                training=training,
                weight_quantization=quantization,
                weight_res=30,
                **EVERYTHING,
            ).sum().backward()
    assert torch.equal(w, before)
    assert w._version == version


def test_the_backward_rebuilds_the_forwards_weight(backend, device):
    x, w, _, _, _ = tensors(device=device)
    seed = seed_on(device)
    first = analog_linear(x, w, weight_noise="per_channel", weight_noise_std=0.1, max_input_size=TILE, seed=seed)
    analog_linear(
        x, w, weight_noise="per_channel", weight_noise_std=0.1, max_input_size=TILE
    )  # another draw in between
    noisy, _ = ops.weight(w.detach(), 3, noise_type="per_channel", std_dev=0.1, seed=seed)
    torch.testing.assert_close(first, F.linear(x, noisy))
    g = torch.randn_like(first)
    first.backward(g)
    torch.testing.assert_close(x.grad, g @ noisy)


def test_noise_follows_manual_seed_and_changes_from_call_to_call():
    x, w, b, r, _ = tensors()

    def call(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        return analog_linear(x, w, b, input_range=r, **EVERYTHING)

    assert torch.equal(call(0), call(0))
    assert not torch.equal(call(), call())


def test_noise_is_off_in_eval():
    x, w, b, r, _ = tensors()
    first, second = (analog_linear(x, w, b, input_range=r, training=False, **EVERYTHING) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("out_bound", [0.0, 1e3])
@pytest.mark.parametrize("tile", [-1, 16, 5])
def test_output_noise_has_the_scale_of_the_formula(out_bound, tile):
    """``out_noise / sqrt(S) * r_s * w_s`` per slice, added up; whatever the slices, with and without an output converter."""
    rows, columns, features = 400, 200, 40
    torch.manual_seed(0)
    x, w = torch.randn(rows, features), torch.randn(columns, features)
    widths = split_sizes(features, tile)
    r = torch.linspace(0.5, 3, len(widths))
    noise = analog_linear(x, w, input_range=r, max_input_size=tile, out_noise=0.1, out_bound=out_bound) - analog_linear(
        x, w, input_range=r, max_input_size=tile
    )
    largest = torch.stack([part.abs().max() for part in w.split(widths, dim=1)])
    sigma = (0.1**2 / len(widths) * (r * largest) ** 2).sum().sqrt()
    assert noise.std().item() == pytest.approx(sigma.item(), rel=5 / (2 * rows * columns) ** 0.5)
    assert abs(noise.mean().item()) < 5 * sigma.item() / (rows * columns) ** 0.5


def test_draw_seed_covers_64_bits():
    seeds = torch.cat([draw_seed("cpu") for _ in range(2000)])
    assert len(seeds.unique()) == 2000
    for half in (seeds & 0xFFFFFFFF, seeds >> 32):
        assert len(half.unique()) > 1990


# ---- What a layer costs --------------------------------------------------------------------------------------------------


def saved_bytes(call, *leaves: Tensor) -> int:
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    for leaf in leaves:
        storages.pop(leaf.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def test_the_backward_keeps_the_input_the_weight_and_one_bit_per_product():
    rows, features, tile = 512, 256, 64
    x = torch.randn(rows, features, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(features, features, dtype=torch.bfloat16, requires_grad=True)
    r = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    options = EVERYTHING | {"max_input_size": tile}
    without_adc = options | {"out_bound": 0.0, "out_res": -1}
    linear = saved_bytes(lambda: F.linear(x, w))
    assert linear == 2 * (rows * features + features * features)
    assert saved_bytes(lambda: analog_linear(x, w, input_range=r, **without_adc)) <= 1.05 * linear
    assert saved_bytes(lambda: analog_linear(x, w, input_range=r, **options)) <= 1.05 * linear + 4 * rows * features / 8


def test_gradients_are_only_found_where_needed():
    x, w, b, r, clip = tensors()
    x = x.detach()
    y = analog_linear(x, w.detach(), b, input_range=r.detach(), weight_clip=clip.detach(), **EVERYTHING)
    y.sum().backward()
    assert b.grad is not None


# ---- Compilers, autocast, checkpoints -----------------------------------------------------------------------------------------


def training_step(x, w, b, r, count, seed):
    update_input_range(x, r, count, max_input_size=TILE, init_from_data=2)
    return analog_linear(x, w, b, input_range=r, seed=seed, **EVERYTHING).square().mean()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_a_training_step_with_a_learned_range_compiles_whole(compiler):
    torch._dynamo.reset()
    compiled = torch.compile(training_step, fullgraph=True, backend=compiler)
    states = []
    for step in (compiled, training_step):
        _, w, b, _, _ = tensors()
        r, count = torch.nn.Parameter(torch.full((3,), 3.0)), torch.zeros(3, dtype=torch.int64)
        for i in range(3):
            x = torch.randn(M + i, K, generator=torch.Generator().manual_seed(i))  # also a dynamic batch size
            step(x, w, b, r, count, seed_on()).backward()
        states.append((w.grad, b.grad, r.grad, r.detach(), count))
    for ours, eager in zip(*states, strict=True):
        torch.testing.assert_close(ours, eager)
    assert states[0][-1].tolist() == [2, 2, 2]


def test_seeds_drawn_in_a_compiled_graph_differ_from_call_to_call():
    torch._dynamo.reset()
    x, w, b, r, _ = tensors()
    compiled = torch.compile(lambda: analog_linear(x, w, b, input_range=r, **EVERYTHING), fullgraph=True)
    assert not torch.equal(compiled(), compiled())


def test_no_graph_breaks_and_no_data_dependent_control_flow():
    _, w, b, _, _ = tensors()
    r, count = torch.nn.Parameter(torch.full((3,), 3.0)), torch.zeros(3, dtype=torch.int64)
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(training_step)(torch.randn(M, K), w, b, r, count, None)
    assert explanation.graph_break_count == 0
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:  # reading a fake number raises
        fakes = [mode.from_tensor(t) for t in (torch.randn(M, K), w, b, r, count)]
        training_step(*fakes, None).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_and_returns_as_linear_does(dtype):
    x, w, b, r, _ = tensors()
    w = w.detach().to(dtype).float().requires_grad_()  # a master weight without bits that a cast would drop
    with torch.autocast("cpu", dtype=dtype):
        y = analog_linear(x, w, b, input_range=r, training=False, **EVERYTHING)
        assert y.dtype == F.linear(x, w, b).dtype == dtype
    y.float().sum().backward()
    assert w.grad.dtype == torch.float32
    half = analog_linear(x.detach().to(dtype), w.detach().to(dtype), b, input_range=r, training=False, **EVERYTHING)
    torch.testing.assert_close(y, half)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_a_batch_once_and_redraws_the_same_noise(reentrant):
    states = []
    for checkpointed in (True, False):
        x, w, b, _, _ = tensors()
        r, count = torch.nn.Parameter(torch.full((3,), 3.0)), torch.zeros(3, dtype=torch.int64)
        torch.manual_seed(7)
        step = partial(training_step, w=w, b=b, r=r, count=count, seed=None)
        loss = torch.utils.checkpoint.checkpoint(step, x, use_reentrant=reentrant) if checkpointed else step(x)
        loss.backward()
        states.append((loss.detach(), x.grad, w.grad, r.grad, r.detach(), count))
    for ours, plain in zip(*states, strict=True):
        torch.testing.assert_close(ours, plain)


def test_two_forwards_before_one_backward():
    """The second forward updates the range in place: what the first one's backward needs has to be a copy."""
    _, w, b, _, _ = tensors()
    r, count = torch.nn.Parameter(torch.full((3,), 3.0)), torch.zeros(3, dtype=torch.int64)

    def two_forwards(take):
        losses = []
        for _ in range(2):
            x = torch.randn(M, K)
            update_input_range(x, r, count, max_input_size=EVERYTHING["max_input_size"])
            losses.append(analog_linear(x, w, b, input_range=take(r), **EVERYTHING).square().mean())
        return sum(losses)

    two_forwards(torch.clone).backward()
    assert r.grad.isfinite().all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        two_forwards(lambda r: r).backward()


def test_two_runs_give_the_same_bits(backend, device):
    def run():
        x, w, b, r, clip = tensors(device=device)
        analog_linear(x, w, b, input_range=r, weight_clip=clip, seed=seed_on(device), **EVERYTHING).sum().backward()
        return [t.grad for t in (x, w, b, r, clip)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


# ---- Range updates --------------------------------------------------------------------------------------------------------


def test_an_empty_batch_changes_no_range():
    for fast_mode in (False, True):
        r, count = torch.full((3,), 3.0), torch.zeros(3, dtype=torch.int64)
        low, high = torch.zeros(3), torch.zeros(3)
        update_input_range(torch.empty(0, K), r, count, max_input_size=TILE, fast_mode=fast_mode, x_min=low, x_max=high)
        assert r.tolist() == [3, 3, 3]
        assert count.tolist() == [0, 0, 0]


def test_half_precision_counts_past_256_batches():
    r, count = torch.ones(1, dtype=torch.bfloat16), torch.tensor([300])
    update_input_range(torch.randn(8, 4).bfloat16(), r, count, init_from_data=500)
    assert count.item() == 301


# ---- NaN policy and bad input ----------------------------------------------------------------------------------------------


def test_nan_stays_in_its_row_and_channel(backend, device):
    x, w, b, r, _ = (t.detach() for t in tensors(device=device))
    x[3, 7], w[5, 9] = torch.nan, torch.nan
    options = EVERYTHING | {"out_noise": 0.0, "weight_noise": "none"}
    bad = analog_linear(x, w, b, input_range=r, **options).isnan()
    expected = torch.zeros_like(bad)
    expected[3], expected[:, 5] = True, True
    assert torch.equal(bad, expected)


def test_a_zero_row_with_a_dynamic_range_and_a_zero_channel_with_quantization(backend, device):
    x, w, b, _, _ = (t.detach() for t in tensors(device=device))
    x[3], w[5] = 0, 0
    options = EVERYTHING | {"weight_quantization": "per_channel", "weight_res": 30, "training": False}
    y = analog_linear(x, w, b, dynamic_input_range=True, **options)
    torch.testing.assert_close(y[3], b)
    torch.testing.assert_close(y[:, 5], b[5].expand(M))


BAD_CALLS = {
    "input_range: .*one range per slice is needed, \\(3,\\)": {"input_range": torch.ones(2)},
    "inp_res: got 254 without an input range.*dynamic_input_range": {
        "input_range": None,
        "out_noise": 0,
        "out_bound": 0,
    },
    "out_noise: got 0.04 without an input range": {"input_range": None, "inp_res": -1, "out_bound": 0},
    "out_bound: got 2.0 without an input range": {"input_range": None, "inp_res": -1, "out_noise": 0},
    "out_res: got 254.* set out_bound > 0": {"out_bound": 0.0},
    "input_range: given together with dynamic_input_range": {"dynamic_input_range": True},
    "weight_noise: got 'gaussian'; allowed are 'none', 'per_tensor', 'per_channel'": {"weight_noise": "gaussian"},
    "weight_noise_std: got -1": {"weight_noise_std": -1.0},
    "out_noise: got nan": {"out_noise": float("nan")},
    "inp_res: got inf": {"inp_res": float("inf")},
    "weight_quantization: 'per_tensor' with a learned clip": {
        "weight_clip": torch.ones(3, N),
        "weight_quantization": "per_tensor",
        "weight_res": 30,
    },
    "weight_res: got 0.0 with weight_quantization": {"weight_quantization": "per_channel"},
    "weight_clip: got shape .*\\(3, 21\\), is needed": {"weight_clip": torch.ones(N)},
}


@pytest.mark.parametrize(("message", "change"), BAD_CALLS.items(), ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_names_the_argument_and_the_remedy(message, change):
    x, w, b, r, _ = tensors()
    with pytest.raises(ValueError, match=message):
        analog_linear(x, w, b, **({"input_range": r} | EVERYTHING | change))


def test_statistics_are_constants_of_the_backward():
    x, w, _, _, _ = tensors()
    y, _ = ops.matmul(
        x, w, None, ops.absmax(x, 3), 3, inp_res=254, out_bound=2.0, bound_wmax=ops.absmax(w, 3), out_res=254
    )
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert w.grad.isfinite().all()


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16], ids=str)
def test_ranges_of_another_dtype(kind, backend, device):
    x, w, b, r, _ = tensors(device=device)
    options = EVERYTHING | {"seed": seed_on(device)}
    other = r.detach().to(kind).requires_grad_()
    y = analog_linear(x, w, b, input_range=other, **options)
    torch.testing.assert_close(y, analog_linear(x, w, b, input_range=r, **options))
    y.sum().backward()
    assert other.grad.dtype == kind


def test_meta_tensors_have_shapes():
    x, w, b, r, _ = (t.to("meta") for t in tensors())
    assert analog_linear(x, w, b, input_range=r, **EVERYTHING).shape == (M, N)


def test_wrong_types():
    x, w, b, r, _ = tensors()
    for name, call in {
        "x: got ndarray": lambda: analog_linear(x.detach().numpy(), w),
        "input_range: got float": lambda: analog_linear(x, w, input_range=3.0),
        "seed: got int": lambda: analog_linear(x, w, weight_noise="per_tensor", weight_noise_std=0.1, seed=3),
        "weight_clip: got list": lambda: analog_linear(x, w, weight_clip=[1.0]),
        r"max_input_size: got 7\.5": lambda: analog_linear(x, w, max_input_size=7.5),
        r"bias: got dtype torch\.complex64": lambda: analog_linear(x, w, b.to(torch.complex64)),
        r"bias: got dtype torch\.int64": lambda: analog_linear(x, w, b.long()),
    }.items():
        with pytest.raises(TypeError, match=name):
            call()
    with pytest.raises(ValueError, match="range_decay: got -1"):
        analog_linear(x, w, b, input_range=r, max_input_size=TILE, range_decay=-1.0)
    with pytest.raises(ValueError, match=r"out_noise: got -0\.1"):
        analog_linear(x, w, b, out_noise=-0.1, training=False)
    with torch.autocast("cpu"), pytest.raises(TypeError, match=r"x: got dtype torch\.int64"):
        analog_linear(x.long(), w, b)


def test_wrong_shapes_dtypes_and_devices():
    x, w, b, _, _ = tensors()
    with pytest.raises(ValueError, match="last dimension must be 50"):
        analog_linear(x[:, :-1], w, b)
    with pytest.raises(ValueError, match=r"bias: got shape \(20,\); \(21,\) is needed"):
        analog_linear(x, w, b[:-1])
    with pytest.raises(TypeError, match=r"x: dtype torch.bfloat16, but weight is torch.float32; .*autocast"):
        analog_linear(x.bfloat16(), w, b)
    with pytest.raises(TypeError, match=r"weight: got dtype torch\.int64"):
        analog_linear(x, w.long(), b)
    with pytest.raises(ValueError, match="weight: on meta, but x is on cpu; move both"):
        analog_linear(x, w.to("meta"))
    with pytest.raises(TypeError, match=r"seed: got torch\.float32"):
        analog_linear(x, w, b, weight_noise="per_channel", weight_noise_std=0.1, seed=torch.ones(1))
