"""attach: the work of AnalogOptimizer after the steps of an optimizer that somebody else has built."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer

from triton_analog.config import TorchInferenceRPUConfig, WeightClipType, WeightNoiseInjectionType, WeightNoiseRefresh
from triton_analog.convert import convert_to_analog
from triton_analog.nn import AnalogLinear, AnalogSequential
from triton_analog.optim import AnalogOptimizer, attach

SIGMA = 0.5
LR = 0.1


def clipped() -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN, SIGMA
    return config


def ideal() -> TorchInferenceRPUConfig:
    return TorchInferenceRPUConfig()


def model(config: TorchInferenceRPUConfig | None = None, dtype: torch.dtype = torch.float32) -> AnalogSequential:
    config = config or clipped()
    first, second = (AnalogLinear(6, out, rpu_config=config, dtype=dtype) for out in (6, 4))
    return AnalogSequential(first, nn.ReLU(), second)


def backward(net: nn.Module) -> None:
    net.zero_grad()
    weight = next(net.parameters())
    net(torch.randn(3, 6, dtype=weight.dtype, device=weight.device)).square().sum().backward()


def once_clipped(stepped: Tensor) -> Tensor:
    bound = SIGMA * stepped.std()
    assert (stepped.abs() > bound).any()
    return stepped.clamp(-bound, bound)


def step_and_check(net: Any, optimizer: Any, layers: Any = None) -> None:
    """After a step of SGD every weight of ``layers`` is what the gradient and one single clip make of it."""
    layers = list(net.analog_layers()) if layers is None else layers
    backward(net)
    before = [layer.weight.detach().clone() for layer in layers]
    optimizer.step()
    for layer, weight in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.weight.detach(), once_clipped(weight - LR * layer.weight.grad))


class Wrapper:
    """As Accelerate wraps an optimizer: not one itself."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


# ---- The model's own weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wraps", [0, 1, 2])
def test_every_weight_is_clipped_once_after_each_step(wraps: int) -> None:
    net = model()
    optimizer: Any = SGD(net.parameters(), lr=LR)
    for _ in range(wraps):
        optimizer = Wrapper(optimizer)
    handle = attach(net, optimizer)
    for _ in range(3):
        step_and_check(net, optimizer)
    assert handle.steps == 3


@pytest.mark.parametrize("around", ["digital root", "data parallel", "compiled"])
def test_the_analog_layers_may_lie_anywhere_below_the_model(around: str) -> None:
    net = convert_to_analog(nn.Sequential(nn.Linear(6, 6)), clipped(), ensure_analog_root=False)
    root: Any = nn.ModuleDict({"net": net})
    if around == "data parallel":
        root = nn.DataParallel(net)
    elif around == "compiled":
        root = torch.compile(net, backend="eager")
    optimizer = SGD(net.parameters(), lr=LR)
    attach(root, optimizer)
    step_and_check(net, optimizer, [net[0]])


def test_to_attach_again_changes_nothing() -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=LR)
    handle = attach(net, optimizer)
    assert attach(net, Wrapper(optimizer)) is handle
    assert attach(net[0], optimizer) is handle
    step_and_check(net, optimizer)
    assert handle.steps == 1


def test_the_handle_removes_it() -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=LR)
    handle = attach(net, optimizer)
    handle.remove()
    handle.remove()
    backward(net)
    expected = net[0].weight.detach() - LR * net[0].weight.grad
    optimizer.step()
    torch.testing.assert_close(net[0].weight.detach(), expected)
    assert handle.steps == 0
    attach(net, optimizer)
    step_and_check(net, optimizer)


def test_an_analog_optimizer_goes_on_clipping_once_before_during_and_after() -> None:
    net = model()
    optimizer = AnalogOptimizer(SGD, net.analog_layers, net.parameters(), lr=LR)
    step_and_check(net, optimizer)
    handle = attach(net, optimizer)
    step_and_check(net, optimizer)
    assert handle.steps == 1
    handle.remove()
    step_and_check(net, optimizer)
    assert handle.steps == 1


def test_only_what_the_optimizer_steps_is_clipped() -> None:
    """A clip between two steps would be tighter than the config says: of frozen weights and of another optimizer's."""
    net = AnalogSequential(*(AnalogLinear(6, 6, rpu_config=clipped()) for _ in range(3)))
    net[2].weight.requires_grad_(False)
    one, other = SGD([*net[0].parameters(), *net[2].parameters()], lr=LR), SGD(net[1].parameters(), lr=LR)
    attach(net, one)
    attach(net, other)
    before = copy.deepcopy(net.state_dict())
    step_and_check(net, one, [net[0]])
    for index in (1, 2):
        assert torch.equal(net[index].weight, before[f"{index}.weight"])
    step_and_check(net, other, [net[1]])
    assert torch.equal(net[2].weight, before["2.weight"])


