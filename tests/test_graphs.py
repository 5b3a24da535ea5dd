"""Models handed to what makes graphs of them: torch.export and torch.fx hold analog layers, TorchScript and ONNX say why not."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triton_analog import TorchInferenceRPUConfig, convert_to_analog
from triton_analog.nn import AnalogConv1d, AnalogLinear, AnalogLSTMCell, AnalogRNN


def ranged(start_up: int = 0) -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 5
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.init_from_data = start_up
    config.forward.inp_res = config.forward.out_res = 254
    config.forward.out_bound = 4.0
    return config


def model(start_up: int = 0) -> Any:
    return convert_to_analog(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)), ranged(start_up))


class Mixed(nn.Module):
    """A layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = AnalogConv1d(4, 6, 3, padding=1, rpu_config=ranged())
        self.rnn = AnalogRNN(AnalogLSTMCell, 6, 5, batch_first=True, rpu_config=ranged())
        self.head = AnalogLinear(5, 2, rpu_config=ranged())

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(self.conv(x).relu().movedim(1, 2))
        return self.head(out)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("start_up", [0, 2])
def test_export_keeps_a_layer_with_its_ranges(training: bool, start_up: int) -> None:
    """In training its start-up too, which changes the ranges of the exported model."""
    net = model(start_up).train(training)
    batches = [torch.randn(4, 12) for _ in range(4)]
    exported = torch.export.export(copy.deepcopy(net), (batches[0],)).module()
    for x in batches:
        assert torch.equal(exported(x), net(x))
    state = exported.state_dict()
    for name, value in net.state_dict().items():
        if name in state:
            assert torch.equal(state[name], value), name
    assert "0.input_range" in state


@pytest.mark.parametrize("make", [model, Mixed])
def test_fx_takes_a_layer_for_a_leaf_as_it_does_torchs(make: Callable[[], nn.Module]) -> None:
    net = make()
    x = torch.randn(4, 12) if make is model else torch.randn(3, 4, 7)
    graph = torch.fx.symbolic_trace(net)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert set(called) >= {name for name, child in net.named_children() if not isinstance(child, nn.ReLU)}
    assert torch.equal(graph(x), net(x))
    assert torch.equal(copy.deepcopy(graph)(x), net(x))


def test_a_layer_alone_has_no_graph_for_fx() -> None:
    with pytest.raises(RuntimeError, match=r"AnalogLinear is one node of a graph .* torch\.export"):
        torch.fx.symbolic_trace(AnalogLinear(12, 3, rpu_config=ranged()))


@pytest.mark.parametrize("make", [model, Mixed])
def test_torchscript_says_what_to_use_instead(make: Callable[[], nn.Module]) -> None:
    net = make()
    x = torch.randn(4, 12) if make is model else torch.randn(3, 4, 7)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script: .* hold a Analog\w+; use torch\.export\.export"):
        torch.jit.script(net)
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(RuntimeError, match=r"torch\.jit\.trace: .*; use torch\.export"),
        ):
            torch.jit.trace(net, (x,))


@pytest.mark.parametrize("grad", [True, False])
def test_onnx_says_what_to_export_instead(grad: bool) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"ONNX has no operator .*convert_to_digital"):
        torch.onnx.export(model().eval(), (torch.randn(4, 12),), io.BytesIO(), dynamo=False)
