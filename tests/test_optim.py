"""AnalogOptimizer: any torch optimizer that clips the analog weights after each step."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from triton_analog.config import TorchInferenceRPUConfig, WeightClipType
from triton_analog.convert import convert_to_analog
from triton_analog.nn import AnalogLinear, AnalogSequential
from triton_analog.optim import AnalogOptimizer


def clipped(sigma: float = 0.5) -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN, sigma
    return config


def model() -> AnalogSequential:
    return AnalogSequential(
        AnalogLinear(6, 5, rpu_config=clipped()), nn.ReLU(), AnalogLinear(5, 4, rpu_config=clipped())
    )


def step(net: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()


def is_clipped(layer: Any, before: Tensor) -> bool:
    """Whether ``layer`` holds what a step from ``before`` and then the clip give."""
    stepped = before - 0.1 * layer.weight.grad
    bound = 0.5 * stepped.std()
    return bool((stepped.abs() > bound).any()) and torch.allclose(layer.weight, stepped.clamp(-bound, bound))


def test_the_basic_example_of_the_predecessor_with_other_imports() -> None:
    x = Tensor([[0.1, 0.2, 0.4, 0.3], [0.2, 0.1, 0.1, 0.3]])
    y = Tensor([[1.0, 0.5], [0.7, 0.3]])

    # Define a network using a single Analog layer.
    model = AnalogLinear(4, 2, rpu_config=TorchInferenceRPUConfig())

    # Use the analog-aware stochastic gradient descent optimizer.
    opt = AnalogOptimizer(SGD, model.analog_layers(), model.parameters(), lr=0.01)

    losses = []
    # Train the network.
    for _ in range(10):
        pred = model(x)
        loss = mse_loss(pred, y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("called", [False, True], ids=["the method", "its result"])
def test_every_layer_is_clipped_after_each_step(called: bool) -> None:
    net = model()
    layers = net.analog_layers() if called else net.analog_layers
    optimizer = AnalogOptimizer(SGD, layers, net.parameters(), lr=0.1)
    for _ in range(3):
        before = [layer.weight.detach().clone() for layer in net.analog_layers()]
        step(net, optimizer)
        assert all(is_clipped(layer, weight) for layer, weight in zip(net.analog_layers(), before, strict=True))


def test_it_is_an_instance_of_the_wrapped_class_and_behaves_as_it_does() -> None:
    net = AnalogSequential(nn.Linear(6, 4))
    twin = copy.deepcopy(net)
    optimizer = AnalogOptimizer(AdamW, net.analog_layers, net.parameters(), lr=0.1, weight_decay=0.2)
    plain = AdamW(twin.parameters(), lr=0.1, weight_decay=0.2)
    assert isinstance(optimizer, AdamW)
    assert isinstance(optimizer, AnalogOptimizer)
    assert repr(optimizer) == repr(plain)
    for seed in range(3):
        for one, other in ((net, optimizer), (twin, plain)):
            torch.manual_seed(seed)
            step(one, other)
    assert torch.equal(net[0].weight, twin[0].weight)
    assert str(optimizer.state_dict()) == str(plain.state_dict())


def test_the_method_also_finds_layers_that_were_replaced_later() -> None:
    net = model()
    optimizer = AnalogOptimizer(SGD, net.analog_layers, net.parameters(), lr=0.1)
    new = AnalogLinear(5, 4, rpu_config=clipped())
    net[2] = new
    optimizer.add_param_group({"params": new.parameters()})
    before = new.weight.detach().clone()
    step(net, optimizer)
    assert is_clipped(new, before)


def test_steps_with_a_closure_return_its_loss_and_clip() -> None:
    net = model()
    optimizer = AnalogOptimizer(SGD, net.analog_layers, net.parameters(), lr=0.1)
    before = net[0].weight.detach().clone()

    def closure() -> Tensor:
        loss = net(torch.ones(3, 6)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert is_clipped(net[0], before)


def test_schedulers_drive_it() -> None:
    net = model()
    optimizer = AnalogOptimizer(SGD, net.analog_layers, net.parameters(), lr=0.1)
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    before = net[0].weight.detach().clone()
    step(net, optimizer)
    scheduler.step()
    assert is_clipped(net[0], before)
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_state_dict_goes_in_and_out_and_the_clip_stays_single(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    optimizer = AnalogOptimizer(SGD, net.analog_layers, net.parameters(), lr=0.1, momentum=0.9)
    step(net, optimizer)
    other = AnalogOptimizer(SGD, net.analog_layers, net.parameters(), lr=0.7, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    assert str(other.state_dict()) == str(optimizer.state_dict())
    calls: list[Any] = []
    monkeypatch.setattr(AnalogLinear, "clip_weights", lambda layer: calls.append(layer))
    step(net, other)
    assert len(calls) == 2


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("called", [False, True], ids=["the method", "its result"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_clips_the_copied_model(copied: Any, called: bool) -> None:
    net = model()
    layers = net.analog_layers() if called else net.analog_layers
    optimizer = AnalogOptimizer(SGD, layers, net.parameters(), lr=0.1, momentum=0.9)
    step(net, optimizer)
    other_net, other = copied((net, optimizer))
    assert type(other) is type(optimizer)
    before, own = other_net[0].weight.detach().clone(), net[0].weight.detach().clone()
    other_net.zero_grad()
    other.param_groups[0]["momentum"] = 0
    step(other_net, other)
    assert is_clipped(other_net[0], before)
    assert torch.equal(net[0].weight, own)


def test_tied_weights_are_clipped_once() -> None:
    first, second = (AnalogLinear(6, 6, rpu_config=clipped()) for _ in range(2))
    second.weight = first.weight
    net = AnalogSequential(first, second)
    optimizer = AnalogOptimizer(SGD, net.analog_layers, net.parameters(), lr=0.1)
    before = first.weight.detach().clone()
    step(net, optimizer)
    assert is_clipped(first, before)


def train(net: nn.Module, optimizer: Optimizer, steps: int) -> list[str]:
    """Steps of several forwards each; returns what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            net(torch.randn(3, 6))
            step(net, optimizer)
    return [str(warning.message) for warning in caught]


