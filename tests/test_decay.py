"""Weight decay leaves input ranges and learned clips alone."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from triton_analog import AnalogOptimizer, TorchInferenceRPUConfig, convert_to_analog
from triton_analog.config import WeightClipType
from triton_analog.optim import attach, no_weight_decay, parameter_groups


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def model() -> Any:
    config = TorchInferenceRPUConfig()
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.init_value = 50.0
    config.pre_post.input_range.init_from_data = 0
    config.pre_post.input_range.decay = 0.0
    config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    return convert_to_analog(
        nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.LayerNorm(16), nn.LSTM(16, 4), nn.Identity()), config
    )


def ranges_and_clips(net: Any) -> list[nn.Parameter]:
    return [p for layer in net.analog_layers() for p in (layer.input_range, layer.learnable_weight_clip)]


def steps(net: nn.Module, optimizer: Any, count: int = 3) -> None:
    """Without any gradient, so that only decay moves a parameter."""
    for _ in range(count):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def moved(net: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in net.named_parameters() if not torch.equal(parameter, before[name])}


def snapshot(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


# ---- Groups -----------------------------------------------------------------------------------------------------------


def test_only_matrices_decay() -> None:
    net = model()
    groups = parameter_groups(net, weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    first, second = ({names[id(parameter)] for parameter in group["params"]} for group in groups)
    assert len(first) == 3
    assert all(name.rpartition(".")[2].startswith("weight") for name in first)
    assert first | second == set(names.values())
    assert not first & second
    before = snapshot(net)
    steps(net, AnalogOptimizer(AdamW, net.analog_layers, groups, lr=0.1))
    assert moved(net, before) == first


def test_ties_come_once_frozen_parameters_not_at_all_and_what_a_model_exempts_does_not_decay() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
            self.head.weight = self.embedding.weight
            self.position, self.marked = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(2, 2))
            self.marked._no_weight_decay = True
            self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

        def no_weight_decay(self) -> set[str]:
            return {"position"}

    net = Model()
    first, second = parameter_groups(net, 0.1)
    assert [id(p) for p in first["params"]] == [id(net.head.weight)]
    assert {id(p) for p in second["params"]} == {id(net.position), id(net.marked), id(net.head.bias)}
    (only,) = parameter_groups(nn.LayerNorm(3), 0.1)
    assert only["weight_decay"] == 0.0


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf"), True, "0.1", None])
def test_a_wrong_decay_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"weight_decay: got .*; a finite number >= 0 is needed"):
        parameter_groups(model(), wrong)


def test_a_model_without_anything_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model: this .* has no parameter that requires a gradient"):
        parameter_groups(model().requires_grad_(False), 0.1)
    with pytest.raises(TypeError, match=r"model: got list; a torch\.nn\.Module is needed"):
        parameter_groups([], 0.1)  # type: ignore[arg-type]


def test_names_and_marks_for_trainers_that_look_for_them() -> None:
    for net in (model(), copy.deepcopy(model()), pickle.loads(pickle.dumps(model()))):
        exempt = ranges_and_clips(net)
        assert len(exempt) == 6
        names = no_weight_decay(net)
        assert {id(dict(net.named_parameters())[name]) for name in names} == set(map(id, exempt))
        assert all(parameter._no_weight_decay for parameter in exempt)


# ---- Optimizers of others ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_an_attached_optimizer_does_not_decay_them(kind: Any) -> None:
    net = model()
    scale, *others = net.parameters()
    groups = [{"params": [scale], "lr": 0.05}, {"params": others}]
    optimizer = kind(groups, lr=0.1, weight_decay=0.1)
    attachment = attach(net, optimizer)
    before, structure = snapshot(net), [list(map(id, group["params"])) for group in optimizer.param_groups]
    steps(net, optimizer)
    exempt = no_weight_decay(net)
    assert {name for name in moved(net, before) if before[name].any()} == {
        name for name in before if name not in exempt and before[name].any()
    }
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == structure
    attachment.remove()
    before = snapshot(net)
    steps(net, optimizer, 1)
    assert exempt <= moved(net, before)


def test_schedulers_and_checkpoints_of_the_optimizer_do_not_notice() -> None:
    net = model()
    optimizer = AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    attach(net, optimizer)
    before = snapshot(net)
    for _ in range(2):
        steps(net, optimizer, 1)
        scheduler.step()
    assert scheduler.get_last_lr() == [0.025]
    assert not moved(net, before) & no_weight_decay(net)
    again = model()
    fresh = AdamW(again.parameters(), lr=0.1, weight_decay=0.1)
    fresh.load_state_dict(optimizer.state_dict())
    attach(again, fresh)
    steps(again, fresh)


def test_the_ranges_learn_at_the_rate_of_their_group() -> None:
    """As in a group of that rate without decay."""
    nets = [model() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [
        SGD(nets[0].parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
        SGD(parameter_groups(nets[1], 0.1), lr=0.1, momentum=0.9),
    ]
    attach(nets[0], optimizers[0])
    for net, optimizer in zip(nets, optimizers, strict=True):
        for step in range(3):
            for parameter in ranges_and_clips(net):
                parameter.grad = torch.full_like(parameter, step + 1.0)
            optimizer.step()
    for one, other in zip(*map(ranges_and_clips, nets), strict=True):
        assert torch.equal(one, other)


def test_a_step_that_fails_leaves_the_groups_usable() -> None:
    class Fails(SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("no step")

    net = model()
    optimizer = Fails(net.parameters(), lr=0.1, weight_decay=0.1)
    attach(net, optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no step"):
            optimizer.step()
        held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        assert sorted(held) == sorted(map(id, net.parameters()))
    assert len(optimizer.state_dict()["param_groups"]) == 1


# ---- AnalogOptimizer ---------------------------------------------------------------------------------------------------


def test_an_analog_optimizer_warns_once_of_ranges_that_decay() -> None:
    net = model()
    first, *others = net.parameters()
    with pytest.warns(
        UserWarning, match=r"weight_decay: 0.01 of this AdamW pulls \d+ input range.*parameter_groups"
    ) as said:
        AnalogOptimizer(AdamW, net.analog_layers, [{"params": [first]}, {"params": others}])
    assert len(said) == 1


def test_an_analog_optimizer_says_nothing_where_none_decays() -> None:
    net = model()
    AnalogOptimizer(AdamW, net.analog_layers, net.parameters(), weight_decay=0.0)
    AnalogOptimizer(SGD, net.analog_layers, net.parameters(), lr=0.1)
    for parameter in ranges_and_clips(net):
        parameter.requires_grad_(False)
    AnalogOptimizer(AdamW, net.analog_layers(), net.parameters())
