"""Averages of models, EMA and SWA, however they are made: their input ranges do not start anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

from triton_analog import TorchInferenceRPUConfig, convert_to_analog, restore_analog

BATCHES = 10
"""Of the start-up."""


def digital() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))


def model(dtype: torch.dtype = torch.float32, fast: bool = False) -> Any:
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 5
    config.forward.inp_res = 254
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.init_from_data = BATCHES
    config.pre_post.input_range.fast_mode = fast
    return convert_to_analog(digital().to(dtype), config)


def train(net: Any, steps: int, each: Any = lambda: None) -> None:
    optimizer = SGD(net.parameters(), lr=0.01)
    dtype = next(net.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(16, 8, dtype=dtype)).square().sum().backward()
        optimizer.step()
        each()


def ranges(net: Any) -> list[Tensor]:
    return [layer.input_range.detach().clone() for layer in net.analog_layers()]


def goes_on(net: Any) -> bool:
    """Whether a training forward changes the ranges of ``net``: their start-up goes on."""
    before = ranges(net)
    net.train()
    net(100 * torch.randn(16, 8, dtype=next(net.parameters()).dtype))
    return not all(map(torch.equal, before, ranges(net)))


class Timm:
    """An average that is made from the values of two state dicts."""

    def __init__(self, net: nn.Module, whole_numbers: str, decay: float = 0.999) -> None:
        self.module, self.whole_numbers, self.decay = copy.deepcopy(net), whole_numbers, decay

    @torch.no_grad()
    def update_parameters(self, net: nn.Module) -> None:
        for own, new in zip(self.module.state_dict().values(), net.state_dict().values(), strict=True):
            if own.is_floating_point() or self.whole_numbers == "averaged":
                own.copy_(self.decay * own + (1 - self.decay) * new)
            else:
                own.copy_(new)


class Reloaded:
    """An average of two state dicts that is loaded each time."""

    def __init__(self, net: nn.Module) -> None:
        self.module = copy.deepcopy(net)

    def update_parameters(self, net: nn.Module) -> None:
        own, new = self.module.state_dict(), net.state_dict()
        self.module.load_state_dict({name: own[name] * 0.9 + new[name] * 0.1 for name in own})


AVERAGES = {
    "SWA": AveragedModel,
    "SWA with buffers": lambda net: AveragedModel(net, use_buffers=True),
    "EMA": lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999)),
    "EMA with buffers": lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True),
    "slow EMA with buffers": lambda net: AveragedModel(
        net, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True
    ),
    "EMA one by one with buffers": lambda net: AveragedModel(net, avg_fn=get_ema_avg_fn(0.9), use_buffers=True),
    "state dict, whole numbers averaged": lambda net: Timm(net, "averaged"),
    "state dict, whole numbers copied": lambda net: Timm(net, "copied"),
    "state dict, loaded": Reloaded,
}


CASES = [(kind, False) for kind in AVERAGES] + [
    (kind, True) for kind in AVERAGES if "averaged" not in kind and "loaded" not in kind
]
"""In the fast mode nothing in a state dict but the counters says that the start-up is over."""


@pytest.mark.parametrize(("kind", "fast"), CASES, ids=[f"{kind}{', fast mode' * fast}" for kind, fast in CASES])
@pytest.mark.parametrize("late", [False, True], ids=["from the beginning", "from the end of the start-up"])
def test_the_start_up_of_an_average_is_over_with_that_of_the_model(kind: str, late: bool, fast: bool) -> None:
    net = model(fast=fast)
    if late:
        train(net, BATCHES + 1)
    average = AVERAGES[kind](net)
    train(net, BATCHES + 3, lambda: average.update_parameters(net))
    saved = copy.deepcopy(average.module.state_dict())
    assert not goes_on(average.module)
    for layer in average.module.analog_layers():
        assert layer.input_range_update_idx.tolist() == [BATCHES] * len(layer.input_range)
    assert not goes_on(restore_analog(digital(), saved))


def test_an_average_of_floating_point_numbers_alone_does_not_start_up_either() -> None:
    net = model()
    average = copy.deepcopy(net).eval()
    own = average.state_dict()

    def update() -> None:
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                own[name].mul_(0.9).add_(value, alpha=0.1)

    train(net, BATCHES + 3, update)
    assert not goes_on(average)


def test_the_ranges_are_averaged_as_weights_are() -> None:
    net = model()
    train(net, BATCHES)
    average = AveragedModel(net, use_buffers=True)
    seen = []
    train(net, 4, lambda: (average.update_parameters(net), seen.append(ranges(net))))  # type: ignore[func-returns-value]
    for own, steps in zip(ranges(average.module), zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(own, torch.stack(steps).mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_start_up_that_was_not_over_goes_on(dtype: torch.dtype) -> None:
    net = model(dtype)
    average = AveragedModel(net, use_buffers=True)
    train(net, 3, lambda: average.update_parameters(net))
    assert goes_on(average.module)


def test_statistics_of_norms_do_not_move_the_ranges_of_an_average() -> None:
    net = model()
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    train(net, BATCHES + 2, lambda: average.update_parameters(net))
    before = ranges(average.module)
    update_bn([5 * torch.randn(16, 8) for _ in range(3)], average)
    assert all(map(torch.equal, before, ranges(average.module)))


def test_a_compiled_model_is_averaged_as_well() -> None:
    net = model()
    compiled = torch.compile(net, backend="aot_eager")
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    optimizer = SGD(net.parameters(), lr=0.01)
    for _ in range(BATCHES + 2):
        optimizer.zero_grad()
        compiled(torch.randn(16, 8)).square().sum().backward()
        optimizer.step()
        average.update_parameters(net)
    assert not goes_on(average.module)


def test_a_start_up_can_be_prolonged() -> None:
    net = model()
    train(net, BATCHES)
    for layer in net.analog_layers():
        layer.rpu_config.pre_post.input_range.init_from_data = BATCHES + 2
    assert goes_on(net)


def test_a_start_up_can_be_repeated() -> None:
    net = model()
    train(net, BATCHES)
    for layer in net.analog_layers():
        layer.reset_analog_state()
    assert goes_on(net)
