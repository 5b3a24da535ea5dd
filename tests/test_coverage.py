"""What of a model is on tiles and what is not, and layers that never compute as their parents read the weight."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triton_analog import (
    AnalogOptimizer,
    TorchInferenceRPUConfig,
    analog_summary,
    convert_to_analog,
    convert_to_digital,
)
from triton_analog.config import WeightNoiseInjectionType
from triton_analog.optim import attach

X = torch.linspace(-1, 1, 24).view(4, 6)
PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"


def noisy() -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.5
    return config


def said(act: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


# ---- What is on tiles -------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """Matrices of its own, and parameters that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(3, 6, 6))
        self.out = nn.Parameter(torch.randn(6, 6))
        self.bias, self.out_bias = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(3, 6))
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 4, 6))
        self.position_embedding_table, self.gain = nn.Parameter(torch.randn(2, 4, 6)), nn.Parameter(torch.randn(1, 6))


def zoo() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "linear": nn.Linear(6, 10),
            "own": Own(),
            "again": Own(),
            "bilinear": nn.Bilinear(2, 3, 4),
            "up": nn.ConvTranspose2d(2, 3, 2),
            "attention": nn.MultiheadAttention(6, 2),
            "norm": nn.LayerNorm([4, 6]),
            "embedding": nn.Embedding(10, 6),
        }
    )


def test_one_warning_names_every_weight_that_is_not_on_tiles_and_the_share_that_is() -> None:
    (text,) = said(lambda: convert_to_analog(zoo(), noisy()))
    weights = 60 + 2 * (3 * 36 + 36) + 24 + 24 + 4 * 36
    assert f"left 5 module(s) digital, and {100 * 60 / weights:.1f} % of {weights} weights are on tiles" in text
    assert "own, again: Own computes with its own mix, out" in text
    assert "bilinear: no analog class for Bilinear" in text
    assert "up: no analog class for ConvTranspose2d" in text
    assert "attention: MultiheadAttention calls its projections" in text
    assert "conversion_map" in text
    assert "exclude_modules" in text


class NormalizedLinear(nn.Module):
    def __init__(self, **parameters: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


@pytest.mark.parametrize(
    "name", ["weight", "token_mixing", "embed_proj", "pos_proj", "scale_proj", "cls_head", "mask_conv"]
)
def test_names_that_begin_like_a_table_are_matrices(name: str) -> None:
    (text,) = said(lambda: convert_to_analog(nn.Sequential(NormalizedLinear(**{name: (6, 6)})), noisy()))
    assert f"NormalizedLinear computes with its own {name}" in text


@pytest.mark.parametrize("name", ["pos_embed", "cls_token", "relative_position_bias_table", "rel_pos_emb", "A_log"])
def test_names_that_end_like_a_table_are_none(name: str) -> None:
    assert said(lambda: convert_to_analog(nn.Sequential(NormalizedLinear(**{name: (6, 6)})), noisy())) == []


def test_many_modules_of_one_kind_take_one_place() -> None:
    blocks = nn.ModuleDict({"blocks": nn.Sequential(*(Own() for _ in range(9)))})
    (text,) = said(lambda: convert_to_analog(blocks, noisy()))
    assert "blocks.* (9 of them): Own computes with its own mix, out" in text


def test_excluded_weights_count_but_are_not_named() -> None:
    model = nn.ModuleDict({"own": Own(), "linear": nn.Linear(6, 6)})
    assert said(lambda: convert_to_analog(model, noisy(), exclude_modules=["own"])) == []


def test_a_tied_weight_is_on_tiles() -> None:
    model = nn.ModuleDict({"own": Own(), "linear": nn.Linear(6, 6)})
    model["own"].out = model["linear"].weight
    del model["own"].mix
    assert said(lambda: convert_to_analog(model, noisy())) == []


def test_a_summary_says_it_at_any_time() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 2), "lstm": nn.LSTM(6, 6), "own": Own()})
    assert analog_summary(model).share == 0
    analog = convert_to_analog(model, noisy(), exclude_modules=["b", "own"])
    summary = analog_summary(analog)
    assert (summary.on_tiles, summary.total) == (24 + 2 * 4 * 36, 24 + 12 + 2 * 4 * 36 + 4 * 36)
    assert [(weights.name, weights.kind, weights.size) for weights in summary.digital] == [
        ("b", "Linear", 12),
        ("own", "Own", 4 * 36),
    ]
    assert str(summary).splitlines()[1:] == ["  b: it can be converted", "  own: Own computes with its own mix, out"]
    with pytest.raises(TypeError, match="model: got int"):
        analog_summary(1)  # type: ignore[arg-type]


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    with pytest.warns(UserWarning, match="Mixer computes with its own matrix"):
        exec(compile(block, PAGE.name, "exec"), {"__name__": "page"})
    assert "50.0 % of 2,048 weights are on tiles" in capsys.readouterr().out


# ---- Layers that never compute ----------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Calls one of its layers, multiplies with the weight of another itself, and has a third for rare occasions."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.rare = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, rarely: bool = False) -> Tensor:
        x = F.linear(self.called(x), self.read.weight, self.read.bias)
        return self.rare(x) if rarely else x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Reader(), Reader()]), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x)}


