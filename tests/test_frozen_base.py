"""An analog model whose own weights are frozen, with something digital beside them that is trained."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from triton_analog.config import TorchInferenceRPUConfig, WeightClipType, WeightNoiseInjectionType, WeightNoiseRefresh
from triton_analog.nn import AnalogConv1d, AnalogLinear, AnalogRNN, AnalogSequential
from triton_analog.optim import AnalogOptimizer, attach


def config(clip: bool = False) -> TorchInferenceRPUConfig:
    made = TorchInferenceRPUConfig()
    made.modifier.noise_type, made.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.1
    made.modifier.refresh = WeightNoiseRefresh.STEP
    if clip:
        made.clip.type, made.clip.sigma = WeightClipType.LAYER_GAUSSIAN, 1.0
    return made


class Adapted(AnalogSequential):
    """Two frozen analog layers and a digital one between them."""

    def __init__(self, clip: bool = False) -> None:
        super().__init__(*(AnalogLinear(6, 6, rpu_config=config(clip)) for _ in range(2)))
        self.requires_grad_(False)
        self.insert(1, nn.Linear(6, 6))


def seeds(model: Any) -> list[int]:
    return [layer.weight_noise_seed.item() for layer in model.analog_layers()]


def train(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def optimizer_of(model: Any, kind: str) -> Any:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if kind == "AnalogOptimizer":
        return AnalogOptimizer(SGD, model.analog_layers, trained, lr=0.1)
    optimizer = SGD(trained, lr=0.1)
    if kind == "attach":
        attach(model, optimizer)
    return optimizer


@pytest.mark.parametrize("clip", [False, True], ids=["no clip", "clip"])
@pytest.mark.parametrize("kind", ["AnalogOptimizer", "attach", "SGD"])
def test_each_step_draws_the_noise_once_and_changes_nothing_that_is_frozen(kind: str, clip: bool) -> None:
    model = Adapted(clip)
    optimizer = optimizer_of(model, kind)
    before = copy.deepcopy(model.state_dict())
    drawn = [seeds(model)]
    for _ in range(3):
        x = torch.randn(4, 6)
        with torch.no_grad():  # a micro-batch before, with the same noise
            expected = model(x)
            assert torch.equal(model(x), expected)
        train(model, optimizer, x)
        drawn.append(seeds(model))
        assert not torch.equal(model(x), expected)
    assert len({seed for step in drawn for seed in step}) == 8
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("1."))


def test_a_step_draws_no_more_often_than_needed() -> None:
    model = Adapted()
    torch.manual_seed(3)
    optimizer_of(model, "AnalogOptimizer").step()
    expected = seeds(model)
    torch.manual_seed(3)
    model.redraw_weight_noise()
    assert seeds(model) == expected


def test_a_compiled_model_gets_new_noise_from_any_optimizer() -> None:
    model = Adapted()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = optimizer_of(model, "SGD")
    x = torch.randn(4, 6)
    with torch.no_grad():
        first = compiled(x)
        assert torch.equal(compiled(x), first)
    train(compiled, optimizer, x)
    model[1].load_state_dict({"weight": torch.eye(6), "bias": torch.zeros(6)})
    with torch.no_grad():
        second = compiled(x)
        assert torch.equal(compiled(x), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_redrawn_too(copied: Any) -> None:
    model = copied(Adapted())
    before = seeds(model)
    train(model, optimizer_of(model, "SGD"), torch.randn(4, 6))
    assert all(new != old for new, old in zip(seeds(model), before, strict=True))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: AnalogConv1d(4, 4, 3, groups=2, rpu_config=config()), (2, 4, 6)),
        (lambda: AnalogRNN.from_digital(nn.LSTM(4, 3), config()), (5, 2, 4)),
    ],
    ids=["convolution", "recurrent"],
)
def test_every_kind_of_layer_is_redrawn(layer: Any, shape: Any) -> None:
    model = AnalogSequential(layer()).requires_grad_(False)
    other = nn.Parameter(torch.ones(()))
    before = seeds(model)
    model(torch.randn(shape) * other)
    SGD([other], lr=0.1).step()
    assert all(new != old for new, old in zip(seeds(model), before, strict=True))


def test_layers_in_evaluation_and_trained_ones_keep_theirs() -> None:
    model, trained = Adapted().eval(), AnalogSequential(AnalogLinear(6, 6, rpu_config=config()))
    before = seeds(model), seeds(trained)
    other = nn.Parameter(torch.ones(()))
    other.grad = torch.ones(())
    SGD([other], lr=0.1).step()
    assert (seeds(model), seeds(trained)) == before


def test_an_optimizer_of_something_else_is_not_attached() -> None:
    with pytest.raises(ValueError, match="SGD steps none of the 2 trained parameters of the model; build it from"):
        attach(Adapted(), SGD(nn.Linear(2, 2).parameters()))
