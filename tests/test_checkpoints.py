"""A nested analog model survives the formats that checkpoints travel in, configs included."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

from triton_analog import TorchInferenceRPUConfig, convert_to_analog


def model(resolution: float) -> nn.Module:
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 8
    config.forward.inp_res = resolution
    config.pre_post.input_range.enable = True
    digital = nn.Sequential(nn.Linear(20, 10), nn.Sequential(nn.ReLU(), nn.Linear(10, 3)))
    return convert_to_analog(digital, config)


@pytest.mark.parametrize("name", ["torch", "safetensors"])
def test_round_trip(name, tmp_path):
    source, target, path = model(254.0), model(30.0), tmp_path / "model"
    source(torch.randn(64, 20))  # moves the ranges
    if name == "torch":
        torch.save(source.state_dict(), path)
        state = torch.load(path, weights_only=True)
    else:
        safetensors.torch.save_file(source.state_dict(), path)
        state = safetensors.torch.load_file(path)
    target.load_state_dict(state)
    x = torch.randn(5, 20)
    assert torch.equal(target.eval()(x), source.eval()(x))
    assert [layer.rpu_config for layer in target.analog_layers()] == [
        layer.rpu_config for layer in source.analog_layers()
    ]
