"""Optimizers that a trainer builds: analog weights are clipped after each of their steps too, or it is said that they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from triton_analog.config import TorchInferenceRPUConfig, WeightClipType, WeightNoiseInjectionType, WeightNoiseRefresh
from triton_analog.convert import convert_to_analog
from triton_analog.nn import AnalogLinear, AnalogSequential
from triton_analog.optim import AnalogOptimizer, attach


def clipped(kind: WeightClipType = WeightClipType.LAYER_GAUSSIAN) -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.clip.type, config.clip.sigma = kind, 0.5
    return config


def model(dtype: torch.dtype = torch.float32) -> AnalogSequential:
    torch.manual_seed(0)
    return AnalogSequential(
        AnalogLinear(6, 5, dtype=dtype, rpu_config=clipped()),
        nn.ReLU(),
        AnalogLinear(5, 4, dtype=dtype, rpu_config=clipped()),
    )


def step(net: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    torch.manual_seed(1)
    net(torch.randn(3, 6, dtype=next(net.parameters()).dtype)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_the_steps_are_those_of_an_analog_optimizer(options: dict[str, bool]) -> None:
    ours, theirs = model(), model()
    analog = AnalogOptimizer(AdamW, ours.analog_layers, ours.parameters(), lr=0.1, **options)
    plain = AdamW(theirs.parameters(), lr=0.1, **options)
    attachment = attach(theirs, plain)
    for _ in range(3):
        step(ours, analog)
        step(theirs, plain)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(own, other)
    assert attachment.steps == 3


def test_it_can_be_removed_and_is_there_only_once() -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=0.0)
    first, second = attach(net, optimizer), attach(net, optimizer)
    step(net, optimizer)
    assert (first.steps, second.steps) == (0, 1)
    after_one = net[0].weight.clone()
    second.remove()
    step(net, optimizer)
    assert torch.equal(net[0].weight, after_one)
    assert second.steps == 1


def test_noise_that_lasts_a_step_is_drawn_anew() -> None:
    config = TorchInferenceRPUConfig()
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.1
    config.modifier.refresh = WeightNoiseRefresh.STEP
    layer = AnalogLinear(6, 5, rpu_config=config)
    optimizer = SGD(layer.parameters(), lr=0.0)
    attach(layer, optimizer)
    assert layer.weight_noise_seed is not None
    seed = layer.weight_noise_seed.clone()
    step(layer, optimizer)
    assert not torch.equal(layer.weight_noise_seed, seed)


class Wrapper:
    """As accelerate's around an optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def test_the_optimizer_inside_of_a_wrapper_is_found() -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=0.1)
    attachment = attach(net, Wrapper(Wrapper(optimizer)))
    step(net, optimizer)
    assert attachment.steps == 1


def master_copies(net: nn.Module) -> dict[Tensor, Tensor]:
    return {p: p.detach().float().flatten().requires_grad_() for p in net.parameters()}


def step_of_the_copies(net: nn.Module, optimizer: Any, masters: dict[Tensor, Tensor]) -> None:
    """As optimizers with fp32 copies of narrow weights do it, but for the copy after the step."""
    torch.manual_seed(1)
    net.zero_grad()
    net(torch.randn(3, 6, dtype=torch.bfloat16)).square().sum().backward()
    for weight, master in masters.items():
        assert weight.grad is not None
        master.grad = weight.grad.float().flatten()
    optimizer.step()


def test_the_clip_acts_on_the_master_weights() -> None:
    net = model(torch.bfloat16)
    masters = master_copies(net)
    optimizer = SGD(masters.values(), lr=0.01)
    attach(net, optimizer, masters)
    before = masters[net[0].weight].clone()
    step_of_the_copies(net, optimizer, masters)
    master = masters[net[0].weight]
    assert master.grad is not None
    stepped = before - 0.01 * master.grad
    bound = 0.5 * stepped.std()
    torch.testing.assert_close(master, stepped.clamp(-bound, bound))
    assert torch.equal(net[0].weight, master.view_as(net[0].weight).bfloat16())


def test_without_its_copies_an_optimizer_of_copies_is_refused() -> None:
    net = model(torch.bfloat16)
    masters = master_copies(net)
    optimizer = SGD(masters.values(), lr=0.01)
    with pytest.raises(ValueError, match=r"optimizer: it does not step 0\.weight, whose layer clips it.*pass masters"):
        attach(net, optimizer)
    del masters[net[2].weight]
    with pytest.raises(ValueError, match=r"optimizer: it does not step 2\.weight"):
        attach(net, optimizer, masters)
    with pytest.raises(ValueError, match=r"masters: the copy of 0\.weight has 7 elements; 30 are needed"):
        attach(net, optimizer, masters | {net[0].weight: torch.zeros(7)})
    other = {weight: master.clone() for weight, master in master_copies(net).items()}
    with pytest.raises(ValueError, match=r"0\.weight.*a copy of it was given in masters, which is in none"):
        attach(net, optimizer, other)


def test_weights_that_nothing_clips_or_trains_may_be_missing() -> None:
    net = model()
    net[0].weight.requires_grad_(False)
    net[2] = AnalogLinear(5, 4, rpu_config=clipped(WeightClipType.NONE))
    attach(net, SGD([net[0].bias], lr=0.1))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: (nn.Linear(3, 2), SGD([torch.zeros(1)], lr=1.0)), ValueError, "model: it has no analog layers"),
        (lambda: (model(), "adam"), TypeError, "optimizer: got str; a torch.optim.Optimizer is needed"),
        (lambda: ("model", SGD([torch.zeros(1)], lr=1.0)), TypeError, "model: got str; a torch.nn.Module is needed"),
    ],
    ids=["a digital model", "no optimizer", "no model"],
)
def test_wrong_arguments_are_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attach(*make())


def test_an_analog_optimizer_would_clip_twice() -> None:
    net = convert_to_analog(nn.Linear(3, 2), clipped())
    with pytest.raises(ValueError, match="optimizer: it is an AnalogOptimizer, which clips by itself"):
        attach(net, AnalogOptimizer(SGD, net.analog_layers, net.parameters(), lr=0.1))
