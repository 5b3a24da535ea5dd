"""Weight noise that lasts for an optimizer step: the same for all of its micro-batches, new for the next, kept and dropped."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from triton_analog import functional, reference
from triton_analog.config import (
    ConfigError,
    TorchInferenceRPUConfig,
    WeightClipType,
    WeightNoiseInjectionType,
    WeightNoiseRefresh,
    WeightQuantizationType,
)
from triton_analog.convert import convert_to_analog, convert_to_digital
from triton_analog.nn import AnalogLinear, AnalogSequential
from triton_analog.optim import AnalogOptimizer

STD = 0.1


def noisy(refresh: WeightNoiseRefresh = WeightNoiseRefresh.STEP) -> TorchInferenceRPUConfig:
    """Three slices of 40 inputs, and weight noise."""
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 16
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, STD
    config.modifier.refresh = refresh
    return config


def everything() -> TorchInferenceRPUConfig:
    """Besides, converters, output noise, a learned range in its start-up, and a learned clip with quantization."""
    config = noisy()
    config.pre_post.input_range.enable = True
    config.forward.inp_res = config.forward.out_res = config.modifier.res = 254
    config.forward.out_bound, config.forward.out_noise = 10.0, 0.02
    config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    config.modifier.quantization_type = WeightQuantizationType.DISCRETIZE_PER_CHANNEL
    return config


def layer(config: TorchInferenceRPUConfig | None = None, **kwargs: Any) -> AnalogLinear:
    return AnalogLinear(40, 8, rpu_config=config or noisy(), **kwargs)


def noise_of(layer: AnalogLinear, forward: Any = None) -> Tensor:
    """The noise that a training forward adds to the weight."""
    eye = torch.eye(layer.in_features, dtype=layer.weight.dtype)
    with torch.no_grad():
        y = (forward or layer)(eye) - (0 if layer.bias is None else layer.bias)
        return y.T - layer.weight


def same(first: Tensor, second: Tensor) -> bool:
    assert first.abs().max() > 1e-3
    return torch.allclose(first, second, atol=1e-5)


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(5, 40)).square().sum().backward()
    optimizer.step()


@pytest.fixture
def weight_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every weight that is made for tiles from now on, by the layer or in a forward or backward."""
    results: list[Tensor] = []
    weight = functional.ops.weight

    def counted(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        result = weight(*args, **kwargs)
        results.append(result[0])
        return result

    monkeypatch.setattr(functional.ops, "weight", counted)

    def composed(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        results.append(reference.weight(*args, **kwargs)[0])
        return reference.weight(*args, **kwargs)

    monkeypatch.setattr(sys.modules["triton_analog.reference.linear"], "modified_weight", composed)
    return results


# ---- How long noise lasts -------------------------------------------------------------------------------------------------


def test_noise_is_new_in_every_forward_by_default() -> None:
    assert TorchInferenceRPUConfig().modifier.refresh is WeightNoiseRefresh.FORWARD
    per_forward = layer(noisy(WeightNoiseRefresh.FORWARD))
    assert per_forward.weight_noise_seed is None
    assert not same(noise_of(per_forward), noise_of(per_forward))
    per_forward.redraw_weight_noise()  # nothing to do


def test_noise_has_the_scale_of_the_config_and_differs_between_layers() -> None:
    first, second = (AnalogLinear(200, 100, rpu_config=noisy()) for _ in range(2))
    assert not same(noise_of(first), noise_of(second))
    largest = reference.absmax(first.weight.detach(), first.slices)
    per_weight = largest.repeat_interleave(torch.tensor(first.get_split_sizes()), 0).T
    assert (noise_of(first) / per_weight).std().item() == pytest.approx(STD, rel=0.05)


@pytest.mark.parametrize("analog", [True, False], ids=["AnalogOptimizer", "SGD"])
@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no clip"])
def test_micro_batches_share_their_noise_and_steps_do_not(analog: bool, clip: bool) -> None:
    config = noisy()
    if clip:
        config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN, 2.0
    model = AnalogSequential(layer(config))
    optimizer: Optimizer = SGD(model.parameters(), lr=0.01)
    if analog:
        optimizer = AnalogOptimizer(SGD, model.analog_layers, model.parameters(), lr=0.01)
    seen: list[Tensor] = []
    for _ in range(3):
        micro_batches = [noise_of(model[0]) for _ in range(3)]
        assert all(same(micro_batches[0], noise) for noise in micro_batches)
        assert not any(same(micro_batches[0], noise) for noise in seen)
        seen.append(micro_batches[0])
        step(model, optimizer)


def test_a_step_reaches_every_layer_also_with_groups_tied_and_frozen_weights() -> None:
    model = AnalogSequential(*(AnalogLinear(40, 40, rpu_config=noisy()) for _ in range(4)))
    model[1].weight = model[0].weight
    model[3].weight.requires_grad_(False)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}]
    optimizer = AnalogOptimizer(AdamW, model.analog_layers, groups, lr=0.01)
    before = [noise_of(layer) for layer in model]
    assert not same(before[0], before[1])  # one weight on the tiles of two layers
    step(model, optimizer)
    after = [noise_of(layer) for layer in model]
    assert not any(map(same, before, after))
    assert all(map(same, after, [noise_of(layer) for layer in model]))


