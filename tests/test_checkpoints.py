"""A nested analog model survives the formats that checkpoints travel in, configs included."""

from __future__ import annotations

import copy
import re

import pytest
import safetensors.torch
import torch
from torch import nn

from triton_analog import TorchInferenceRPUConfig, convert_to_analog
from triton_analog.config import WeightClipType
from triton_analog.nn import AnalogConv1d


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


# ---- Other tiles ---------------------------------------------------------------------------------------------------------


def tiled(max_input_size: int, *, dynamic: bool = False, learns_clip: bool = False) -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = max_input_size
    config.pre_post.input_range.enable, config.pre_post.input_range.dynamic = True, dynamic
    if learns_clip:
        config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    return config


def nested(config: TorchInferenceRPUConfig) -> nn.Module:
    return convert_to_analog(nn.ModuleDict({"body": nn.Sequential(nn.ReLU(), nn.Linear(64, 3))}), config)


def without_configs(state):
    """As AIHWKIT-Lightning saves it."""
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def assert_refused(target, state, *messages, strict=True):
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(RuntimeError) as raised:
        target.load_state_dict(state, strict=strict)
    for message in messages:
        assert message in re.sub(r"\s+", " ", str(raised.value))
    assert "size mismatch" not in str(raised.value)
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"learns_clip": True}], ids=["static", "dynamic", "clip"])
def test_a_layer_of_other_tiles_is_refused_by_its_config(options):
    """The config of a file is taken over, but not if it cuts the inputs in another way: the layer was built for that."""
    state = nested(tiled(16, **options)).state_dict()
    names = "body.1._extra_state: mapping.max_input_size: got 16"
    tiles = "into slices of [16, 16, 16, 16], but this layer has slices of [32, 32]"
    assert_refused(nested(tiled(32, **options)), state, names, tiles)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("options", "name", "shapes"),
    [
        ({}, "input_range", ("(4,)", "(2,)")),
        ({"learns_clip": True, "dynamic": True}, "learnable_weight_clip", ("(4, 3)", "(2, 3)")),
    ],
)
def test_a_layer_of_other_tiles_is_refused_by_the_tensors_of_a_file_without_configs(options, name, shapes, strict):
    state = without_configs(nested(tiled(16, **options)).state_dict())
    saved = f"body.1.{name}: the file has shape {shapes[0]}, of slices of [16, 16, 16, 16]"
    own = f"but this layer {shapes[1]}, of slices of [32, 32] (mapping.max_input_size is 32)"
    assert_refused(nested(tiled(32, **options)), state, saved, own, strict=strict)


def test_the_slices_of_grouped_convolutions_are_those_of_a_group():
    coarse, fine = (AnalogConv1d(8, 4, 4, groups=2, rpu_config=tiled(size)) for size in (16, 8))
    state = without_configs(fine.state_dict())
    assert_refused(
        coarse, state, "input_range: the file has shape (4,), of slices of [8, 8]", "(2,), of slices of [16]"
    )


def test_a_file_without_configs_of_the_same_tiles_loads():
    source, target = nested(tiled(16)), nested(tiled(16))
    source["body"](torch.randn(64, 64))
    target.load_state_dict(without_configs(source.state_dict()))
    x = torch.randn(5, 64)
    assert torch.equal(target.eval()["body"](x), source.eval()["body"](x))