def test_layers_and_parameter_groups_that_come_later_are_known() -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=LR)
    attach(net, optimizer)
    net[2] = AnalogLinear(6, 4, rpu_config=clipped())
    optimizer.add_param_group({"params": net[2].parameters()})
    step_and_check(net, optimizer)


def test_tied_weights_are_clipped_once() -> None:
    net = AnalogSequential(*(AnalogLinear(6, 6, rpu_config=clipped()) for _ in range(2)))
    net[1].weight = net[0].weight
    optimizer = SGD(net.parameters(), lr=LR)
    attach(net, optimizer)
    step_and_check(net, optimizer, [net[0]])


def test_noise_that_lasts_for_a_step_is_drawn_anew_of_frozen_layers_too() -> None:
    config = ideal()
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.1
    config.modifier.refresh = WeightNoiseRefresh.STEP
    net = model(config)
    net[0].requires_grad_(False)
    optimizer = SGD(net[2].parameters(), lr=LR)
    attach(net, optimizer)
    before = [layer.weight_noise_seed.clone() for layer in net.analog_layers()]
    backward(net)
    optimizer.step()
    assert all(layer.weight_noise_seed != seed for layer, seed in zip(net.analog_layers(), before, strict=True))


def test_a_closure_works_and_its_step_counts_once() -> None:
    net = model()
    optimizer = LBFGS(net.parameters(), lr=LR, max_iter=4)
    handle = attach(net, optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(torch.ones(3, 6)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert handle.steps == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_of_the_optimizer_are_not_attached(copied: Any) -> None:
    net = model()
    optimizer = SGD(net.parameters(), lr=LR)
    handle = attach(net, optimizer)
    other_net, other = copied((net, optimizer))
    backward(other_net)
    other.step()
    assert handle.steps == 0
    attach(other_net, other)
    step_and_check(other_net, other)


# ---- Masters -------------------------------------------------------------------------------------------------------------


class Scheme(Wrapper):
    """Steps fp32 copies of half-precision weights, as mixed-precision optimizers do, one group after the other."""

    def __init__(self, net: nn.Module, flat: bool = False) -> None:
        self.weights = list(net.parameters())
        self.skips = False
        if flat:
            self.buffer = torch.cat([weight.detach().float().flatten() for weight in self.weights])
            parts = self.buffer.split([weight.numel() for weight in self.weights])
            self.copies = [part.view_as(weight) for part, weight in zip(parts, self.weights, strict=True)]
            super().__init__(SGD([self.buffer], lr=LR))
        else:
            self.copies = [weight.detach().float() for weight in self.weights]
            super().__init__(SGD([{"params": [copy]} for copy in self.copies], lr=LR))

    def step(self) -> None:
        if self.skips:
            return
        if len(self.copies) != len(self.optimizer.param_groups):
            self.buffer.grad = torch.cat([weight.grad.float().flatten() for weight in self.weights])
            self.optimizer.step()
        else:
            groups = self.optimizer.param_groups
            for weight, copy, group in zip(self.weights, self.copies, groups, strict=True):
                copy.grad = weight.grad.float()
                self.optimizer.param_groups = [group]
                self.optimizer.step()
            self.optimizer.param_groups = groups
        with torch.no_grad():
            for weight, copy in zip(self.weights, self.copies, strict=True):
                weight.copy_(copy)

    def master(self) -> dict[Tensor, Tensor]:
        return {weight: copy for weight, copy in zip(self.weights, self.copies, strict=True) if weight.ndim == 2}


def step_masters_and_check(net: Any, scheme: Scheme) -> None:
    backward(net)
    before = [copy.clone() for copy in scheme.copies]
    scheme.step()
    for weight, master, old in zip(scheme.weights, scheme.copies, before, strict=True):
        stepped = old - LR * weight.grad.float()
        torch.testing.assert_close(master, once_clipped(stepped) if weight.ndim == 2 else stepped)
        assert torch.equal(weight, master.to(weight.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["found", "given", "views of a flat buffer"])
def test_masters_are_clipped_once_per_step_and_the_weights_follow(kind: str, dtype: torch.dtype) -> None:
    net = model(dtype=dtype)
    scheme = Scheme(net, flat=kind == "views of a flat buffer")
    own_step = scheme.step
    handle = attach(net, scheme, None if kind == "found" else scheme.master())
    for _ in range(3):
        step_masters_and_check(net, scheme)
    scheme.skips = True  # as after an overflow
    before = [copy.clone() for copy in scheme.copies]
    scheme.step()
    assert all(torch.equal(copy, old) for copy, old in zip(scheme.copies, before, strict=True))
    assert handle.steps == 3
    assert attach(net, scheme) is handle
    assert attach(net, scheme, scheme.master()) is handle
    handle.remove()
    assert scheme.step == own_step


def test_masters_without_anything_around_are_clipped_at_the_end_of_the_step() -> None:
    net = model(dtype=torch.bfloat16)
    copies = [weight.detach().float() for weight in net.parameters()]
    optimizer = SGD(copies, lr=LR)
    attach(net, optimizer)
    backward(net)
    for copied, weight in zip(copies, net.parameters(), strict=True):
        copied.grad = weight.grad.float()
    expected = once_clipped(copies[0] - LR * copies[0].grad)
    optimizer.step()
    torch.testing.assert_close(copies[0], expected)
    assert torch.equal(net[0].weight, copies[0].bfloat16())


# ---- What is refused -----------------------------------------------------------------------------------------------------


def refused(net: Any, optimizer: Any, error: type[Exception], message: str, master: Any = None) -> None:
    hooks = len(optimizer._optimizer_step_post_hooks) if isinstance(optimizer, Optimizer) else 0
    with pytest.raises(error, match=message):
        attach(net, optimizer, master)
    assert not isinstance(optimizer, Optimizer) or len(optimizer._optimizer_step_post_hooks) == hooks


@pytest.mark.parametrize("wrong", ["AdamW", None, nn.Linear(2, 2), Wrapper(None), Wrapper(Wrapper("SGD"))])
def test_something_else_instead_of_an_optimizer(wrong: Any) -> None:
    refused(model(), wrong, TypeError, r"optimizer: got .*; a torch.optim.Optimizer is needed, or a wrapper")


def test_something_else_instead_of_a_model() -> None:
    net = model()
    refused(net.analog_layers, SGD(net.parameters()), TypeError, "model: got method; a torch.nn.Module is needed")


def test_a_model_without_analog_layers() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    refused(net, SGD(net.parameters()), ValueError, "model: this Sequential has no analog layers; convert it first")


def test_the_parameters_of_the_model_before_it_was_converted() -> None:
    digital = nn.Sequential(nn.Linear(6, 4))
    optimizer = SGD(digital.parameters())
    net = convert_to_analog(digital, clipped())
    refused(
        net, optimizer, ValueError, "optimizer: SGD steps none of the 1 weights that are to be clipped; build it from"
    )


def test_an_optimizer_of_biases_alone() -> None:
    net = model()
    optimizer = SGD([net[0].bias, net[2].bias])
    refused(net, optimizer, ValueError, "steps none of the 2 weights that are to be clipped")
    unclipped = model(ideal())
    attach(unclipped, SGD([unclipped[0].bias]))  # nothing to clip: its work is the noise
    refused(unclipped, SGD(model().parameters()), ValueError, "steps none of the 4 trained parameters of the model")


def test_masters_that_cannot_be_told_apart() -> None:
    net = model(dtype=torch.bfloat16)
    net[0].weight.data.zero_()
    optimizer = SGD([torch.zeros(6, 6), torch.zeros(6, 6), net[2].weight.detach().float()])
    refused(net, optimizer, ValueError, "master: more than one copy .*; pass master=")
    twins = AnalogSequential(net[2], copy.deepcopy(net[2]))
    refused(twins, SGD([net[2].weight.detach().float()]), ValueError, "master: more than one copy .*; pass master=")


def test_copies_of_other_values_are_no_masters() -> None:
    net = model(dtype=torch.bfloat16)
    optimizer = SGD([weight.detach().float() + 1 for weight in net.parameters()])
    refused(net, optimizer, ValueError, "steps none of the 2 weights that are to be clipped; .* pass master=")


def test_a_mapping_of_masters_that_does_not_fit() -> None:
    net = model(dtype=torch.bfloat16)
    own = net[0].weight
    good = own.detach().float()
    optimizer = SGD([good, net[2].weight])
    refused(net, optimizer, TypeError, "master: got list; a mapping from the weight", [(own, good)])
    refused(net, optimizer, TypeError, "master: got dict; a mapping from the weight", {"0.weight": good})
    refused(
        net, optimizer, ValueError, r"master: got a key of shape \(6,\) that is not the weight", {net[0].bias: good}
    )
    refused(net, optimizer, ValueError, r"shape \(36,\) for a weight of shape \(6, 6\)", {own: good.flatten()})
    refused(net, optimizer, ValueError, "lies in no parameter of SGD, which so never steps it", {own: good.clone()})
    attach(net, optimizer, {own: good})
    refused(net, optimizer, ValueError, "master: attached already with another one", {own: good.clone()})


def test_a_part_of_what_is_to_be_attached() -> None:
    net = model()
    optimizer = SGD(net.parameters())
    attach(net[0], optimizer)
    refused(net, optimizer, ValueError, r"some of its layers are attached already, but not all; remove\(\) that first")
    analog = AnalogOptimizer(SGD, net.analog_layers, net.parameters())
    refused(
        net[0], analog, ValueError, "this AnalogOptimizer clips layers that are not in it; attach to the whole model"
    )