def test_noise_can_be_redrawn_by_hand() -> None:
    model = AnalogSequential(layer(), nn.ReLU(), AnalogSequential(AnalogLinear(8, 4, rpu_config=noisy())))
    before, seeds = noise_of(model[0]), [layer.weight_noise_seed for layer in model.analog_layers()]
    values = [seed.item() for seed in seeds]
    model.redraw_weight_noise()
    assert not same(before, noise_of(model[0]))
    for layer_, seed, value in zip(model.analog_layers(), seeds, values, strict=True):
        assert layer_.weight_noise_seed is seed  # in place: a captured or compiled forward goes on reading it
        assert seed.item() != value


def test_a_weight_changed_by_hand_gets_new_noise() -> None:
    own = layer()
    before = noise_of(own)
    own.set_weights(torch.randn(8, 40))
    assert not same(before, noise_of(own))
    changed = noise_of(own)
    own.weight.data = own.weight.data.clone()  # other memory: other numbers may be in it
    assert not same(changed, noise_of(own))
    own.weight = nn.Parameter(torch.randn(8, 40))
    assert torch.allclose(noise_of(own), noise_of(own))


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_a_fused_step_is_a_change_too(kind: type[Optimizer]) -> None:
    """Though torch does not raise the versions of what it changes."""
    analog, x = layer(), torch.randn(16, 40)
    optimizer = kind(analog.parameters(), lr=0.1, fused=True)  # type: ignore[call-arg]
    analog(x).sum().backward()
    before, version = noise_of(analog), analog.weight._version
    optimizer.step()
    assert analog.weight._version > version
    assert not torch.equal(noise_of(analog), before)


def test_manual_seed_governs_the_noise_that_a_step_draws() -> None:
    noises = []
    for _ in range(2):
        torch.manual_seed(5)
        own = layer()
        optimizer = AnalogOptimizer(SGD, own.analog_layers, own.parameters(), lr=0.01)
        step(own, optimizer)
        noises.append(noise_of(own))
    assert same(*noises)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("analog", [True, False], ids=["AnalogOptimizer", "SGD"])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool, analog: bool) -> None:
    """Also in the forward that finds a changed weight, whose recomputation finds it unchanged."""
    config = everything()
    config.pre_post.input_range.init_from_data = 0
    model = AnalogSequential(layer(config), nn.Dropout(0.5), AnalogLinear(8, 8, rpu_config=config))
    twin = copy.deepcopy(model)
    x, gradients = torch.randn(3, 5, 40), []
    for net, checkpointed in ((model, True), (twin, False)):
        torch.manual_seed(3)
        optimizer: Optimizer = SGD(net.parameters(), lr=0.01)
        if analog:
            optimizer = AnalogOptimizer(SGD, net.analog_layers, net.parameters(), lr=0.01)
        for batch in x:
            optimizer.zero_grad()
            inputs = batch.clone().requires_grad_()
            y = checkpoint(net, inputs, use_reentrant=reentrant) if checkpointed else net(inputs)
            y.square().sum().backward()
            gradients.append([inputs.grad, *(parameter.grad.clone() for parameter in net.parameters())])
            optimizer.step()
    for ours, plain in zip(gradients[:3], gradients[3:], strict=True):
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one, other)