def converted(model: nn.Module | None = None) -> Any:
    return convert_to_analog(Net() if model is None else model, noisy(), inplace=True)


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, "pickle"])
def test_the_first_training_forward_names_layers_whose_weight_their_parent_reads(copied: Any) -> None:
    model = converted()
    if copied == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        model = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        model = copied(model)
    assert said(lambda: model.eval()(X)) == []
    (text,) = said(lambda: model.train()(X)["logits"].sum().backward())
    assert "2 analog layer(s)" in text
    assert "called: blocks.0.read, blocks.1.read." in text
    assert "exclude_modules" in text
    assert not model._forward_hooks, "nothing is left to do in later forwards"
    optimizer = AnalogOptimizer(torch.optim.SGD, model.analog_layers, model.parameters(), lr=0.1)
    assert said(lambda: (optimizer.step(), model(X))) == [], "it is said once"


class ReadInTraining(nn.Module):
    """Calls its head in evaluation, and multiplies with its weight itself in training."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.head.weight) if self.training else self.head(x)


def test_a_call_in_evaluation_is_none_in_training() -> None:
    model = converted(nn.Sequential(ReadInTraining())).eval()
    model(X)
    (text,) = said(lambda: model.train()(X).sum().backward())
    assert "called: 0.head." in text


def test_layers_that_a_step_leaves_out_are_not_named() -> None:
    model = converted(nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}))
    model.forward = lambda x: model["a"](x)
    optimizer = AnalogOptimizer(torch.optim.SGD, model.analog_layers, model.parameters(), lr=0.1)
    model["b"].weight.grad = torch.zeros(6, 6)  # as sharding libraries leave it
    assert said(lambda: (model(X).sum().backward(), optimizer.step())) == []


def test_a_weight_that_something_else_holds_too_may_be_read() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 6), "head": nn.Linear(6, 6, bias=False)})
    model["head"].weight = model["embedding"].weight
    model.forward = lambda x: model["embedding"](x)
    analog = converted(model)
    assert said(lambda: analog(torch.arange(3)).sum().backward()) == []


@pytest.mark.parametrize("how", ["AnalogOptimizer", "attach"])
def test_the_first_step_names_what_a_forward_did_not_show(how: str) -> None:
    model = converted()
    optimizer: Any
    if how == "attach":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attach(model, optimizer)
    else:
        optimizer = AnalogOptimizer(torch.optim.SGD, model.analog_layers, model.parameters(), lr=0.1)
    x = X.clone().requires_grad_()
    for block in model.blocks:  # the root's own forward is not called
        x = checkpoint(block, x, use_reentrant=True)
    model.head(x).sum().backward()
    (text,) = said(optimizer.step)
    assert "blocks.0.read, blocks.1.read." in text
    assert said(optimizer.step) == []


def test_compiled_layers_count_as_called_and_their_graph_is_whole() -> None:
    model = converted()
    optimizer = AnalogOptimizer(torch.optim.SGD, model.analog_layers, model.parameters(), lr=0.1)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def step() -> None:
        compiled(X)["logits"].sum().backward()
        optimizer.step()

    (text,) = said(step)
    assert "2 analog layer(s)" in text
    assert "blocks.0.read, blocks.1.read." in text
    assert said(step) == []
    assert len(graphs) == 1


def test_a_model_made_digital_is_not_watched() -> None:
    assert not convert_to_digital(converted())._forward_hooks


@pytest.mark.parametrize("sample", [X, (X,), {"x": X}, ((), {"x": X})])
def test_a_sample_finds_them_at_once_and_leaves_the_model_as_it_was(sample: Any) -> None:
    model = Net()
    model.blocks[1].eval()
    modes, classes = [m.training for m in model.modules()], [type(m) for m in model.modules()]
    (text,) = said(lambda: convert_to_analog(model, noisy(), check=sample))
    assert "2 layer(s) are never called" in text
    assert "blocks.0.read (in Reader), blocks.1.read (in Reader)" in text
    assert "did not reach 2 layer(s), of which nothing is known: blocks.0.rare, blocks.1.rare" in text
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == classes
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_a_sample_has_found_is_not_said_again_in_training() -> None:
    model = None

    def convert() -> None:
        nonlocal model
        model = convert_to_analog(Net(), noisy(), check=X)

    assert len([text for text in said(convert) if text.startswith("check: ")]) == 1
    assert said(lambda: model.train()(X)["logits"].sum().backward()) == []  # type: ignore[union-attr]


def test_a_sample_that_all_layers_see_is_silent() -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 6)
    texts = said(lambda: convert_to_analog(layer, noisy(), exclude_modules=["self_attn"], check=X))
    assert texts == []


@pytest.mark.parametrize("sample", [1, X[:, :3]])
def test_a_sample_that_does_not_fit_leaves_everything_as_it_was(sample: Any) -> None:
    model = Net()
    before = [type(module) for module in model.modules()]
    with pytest.raises((TypeError, RuntimeError), match=r"check: got int; a sample of inputs|mat1 and mat2"):
        convert_to_analog(model, noisy(), inplace=True, check=sample)
    assert [type(module) for module in model.modules()] == before
    assert model.training
