"""Layers and operations under the transforms of ``torch.func``: what autograd, or a loop, gives; or a refusal that says why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import needs_interpreter
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, stack_module_state, vmap

from triton_analog import TorchInferenceRPUConfig, convert_to_analog, ops
from triton_analog.config import WeightClipType, WeightNoiseInjectionType, WeightNoiseRefresh, WeightQuantizationType
from triton_analog.functional import analog_linear, draw_seed
from triton_analog.nn import AnalogConv1d, AnalogLSTMCell, AnalogRNN
from triton_analog.optim import AnalogOptimizer

FEATURES, OUTPUTS, BATCH = 12, 3, 5
Change = Callable[[TorchInferenceRPUConfig], None]


def everything(change: Change | None = None) -> TorchInferenceRPUConfig:
    """Converters and a learned range, past its start-up; nothing random."""
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 5
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.init_from_data = 0
    config.pre_post.input_range.init_value = 1.5
    config.forward.inp_res = config.forward.out_res = 254
    config.forward.out_bound = 2.0
    if change is not None:
        change(config)
    return config


def dynamic(config: TorchInferenceRPUConfig) -> None:
    config.pre_post.input_range.dynamic = True


def learned_clip(config: TorchInferenceRPUConfig) -> None:
    config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    config.modifier.quantization_type, config.modifier.res = WeightQuantizationType.DISCRETIZE_PER_CHANNEL, 30


def noisy(config: TorchInferenceRPUConfig) -> None:
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.1
    config.forward.out_noise = 0.1


def lasting(config: TorchInferenceRPUConfig) -> None:
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.1
    config.modifier.refresh = WeightNoiseRefresh.STEP


def starting(config: TorchInferenceRPUConfig) -> None:
    config.pre_post.input_range.init_from_data = 2


def model(change: Change | None = None) -> Any:
    digital = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, OUTPUTS))
    return convert_to_analog(digital, everything(change))


def loss_of(net: nn.Module) -> Callable[..., Tensor]:
    return lambda parameters, x: functional_call(net, parameters, (x,)).square().sum()


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def by_autograd(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    net(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# ---- Layers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [None, dynamic, learned_clip, noisy, lasting])
def test_grad_is_the_gradient_of_autograd(change: Change | None) -> None:
    net, x = model(change), torch.randn(BATCH, FEATURES)
    torch.manual_seed(1)
    found = grad(loss_of(net))(values(net), x)
    torch.manual_seed(1)
    assert_same(found, by_autograd(net, x))


@needs_interpreter
def test_per_sample_gradients_are_those_of_a_loop(backend: str, device: torch.device) -> None:
    net, x = model(learned_clip).to(device), torch.randn(2, FEATURES, device=device)
    found = vmap(grad(loss_of(net)), (None, 0))(values(net), x)
    for i in range(2):
        assert_same({name: one[i] for name, one in found.items()}, by_autograd(net, x[i]))


@pytest.mark.parametrize("change", [None, dynamic, learned_clip])
@pytest.mark.parametrize("training", [True, False])
def test_a_stacked_ensemble_computes_and_trains_as_each_model_alone(change: Change | None, training: bool) -> None:
    nets, x = [model(change).train(training) for _ in range(3)], torch.randn(BATCH, FEATURES)
    parameters, buffers = stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to("meta")
    together = vmap(lambda *state: functional_call(base, state, (x,)), randomness="error")
    with torch.no_grad():
        assert torch.equal(together(parameters, buffers), torch.stack([net(x) for net in nets]))
    together(parameters, buffers).square().sum().backward()
    for i, net in enumerate(nets):
        assert_same({name: one.grad[i] for name, one in parameters.items()}, by_autograd(net, x))


class Sequence(nn.Module):
    """A recurrent layer by its outputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = AnalogRNN(AnalogLSTMCell, 4, 6, batch_first=True, rpu_config=everything())

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: AnalogConv1d(4, 6, 3, padding=1, groups=2, rpu_config=everything()), (2, 4, 7)),
        (Sequence, (2, 3, 4)),
    ],
    ids=["convolution", "recurrent"],
)
def test_other_layers_too(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    layer, x = make(), torch.randn(BATCH, *shape)
    found = vmap(grad(loss_of(layer)), (None, 0))(values(layer), x)
    for i in range(BATCH):
        assert_same({name: one[i] for name, one in found.items()}, by_autograd(layer, x[i]))


def test_a_jacobian_is_that_of_autograd() -> None:
    net, x = model(), torch.randn(FEATURES)
    assert torch.equal(jacrev(net)(x), torch.autograd.functional.jacobian(net, x))


# ---- Noise --------------------------------------------------------------------------------------------------------------


def test_randomness_decides_about_noise_as_about_dropout() -> None:
    net, x = model(noisy), torch.randn(1, FEATURES).expand(BATCH, FEATURES)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(net)(x)
    assert len(vmap(net, randomness="same")(x).unique(dim=0)) == 1
    assert len(vmap(net, randomness="different")(x).unique(dim=0)) == BATCH


def test_a_given_seed_is_a_tensor_like_any_other() -> None:
    x, w = torch.randn(BATCH, FEATURES), torch.randn(OUTPUTS, FEATURES)
    seeds = torch.stack([draw_seed("cpu") for _ in range(BATCH)])

    def call(x: Tensor, seed: Tensor) -> Tensor:
        return analog_linear(x, w, weight_noise="per_channel", weight_noise_std=0.1, seed=seed)

    assert torch.equal(vmap(call)(x, seeds), torch.stack([call(*one) for one in zip(x, seeds, strict=True)]))


def test_noise_that_lasts_is_read_and_not_drawn() -> None:
    net, x = model(lasting), torch.randn(BATCH, FEATURES)
    first = vmap(net)(x)
    assert torch.equal(first, vmap(net)(x))
    assert torch.equal(first, net(x))
    net.redraw_weight_noise()
    assert not torch.equal(first, vmap(net)(x))


# ---- The start-up of ranges ---------------------------------------------------------------------------------------------


def test_a_start_up_is_refused_and_changes_nothing_and_may_run_before() -> None:
    net, x = model(starting), torch.randn(BATCH, FEATURES)
    before = copy.deepcopy(net.state_dict())
    for transform in (vmap(net), vmap(grad(lambda x: net(x).sum())), grad(lambda x: net(x).sum())):
        with pytest.raises(
            RuntimeError, match=r"AnalogLinear still learns its input range .* \(0 of 2 .*init_from_data = 0"
        ):
            transform(x)
    assert_same(net.state_dict(), before)
    vmap(net.eval())(x)
    net.train()
    for _ in range(2):
        net(x)
    assert_same(grad(loss_of(net))(values(net), x), by_autograd(net, x))


def test_functional_call_starts_the_ranges_up_that_it_is_given() -> None:
    """However many of them there are, and whatever the layer's own have seen."""
    net, x = model(starting), [torch.randn(BATCH, FEATURES) for _ in range(2)]
    own = copy.deepcopy(net.state_dict())
    alone = copy.deepcopy(net)
    for batch in x:
        alone(batch)
    for trained in (False, True):
        if trained:
            for _ in range(3):
                net(torch.randn(BATCH, FEATURES))
        for _ in range(2):
            state = {name: value.clone() for name, value in own.items() if "_extra_state" not in name}
            for batch in x:
                functional_call(net, state, (batch,))
            assert_same(state, {name: alone.state_dict()[name] for name in state})


# ---- Refusals -----------------------------------------------------------------------------------------------------------


def test_what_has_no_derivative_says_so() -> None:
    net, x = model(), torch.randn(FEATURES)
    with pytest.raises(NotImplementedError, match=r"analog_linear has no forward-mode derivative .*jacrev"):
        hessian(lambda x: net(x).sum())(x)
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        grad(lambda x: grad(lambda x: net(x).square().sum())(x).sum())(x)
    with pytest.raises(NotImplementedError, match=r"is_grads_batched.*torch\.func\.jacrev"):
        torch.autograd.functional.jacobian(net, x, vectorize=True)


def test_changes_in_place_are_refused() -> None:
    x = torch.randn(BATCH, 2, FEATURES)
    with pytest.raises(RuntimeError, match="clip changes weights in place"):
        vmap(lambda x: ops.clip([x], [1.0]))(x)


# ---- Compiled -----------------------------------------------------------------------------------------------------------


def test_a_compiled_transform() -> None:
    net, x = model(), torch.randn(BATCH, FEATURES)
    per_sample = vmap(grad(loss_of(net)), (None, 0))
    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    assert_same(compiled(values(net), x), per_sample(values(net), x))


def test_a_transform_leaves_no_trace_on_the_layer() -> None:
    """An optimizer steps it afterwards as if nothing had been."""
    net, x = model(noisy), torch.randn(BATCH, FEATURES)
    other = copy.deepcopy(net)
    vmap(grad(loss_of(net)), (None, 0), randomness="different")(values(net), x)
    for one in (net, other):
        torch.manual_seed(2)
        optimizer = AnalogOptimizer(torch.optim.SGD, one.analog_layers, one.parameters(), lr=0.1)
        one(x).square().sum().backward()
        optimizer.step()
    assert_same(values(net), values(other))