# ---- The noisy weight ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("analog", [True, False], ids=["AnalogOptimizer", "SGD"])
def test_the_noisy_weight_is_made_once_per_step(analog: bool, weight_calls: list[Tensor]) -> None:
    own = layer(everything())
    optimizer: Optimizer = SGD(own.parameters(), lr=0.01)
    if analog:
        optimizer = AnalogOptimizer(SGD, own.analog_layers, own.parameters(), lr=0.01)
    for steps in range(1, 4):
        for _ in range(3):
            own(torch.randn(5, 40)).square().sum().backward()
        assert len(weight_calls) == steps
        optimizer.step()


def test_without_it_every_forward_and_backward_makes_its_own(weight_calls: list[Tensor]) -> None:
    own = layer(noisy(WeightNoiseRefresh.FORWARD))
    own(torch.randn(5, 40, requires_grad=True)).sum().backward()
    assert len(weight_calls) == 2


def test_gradients_are_those_of_the_noisy_weight() -> None:
    own = layer()
    noise = noise_of(own)
    for _ in range(2):
        x, g = torch.randn(5, 40, requires_grad=True), torch.randn(5, 8)
        own.zero_grad()
        own(x).backward(g)
        torch.testing.assert_close(x.grad, g @ (own.weight + noise).detach())
        torch.testing.assert_close(own.weight.grad, g.T @ x.detach())
        torch.testing.assert_close(own.bias.grad, g.sum(0))


def test_gradients_also_reach_a_learned_clip_and_equal_those_without_the_kept_weight() -> None:
    own = layer(everything())
    with torch.no_grad():
        own.learnable_weight_clip.mul_(0.6)
    x = torch.randn(5, 40)
    own(x)
    own.input_range_update_idx.fill_(100)
    numbers = own._numbers()._asdict()
    assert numbers.pop("clips_gradient")  # a split layer's own business, which the function does not offer
    gradients = []
    for kept in (True, False):
        own.zero_grad()
        inputs = x.clone().requires_grad_()
        torch.manual_seed(0)
        if kept:
            y = own(inputs)
        else:
            y = functional.analog_linear(
                inputs, own.weight, own.bias, input_range=own.input_range, weight_clip=own.learnable_weight_clip,
                weight_seed=own.weight_noise_seed, **numbers,
            )  # fmt: skip
        y.square().sum().backward()
        gradients.append([y.detach(), inputs.grad, *(parameter.grad.clone() for parameter in own.parameters())])
    assert own.learnable_weight_clip.grad.any()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_number_of_the_config_or_a_clip_that_changes_makes_another_weight(weight_calls: list[Tensor]) -> None:
    own, x = layer(everything()), torch.randn(5, 40)
    for calls, change in enumerate(
        [
            lambda: None,
            lambda: setattr(own.rpu_config.modifier, "std_dev", 0.2),
            lambda: setattr(own.rpu_config.modifier, "res", 30),
            lambda: own.learnable_weight_clip.detach().mul_(0.5),
            lambda: own.weight_noise_seed.add_(1),
        ],
        start=1,
    ):
        change()
        own(x)
        own(x)
        assert len(weight_calls) == calls
    assert not torch.equal(weight_calls[-1], weight_calls[-2])


def test_autocast_gets_the_weight_in_its_dtype(weight_calls: list[Tensor]) -> None:
    own, x = layer(), torch.randn(5, 40)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = own(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    (weight,) = weight_calls
    assert weight.dtype == torch.bfloat16
    assert own.weight.grad.dtype == torch.float32
    assert own(x).dtype == torch.float32
    assert [result.dtype for result in weight_calls] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_trains(dtype: torch.dtype) -> None:
    own = layer(everything(), dtype=dtype)
    own(torch.randn(6, 40, dtype=dtype)).float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in own.parameters())


