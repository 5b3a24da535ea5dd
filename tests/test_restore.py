"""A converted model anew from its state dict, with the config of every layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from triton_analog import TorchInferenceRPUConfig, convert_to_analog, restore_analog
from triton_analog.config import ConfigError, WeightClipType
from triton_analog.nn import AnalogLinear, AnalogRNN


def config() -> TorchInferenceRPUConfig:
    chosen = TorchInferenceRPUConfig()
    chosen.mapping.max_input_size = 8
    chosen.forward.inp_res = 254
    chosen.pre_post.input_range.enable = True
    return chosen


class Digital(nn.Module):
    """Nested, tied, recurrent, convolutional, and partly digital."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.body = nn.ModuleDict({"conv": nn.Conv1d(12, 12, 3, padding=1), "rnn": nn.GRU(12, 12, batch_first=True)})
        self.other = nn.Linear(12, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.body["conv"](self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.other(self.body["rnn"](x)[0]))


TOKENS = torch.arange(14).reshape(2, 7)


def choose(name: str, layer: nn.Module, given: TorchInferenceRPUConfig) -> TorchInferenceRPUConfig:
    if name == "body.conv":
        given.mapping.max_input_size, given.clip.type = 5, WeightClipType.LEARNABLE_PER_CHANNEL
    return given


def converted() -> Any:
    analog = convert_to_analog(Digital(), config(), specific_rpu_config_fun=choose, exclude_modules=["other"])
    analog(TOKENS)  # moves the ranges
    return analog.eval()


@pytest.mark.parametrize("form", ["torch", "safetensors"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_checkpoint_and_the_digital_model_give_the_analog_model(form: str, inplace: bool, tmp_path: Path) -> None:
    source, path = converted(), tmp_path / "model"
    if form == "torch":
        torch.save(source.state_dict(), path)
        state = torch.load(path, weights_only=True)
    else:
        safetensors.torch.save_model(source, str(path))  # which leaves out one of two tied weights
        state = safetensors.torch.load_file(path)
        assert ("head.weight" in state) is not ("embedding.weight" in state)
    digital = Digital()
    analog = restore_analog(digital, state, inplace=inplace)
    assert (analog is digital) is inplace
    assert type(analog.other) is nn.Linear
    assert isinstance(analog.body["rnn"], AnalogRNN)
    assert analog.head.weight is analog.embedding.weight
    assert analog.body["conv"].rpu_config == source.body["conv"].rpu_config
    assert torch.equal(analog.eval()(TOKENS), source(TOKENS))
    assert set(analog.state_dict()) == set(source.state_dict())


def test_a_single_layer_is_its_own_model() -> None:
    layer = convert_to_analog(nn.Linear(12, 3), config()).eval()
    again = restore_analog(nn.Linear(12, 3), layer.state_dict()).eval()
    assert isinstance(again, AnalogLinear)
    x = torch.randn(4, 12)
    assert torch.equal(again(x), layer(x))


def test_what_does_not_fit_is_named() -> None:
    state = converted().state_dict()
    with pytest.raises(ValueError, match="state_dict: it holds no config of an analog layer"):
        restore_analog(Digital(), Digital().state_dict())
    with pytest.raises(ValueError, match=r"no layers to convert in this model: body\.conv, body\.rnn"):
        restore_analog(nn.ModuleDict({"head": nn.Linear(12, 20)}), state)
    with pytest.raises(RuntimeError, match=r"missing are \['other.bias'\]; left over are \['another'\]"):
        restore_analog(Digital(), {k: v for k, v in state.items() if k != "other.bias"} | {"another": torch.zeros(1)})
    damaged = copy.copy(state)
    damaged["head._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="extra state: got Tensor"):
        restore_analog(Digital(), damaged)


def test_the_digital_model_stays_as_it_is_when_something_does_not_fit() -> None:
    digital = Digital()
    with pytest.raises(ValueError, match=r"body\.conv"):
        restore_analog(nn.ModuleDict({"head": digital.head}), converted().state_dict(), inplace=True)
    assert type(digital.head) is nn.Linear