def test_weights_that_are_never_clipped_are_warned_of_once() -> None:
    net = AnalogSequential(AnalogLinear(6, 4, rpu_config=clipped()))
    optimizer = SGD(net.parameters(), lr=0.01)
    assert train(net, optimizer, 90) == []
    (message,) = train(net, optimizer, 200)
    assert "without clip_weights() being called" in message
    assert "AnalogOptimizer" in message


@pytest.mark.parametrize("kind", ["AnalogOptimizer", "tied", "no clip", "compiled", "by hand"])
def test_weights_that_need_no_warning_give_none(kind: str) -> None:
    net = AnalogSequential(AnalogLinear(6, 6, rpu_config=clipped()), AnalogLinear(6, 6, rpu_config=clipped()))
    optimizer: Optimizer = AnalogOptimizer(SGD, net.analog_layers, net.parameters(), lr=0.01)
    model: Any = net
    if kind == "tied":
        net[1].weight = net[0].weight
    elif kind == "no clip":
        for layer in net.analog_layers():
            layer.reconfigure(TorchInferenceRPUConfig())
        optimizer = SGD(net.parameters(), lr=0.01)
    elif kind == "compiled":
        optimizer = SGD(net.parameters(), lr=0.01)
        torch._dynamo.reset()
        model = torch.compile(net, fullgraph=True, backend="eager")
    elif kind == "by hand":
        optimizer = SGD(net.parameters(), lr=0.01)
        optimizer.register_step_post_hook(lambda *_: net.clip_weights())
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert train(model, optimizer, 120) == []