def test_evaluation_uses_no_noise_and_comes_back_to_the_same() -> None:
    own, x = layer(), torch.randn(5, 40)
    noise = noise_of(own)
    own.eval()
    torch.testing.assert_close(own(x), nn.functional.linear(x, own.weight, own.bias))
    own.train()
    assert same(noise, noise_of(own))


@pytest.mark.parametrize(
    "drop",
    [
        lambda own: own.eval(),
        lambda own: own.load_state_dict(own.state_dict()),
        lambda own: own.to(torch.float64),
        lambda own: own.redraw_weight_noise(),
        lambda own: own.reconfigure(noisy(WeightNoiseRefresh.FORWARD)),
    ],
    ids=["eval", "load", "to", "redraw", "reconfigure"],
)
def test_the_noisy_weight_is_dropped(drop: Any, weight_calls: list[Tensor]) -> None:
    own = layer()
    own(torch.randn(5, 40, requires_grad=True)).sum().backward()
    alive = weakref.ref(weight_calls.pop())
    gc.collect()
    assert alive() is not None
    drop(own)
    gc.collect()
    assert alive() is None


def test_the_noisy_weight_keeps_no_graph_alive(weight_calls: list[Tensor]) -> None:
    own = layer(everything())
    x = torch.randn(5, 40, requires_grad=True)
    before = x * 2
    before.register_hook(hook := nn.Identity())  # what the graph holds
    y = own(before)
    assert not weight_calls[0].requires_grad
    alive = weakref.ref(hook)
    del before, hook
    assert alive() is not None
    del y
    gc.collect()
    assert alive() is None


def test_a_forward_in_inference_mode_keeps_nothing() -> None:
    own = layer()
    with torch.inference_mode():
        own(torch.randn(5, 40))
    own(torch.randn(5, 40, requires_grad=True)).sum().backward()
    with torch.inference_mode():
        own.redraw_weight_noise()
    own(torch.randn(5, 40, requires_grad=True)).sum().backward()


# ---- Copies, state, other kinds of weight -----------------------------------------------------------------------------------


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_copies_have_the_noise_but_not_the_noisy_weight(copied: Any, weight_calls: list[Tensor]) -> None:
    own = layer()
    fresh = len(pickle.dumps(own))
    noise = noise_of(own)
    assert len(pickle.dumps(own)) - fresh < 4 * own.weight.numel() / 2  # a config that was checked, no weight
    other = copied(own)
    assert len(weight_calls) == 1
    assert same(noise, noise_of(other))
    assert len(weight_calls) == 2
    other.redraw_weight_noise()
    assert not same(noise, noise_of(other))
    assert same(noise, noise_of(own))


def test_neither_seed_nor_noisy_weight_is_in_the_state_dict() -> None:
    own = layer()
    noise_of(own)
    assert set(own.state_dict()) == {"weight", "bias", "_extra_state"}
    assert not list(own.buffers())
    assert layer(noisy(WeightNoiseRefresh.FORWARD)).load_state_dict(own.state_dict())


def test_a_state_dict_brings_the_seed_that_its_config_needs() -> None:
    other = layer(noisy(WeightNoiseRefresh.FORWARD))
    other.load_state_dict(layer().state_dict())
    assert other.weight_noise_seed.shape == (1,)
    assert same(noise_of(other), noise_of(other))


@pytest.mark.parametrize("how", ["assign", "to_empty"])
def test_a_layer_without_memory_gets_a_seed_with_its_weight(how: str) -> None:
    own = layer(device="meta")
    assert own.weight_noise_seed.is_meta
    if how == "assign":
        own.load_state_dict(layer().state_dict(), assign=True)
    else:
        own.to_empty(device="cpu").reset_parameters()
    assert own.weight_noise_seed.device.type == "cpu"
    assert own.weight_noise_seed.dtype == torch.int64
    assert same(noise_of(own), noise_of(own))


