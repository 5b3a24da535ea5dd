"""The decay of input ranges: once per step of an optimizer, from all inputs since the last, whatever scales the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.optim import LBFGS, SGD

from triton_analog import TorchInferenceRPUConfig
from triton_analog.functional import analog_linear
from triton_analog.nn import AnalogLinear
from triton_analog.optim import AnalogOptimizer, before_step

DECAY, SHARE, LR = 0.25, 0.8, 0.5
STORED = torch.tensor([1.5, 5.0, -5.0], dtype=torch.float64)
"""Too small a range, one that few inputs reach, and the same with a sign."""


def model() -> Any:
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 8
    range_ = config.pre_post.input_range
    range_.enable, range_.init_from_data, range_.decay, range_.input_min_percentage = True, 0, DECAY, SHARE
    torch.manual_seed(0)
    layer = AnalogLinear(24, 5, dtype=torch.float64, rpu_config=config)
    with torch.no_grad():
        layer.input_range.copy_(STORED)
    return layer


def batch() -> Tensor:
    return 2 * torch.randn(64, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def shares(x: Tensor) -> Tensor:
    return torch.stack([(part.abs() < r.abs()).double().mean() for part, r in zip(x.split(8, 1), STORED, strict=True)])


def gradient(x: Tensor) -> Tensor:
    """Of the range, without a decay."""
    layer = model()
    layer(x).square().mean().backward()
    return layer.input_range.grad


def stepped(x: Tensor) -> Tensor:
    """The ranges after a step of plain descent."""
    return STORED - LR * (gradient(x) + DECAY * STORED * (shares(x) > SHARE))


# ---- Ways to take a step ------------------------------------------------------------------------------------------------


def plain(layer: Any, x: Tensor) -> None:
    optimizer = SGD(layer.parameters(), lr=LR)
    layer(x).square().mean().backward()
    optimizer.step()


def analog(layer: Any, x: Tensor) -> None:
    optimizer = AnalogOptimizer(SGD, layer.analog_layers, layer.parameters(), lr=LR)
    layer(x).square().mean().backward()
    optimizer.step()


def micro_batches(layer: Any, x: Tensor) -> None:
    optimizer = SGD(layer.parameters(), lr=LR)
    for part in x.split([10, 54]):
        (layer(part).square().sum() / (x.shape[0] * 5)).backward()
    optimizer.step()


def scaled(layer: Any, x: Tensor) -> None:
    optimizer = SGD(layer.parameters(), lr=LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(layer(x).square().mean()).backward()
    scaler.step(optimizer)


def scaled_and_fused(layer: Any, x: Tensor) -> None:
    """The optimizer itself takes the scale out."""
    optimizer = SGD(layer.parameters(), lr=LR, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(layer(x).square().mean()).backward()
    scaler.step(optimizer)


def closure(layer: Any, x: Tensor) -> None:
    optimizer = SGD(layer.parameters(), lr=LR)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = layer(x).square().mean()
        value.backward()
        return value

    optimizer.step(loss)


def by_hand(layer: Any, x: Tensor) -> None:
    layer(x).square().mean().backward()
    before_step(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= LR * parameter.grad


def compiled(layer: Any, x: Tensor) -> None:
    torch._dynamo.reset()
    optimizer = AnalogOptimizer(SGD, layer.analog_layers, layer.parameters(), lr=LR)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().mean().backward()
    optimizer.step()


def compiled_step(layer: Any, x: Tensor) -> None:
    torch._dynamo.reset()
    optimizer = AnalogOptimizer(SGD, layer.analog_layers, layer.parameters(), lr=LR)
    layer(x).square().mean().backward()
    torch.compile(optimizer.step, backend="eager")()


WAYS = (plain, analog, micro_batches, scaled, scaled_and_fused, closure, by_hand, compiled, compiled_step)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_however_a_step_is_taken_ranges_decay_once(way: Callable[[Any, Tensor], None]) -> None:
    layer, x = model(), batch()
    assert (shares(x) > SHARE).tolist() == [False, True, True]
    way(layer, x)
    torch.testing.assert_close(layer.input_range.detach(), stepped(x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("way", [plain, micro_batches])
def test_the_next_step_counts_anew(way: Callable[[Any, Tensor], None]) -> None:
    layer, x = model(), batch()
    way(layer, 100 * x)  # then nothing decays
    with torch.no_grad():
        for own, new in zip(layer.parameters(), model().parameters(), strict=True):
            own.copy_(new)
            own.grad = None
    way(layer, x)
    torch.testing.assert_close(layer.input_range.detach(), stepped(x), rtol=1e-12, atol=1e-14)


def test_a_share_is_that_of_all_micro_batches_together() -> None:
    """One in which all inputs are beyond the range is outweighed by a larger one."""
    layer, x = model(), batch()
    x[:4] = 100.0
    assert (shares(x[:4]) == 0).all()
    micro_batches(layer, x)
    torch.testing.assert_close(layer.input_range.detach(), stepped(x), rtol=1e-12, atol=1e-14)
    assert (shares(x)[1:] > SHARE).all()


def test_a_step_without_inputs_leaves_ranges_alone() -> None:
    layer = model()
    layer(batch()[:0]).sum().backward()
    SGD(layer.parameters(), lr=LR).step()
    assert torch.equal(layer.input_range.detach(), STORED)


def test_evaluations_of_a_line_search_each_have_it() -> None:
    layer, x = model(), batch()
    optimizer, seen = LBFGS(layer.parameters(), lr=0.1, max_iter=2), []

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = layer(x).square().mean()
        value.backward()
        seen.append(layer.range_tally.grad is not None)
        return value

    optimizer.step(loss)
    assert seen == [True] * len(seen)
    assert layer.range_tally.grad is None


# ---- Gradients ----------------------------------------------------------------------------------------------------------


def test_gradients_of_a_layer_have_no_decay_and_those_of_the_function_have_it() -> None:
    layer, x = model(), batch()
    values = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    of_transform = grad(lambda given: functional_call(layer, given, (x,)).square().mean())(values)
    torch.testing.assert_close(of_transform["input_range"], gradient(x))
    r = STORED.clone().requires_grad_()
    analog_linear(
        x, layer.weight, layer.bias, input_range=r, max_input_size=8, range_decay=DECAY, input_min_percentage=SHARE
    ).square().mean().backward()
    torch.testing.assert_close(r.grad, gradient(x) + DECAY * STORED * (shares(x) > SHARE))


def test_steps_of_a_sequence_are_one_share() -> None:
    from triton_analog.nn import AnalogRNN, AnalogVanillaRNNCell

    config = TorchInferenceRPUConfig()
    range_ = config.pre_post.input_range
    range_.enable, range_.init_from_data, range_.decay, range_.init_value = True, 0, DECAY, 50.0
    rnn = AnalogRNN(AnalogVanillaRNNCell, 4, 6, rpu_config=config)
    rnn(torch.randn(5, 3, 4))[0].sum().backward()
    SGD(rnn.parameters(), lr=LR).step()
    for layer in rnn.analog_layers():
        torch.testing.assert_close(layer.input_range.detach(), torch.tensor([50.0 * (1 - LR * DECAY)]))


def test_copies_count_for_themselves() -> None:
    layer, x = model(), batch()
    layer(x).square().mean().backward()
    other = copy.deepcopy(layer)
    other.zero_grad()
    other.range_tally.grad = None
    plain(other, x)
    torch.testing.assert_close(other.input_range.detach(), stepped(x), rtol=1e-12, atol=1e-14)
    assert layer.range_tally.grad is not None


def test_before_step_says_what_it_needs() -> None:
    with pytest.raises(TypeError, match=r"model: got list; a torch\.nn\.Module is needed"):
        before_step([])  # type: ignore[arg-type]
    before_step(nn.Linear(2, 2))
