"""Hugging Face's Conv1D on analog tiles: a linear layer whose weight is stored transposed."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from triton_analog import convert_to_analog, convert_to_digital
from triton_analog.config import (
    TorchInferenceRPUConfig,
    WeightClipType,
    WeightNoiseInjectionType,
    WeightQuantizationType,
)
from triton_analog.nn import AnalogHFConv1D, AnalogLinear

K, N = 12, 7


class Conv1D(nn.Module):
    """What ``transformers.pytorch_utils.Conv1D`` is to a conversion: attributes, parameters and outputs."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.fixture
def hugging_face(monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """The real class where transformers is installed, else the one above in its place."""
    try:
        from transformers.pytorch_utils import Conv1D as Real
    except ImportError:
        module: Any = ModuleType("transformers.pytorch_utils")
        module.Conv1D = Conv1D
        monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
        monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
        return Conv1D
    return Real


def everything() -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 5
    config.forward.inp_res, config.forward.out_bound, config.forward.out_res = 254, 3.0, 30
    config.forward.out_noise = 0.1
    config.pre_post.input_range.enable, config.pre_post.input_range.init_from_data = True, 0
    config.pre_post.input_range.init_value = 1.0
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, 0.05
    config.modifier.quantization_type, config.modifier.res = WeightQuantizationType.DISCRETIZE_PER_CHANNEL, 14
    return config


def twins(config: TorchInferenceRPUConfig) -> tuple[AnalogHFConv1D, AnalogLinear]:
    """Layers of the same numbers, one of them with its weight stored transposed."""
    layer = AnalogHFConv1D(N, K, rpu_config=config)
    linear = AnalogLinear(K, N, rpu_config=config)
    nn.init.normal_(layer.bias)
    linear.set_weights_and_biases(layer.weight.detach().T, layer.bias.detach())
    return layer, linear


@pytest.mark.parametrize("clip", [WeightClipType.NONE, WeightClipType.LEARNABLE_PER_CHANNEL])
def test_outputs_and_gradients_are_those_of_a_linear_layer(clip: WeightClipType) -> None:
    config = everything()
    config.clip.type = clip
    layer, linear = twins(config)
    layer.reset_weight_clip()
    x, x_twin = (torch.linspace(-2, 2, 4 * K).reshape(2, 2, K).requires_grad_() for _ in range(2))
    for module, given in ((layer, x), (linear, x_twin)):
        torch.manual_seed(3)
        module(given).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, x_twin.grad)
    assert layer.weight.grad is not None
    assert linear.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, linear.weight.grad.T)
    for name in ("bias", "input_range", "learnable_weight_clip"):
        own, other = getattr(layer, name), getattr(linear, name)
        assert (own is None) is (other is None)
        if own is not None:
            torch.testing.assert_close(own.grad, other.grad)


@pytest.mark.parametrize("clip", [WeightClipType.LAYER_GAUSSIAN, WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL])
def test_clipping_and_quantizing_go_by_outputs(clip: WeightClipType) -> None:
    config = everything()
    config.clip.type, config.clip.sigma = clip, 0.8
    layer, linear = twins(config)
    for module in (layer, linear):
        module.clip_weights()
    torch.testing.assert_close(layer.weight.T, linear.weight)
    for module in (layer, linear):
        module.quantize_weights()
    torch.testing.assert_close(layer.weight.T, linear.weight)


def test_a_model_converts_there_and_back(hugging_face: Any) -> None:
    model = nn.Sequential(hugging_face(N, K), nn.ReLU(), hugging_face(3, N)).eval()
    model[0].weight.requires_grad_(False)
    keys, x = set(model.state_dict()), torch.randn(5, K)
    analog = convert_to_analog(model, TorchInferenceRPUConfig())
    assert [type(layer) for layer in analog] == [AnalogHFConv1D, nn.ReLU, AnalogHFConv1D]
    assert {key for key in analog.state_dict() if not key.endswith("_extra_state")} == keys
    assert not analog[0].weight.requires_grad
    assert not analog[0].training
    torch.testing.assert_close(analog(x), model(x))
    inplace = convert_to_analog(copy.deepcopy(model), TorchInferenceRPUConfig(), inplace=True)
    torch.testing.assert_close(inplace(x), model(x))
    digital = convert_to_digital(analog)
    assert [type(layer) for layer in digital] == [type(layer) for layer in model]
    torch.testing.assert_close(digital(x), model(x))


def test_a_copy_keeps_what_it_knows(hugging_face: Any) -> None:
    layer = AnalogHFConv1D.from_digital(hugging_face(N, K), everything()).eval()
    plain = TorchInferenceRPUConfig()
    plain.mapping.max_input_size = 5
    twin = AnalogHFConv1D(N, K, rpu_config=plain).eval()
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(3, K)
    assert torch.equal(twin(x), layer(x))
    assert repr(layer).startswith(f"AnalogHFConv1D(nf={N}, nx={K}, slices=[4, 4, 4]")


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="nx: got 0; a tile needs at least 1"):
        AnalogHFConv1D(N, 0, rpu_config=TorchInferenceRPUConfig())
    with pytest.raises(TypeError, match=r"module: got Linear; a transformers\.pytorch_utils\.Conv1D is needed"):
        AnalogHFConv1D.from_digital(nn.Linear(K, N), TorchInferenceRPUConfig())


def test_it_is_hugging_faces_layer_for_libraries_that_ask(hugging_face: type[nn.Module]) -> None:
    layer = AnalogHFConv1D(4, 6, rpu_config=TorchInferenceRPUConfig())
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(one, hugging_face)
        assert type(one) is AnalogHFConv1D
        assert repr(one).startswith("AnalogHFConv1D(nf=4, nx=6, slices=[6]")
        assert set(dict(one.named_parameters())) == {"weight", "bias"}


def test_hugging_face_may_be_imported_later_or_never() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    code = (
        "import sys; from triton_analog import TorchInferenceRPUConfig; from triton_analog.nn import AnalogHFConv1D\n"
        "make = lambda: AnalogHFConv1D(4, 6, rpu_config=TorchInferenceRPUConfig())\n"
        "early = make(); assert 'transformers' not in sys.modules\n"
        "from transformers.pytorch_utils import Conv1D; make()\n"
        "assert isinstance(early, Conv1D)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