def test_moving_a_layer_keeps_its_noise() -> None:
    own = layer()
    noise = noise_of(own)
    own.double()
    assert own.weight_noise_seed.dtype == torch.int64
    assert same(noise.double(), noise_of(own))
    assert own.to("meta").weight_noise_seed.is_meta


def test_a_refused_call_draws_nothing() -> None:
    own = layer()
    own.set_weights(torch.randn(8, 40))
    seed, state = own.weight_noise_seed.item(), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"x: got shape \(3, 39\)"):
        own(torch.randn(3, 39, generator=torch.Generator()))
    assert own.weight_noise_seed.item() == seed
    assert torch.equal(torch.get_rng_state(), state)


def test_a_weight_computed_from_others_has_lasting_noise() -> None:
    own = parametrizations.weight_norm(layer())
    optimizer = SGD(own.parameters(), lr=0.01)
    first = noise_of(own)
    assert same(first, noise_of(own))
    step(own, optimizer)
    assert not same(first, noise_of(own))


def test_a_refresh_changed_by_hand_is_refused_and_reconfigure_does_it() -> None:
    own = layer(noisy(WeightNoiseRefresh.FORWARD))
    own.rpu_config.modifier.refresh = WeightNoiseRefresh.STEP
    with pytest.raises(ConfigError, match=r"modifier\.refresh: the config was changed .* layer\.reconfigure"):
        own(torch.randn(5, 40))
    own.reconfigure(noisy())
    assert same(noise_of(own), noise_of(own))
    own.reconfigure(noisy(WeightNoiseRefresh.FORWARD))
    assert not same(noise_of(own), noise_of(own))


def test_conversion_to_analog_and_back_leaves_no_seed_behind() -> None:
    model = convert_to_analog(nn.Sequential(nn.Linear(40, 8)), noisy())
    assert same(noise_of(model[0]), noise_of(model[0]))
    assert not {"weight_noise_seed", "_kept_noise"} & vars(convert_to_digital(model)[0]).keys()


# ---- Compiled ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_forward_reads_the_seed(compiler: str) -> None:
    torch._dynamo.reset()
    model = AnalogSequential(layer())
    compiled: Any = torch.compile(model, fullgraph=True, backend=compiler)
    optimizer = AnalogOptimizer(SGD, model.analog_layers, model.parameters(), lr=0.01)
    seen: list[Tensor] = []
    for _ in range(3):
        noise = noise_of(model[0], compiled)
        assert same(noise, noise_of(model[0], compiled))
        assert same(noise, noise_of(model[0]))  # eager mode has the same noise
        assert not any(same(noise, other) for other in seen)
        seen.append(noise)
        step(compiled, optimizer)


def test_a_compiled_layer_is_one_graph_that_stays_and_computes_the_same() -> None:
    torch._dynamo.reset()
    config = everything()
    config.forward.out_noise = 0.0  # eager mode draws a seed in each forward, used or not
    own = layer(config)
    twin = copy.deepcopy(own)
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            x = torch.randn(5, 40)
            for model in (compiled, twin):
                model(x).square().sum().backward()
            own.redraw_weight_noise()
            twin.weight_noise_seed.copy_(own.weight_noise_seed)
    for (name, one), other in zip(own.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


# ---- On a GPU -----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_forward_reads_the_seed_and_never_waits() -> None:
    config = everything()
    config.forward.out_noise = 0.0
    own, x = layer(config).cuda(), torch.randn(5, 40, device="cuda")
    optimizer = AnalogOptimizer(SGD, own.analog_layers, own.parameters(), lr=0.01)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            own(x).square().sum().backward()
            optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        own(x).square().sum().backward()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    own.input_range_update_idx.fill_(100)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = own(x)
        y.square().sum().backward()
    for _ in range(3):
        outputs = []
        for _ in range(2):
            graph.replay()
            outputs.append(y.clone())
        assert torch.equal(*outputs)
        torch.testing.assert_close(own(x), outputs[0])
        optimizer.step()
        graph.replay()
        assert not torch.allclose(y, outputs[0])