def test_a_converted_model_is_clipped() -> None:
    net = convert_to_analog(nn.Sequential(nn.Linear(6, 4)), clipped())
    optimizer = AnalogOptimizer(SGD, net.analog_layers, net.parameters(), lr=0.1)
    before = net[0].weight.detach().clone()
    step(net, optimizer)
    assert is_clipped(net[0], before)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (None, TypeError, "analog_layers: got NoneType; pass the method model.analog_layers"),
        (
            nn.Linear(2, 2).parameters(),
            TypeError,
            "analog_layers: got an iterable that holds a Parameter; pass the method",
        ),
        (model(), TypeError, "analog_layers: got AnalogSequential; pass the method model.analog_layers"),
        ([nn.Linear(2, 2)], TypeError, "analog_layers: got an iterable that holds a Linear; pass the method"),
        (iter(()), ValueError, "analog_layers: got an iterable without any layer, .* used up before; pass the method"),
    ],
)
def test_something_else_instead_of_the_layers_is_an_error(layers: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        AnalogOptimizer(SGD, layers, model().parameters(), lr=0.1)


@pytest.mark.parametrize("wrong", [model().parameters, "SGD", nn.Linear, None])
def test_something_else_instead_of_the_class_is_an_error(wrong: Any) -> None:
    net = model()
    with pytest.raises(TypeError, match=r"optimizer_class: got .*; the class of a torch optimizer is needed"):
        AnalogOptimizer(wrong, net.analog_layers, net.parameters(), lr=0.1)


# ---- Of any kind --------------------------------------------------------------------------------------------------------


def loss_of(net: nn.Module) -> Tensor:
    return net(torch.linspace(-1, 1, 18).reshape(3, 6)).square().sum()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {"lr": 0.1}) for kind in (SGD, AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam)),
        (AdamW, {"lr": 0.1, "foreach": True}),
        (AdamW, {"lr": 0.1, "fused": True}),
        (SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
        (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 3}),
    ],
)
def test_every_optimizer_takes_its_own_steps_and_then_clips(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """As a plain one with the clips called by hand, also after its state was saved and loaded."""
    ours, theirs = model(), model()
    theirs.load_state_dict(ours.state_dict())
    analog: Any = AnalogOptimizer(kind, ours.analog_layers, ours.parameters(), **options)
    plain: Any = kind(theirs.parameters(), **options)
    for round_ in range(3):
        for net, optimizer in ((ours, analog), (theirs, plain)):

            def closure(net: nn.Module = net, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(net)
                loss.backward()
                return loss

            optimizer.step(closure)
        for layer in theirs.analog_layers():
            layer.clip_weights()
        if round_ == 1:
            state = copy.deepcopy(analog.state_dict())
            analog = AnalogOptimizer(kind, ours.analog_layers, ours.parameters(), **options)
            analog.load_state_dict(state)
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_its_compiled_step_clips_too(kind: type[Optimizer]) -> None:
    ours, theirs = model(), model()
    theirs.load_state_dict(ours.state_dict())
    optimizers = [AnalogOptimizer(kind, net.analog_layers, net.parameters(), lr=0.1) for net in (ours, theirs)]
    torch._dynamo.reset()
    compiled = torch.compile(lambda: optimizers[0].step(), backend="eager")
    for _ in range(3):
        for net, take_step in ((ours, compiled), (theirs, optimizers[1].step)):
            net.zero_grad()
            loss_of(net).backward()
            take_step()
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, other)


def test_a_gradient_scaler_drives_it_and_skipped_steps_clip_nothing() -> None:
    net = model()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = AnalogOptimizer(SGD, net.analog_layers, net.parameters(), lr=0.1)
    before = net[0].weight.clone()
    scaler.scale(loss_of(net)).backward()
    net[0].weight.grad.fill_(torch.inf)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(net[0].weight, before)
    optimizer.zero_grad()
    scaler.scale(loss_of(net)).backward()
    scaler.step(optimizer)
    assert is_clipped(net[0], before)
