"""Layers that something outside has changed: weights of another shape, and digital layers where analog ones were."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from triton_analog import AnalogOptimizer, TorchInferenceRPUConfig, convert_to_analog, convert_to_digital
from triton_analog.config import WeightClipType
from triton_analog.nn import AnalogConv2d, AnalogHFConv1D, AnalogLinear
from triton_analog.optim import attach


def config(clip: bool = True) -> TorchInferenceRPUConfig:
    made = TorchInferenceRPUConfig()
    made.mapping.max_input_size = 5
    made.forward.inp_res = 254
    made.pre_post.input_range.enable = True
    made.pre_post.input_range.init_from_data = 0
    if clip:
        made.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    return made


def linear(outputs: int = 4, clip: bool = True, bias: bool = False) -> AnalogLinear:
    layer = AnalogLinear(8, outputs, bias=bias, rpu_config=config(clip))
    with torch.no_grad():
        layer.input_range.copy_(torch.tensor([1.5, 2.5]))
    return layer


def with_weight(layer: Any, *shape: int) -> Any:
    layer.weight = nn.Parameter(torch.randn(shape))
    return layer


# ---- Other shapes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [6, 3])
def test_tiles_follow_another_number_of_outputs(outputs: int) -> None:
    layer = linear()
    with torch.no_grad():
        layer.learnable_weight_clip.mul_(0.5)
    clip, kept = layer.learnable_weight_clip.detach().clone(), min(outputs, 4)
    layer.learnable_weight_clip.requires_grad_(False)
    with_weight(layer, outputs, 8)
    assert layer.resized() is layer
    assert (layer.tile_shape, layer.out_features, layer.in_features) == ((outputs, 8), outputs, 8)
    assert layer.input_range.tolist() == [1.5, 2.5]
    assert torch.equal(layer.learnable_weight_clip[:, :kept], clip[:, :kept])
    assert torch.equal(layer.learnable_weight_clip[0, kept:], layer.weight[kept:, :4].abs().amax(1))
    assert not layer.learnable_weight_clip.requires_grad
    again = linear(outputs)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8)
    assert torch.equal(again.eval()(x), layer.eval()(x))


def test_other_inputs_start_ranges_and_clip_anew() -> None:
    layer = with_weight(linear(), 4, 12).resized()
    fresh = AnalogLinear(12, 4, bias=False, rpu_config=config())
    fresh.set_weights(layer.weight)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, layer.state_dict()[name])
    x = torch.randn(2, 12)
    assert torch.equal(layer(x), fresh(x))


def test_every_kind_of_layer_follows() -> None:
    conv = AnalogConv2d(4, 6, 3, groups=2, bias=False, rpu_config=config())
    with_weight(conv, 8, 2, 3, 3).resized()
    assert conv.out_channels == 8
    assert conv(torch.randn(1, 4, 5, 5)).shape == (1, 8, 3, 3)
    hugging_faces = AnalogHFConv1D(4, 8, rpu_config=config())
    hugging_faces.bias = nn.Parameter(torch.zeros(5))
    with_weight(hugging_faces, 8, 5).resized()
    assert hugging_faces(torch.randn(1, 8)).shape == (1, 5)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (linear(bias=True), (6, 8), r"bias: it has shape \(4,\), but the weight has 6 outputs"),
        (
            AnalogConv2d(4, 6, 3, bias=False, rpu_config=config()),
            (6, 4, 5, 5),
            r"weight: got shape .*; a kernel of \(3, 3\)",
        ),
        (
            AnalogConv2d(4, 6, 3, groups=2, bias=False, rpu_config=config()),
            (7, 2, 3, 3),
            r"outputs that the 2 group\(s\)",
        ),
    ],
    ids=["bias", "kernel", "groups"],
)
def test_what_cannot_follow_is_refused_and_stays(layer: Any, shape: Any, message: str) -> None:
    layer = with_weight(copy.deepcopy(layer), *shape)
    before = layer.tile_shape, layer.learnable_weight_clip, str(layer)
    with pytest.raises(ValueError, match=message):
        layer.resized()
    assert (layer.tile_shape, layer.learnable_weight_clip, str(layer)) == before


def test_a_layer_of_the_right_shape_stays() -> None:
    layer = linear()
    before = dict(layer.named_parameters())
    assert dict(layer.resized().named_parameters()) == before


MESSAGE = r"the weight of this AnalogLinear has become .* \(6, 8\), but its tiles .* \(4, 8\); call its resized\(\)"


def test_what_cannot_go_on_names_the_layer_and_the_remedy() -> None:
    model = convert_to_analog(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4, bias=False)), config())
    with_weight(model[1], 6, 8)
    with pytest.raises(ValueError, match=MESSAGE):
        model(torch.randn(2, 8))
    for refused in (model.state_dict, lambda: attach(model, SGD(model.parameters()))):
        with pytest.raises(ValueError, match="^1: " + MESSAGE):
            refused()
    model[1].resized()
    attach(model, SGD(model.parameters()))
    assert model.state_dict()["1.learnable_weight_clip"].shape == (2, 6)


def test_a_wrong_input_is_still_what_is_complained_of() -> None:
    with pytest.raises(ValueError, match=r"^x: "):
        linear()(torch.randn(2, 7))


def test_where_only_sizes_change_tiles_follow_by_themselves() -> None:
    layer = with_weight(linear(clip=False), 6, 8)
    assert layer(torch.randn(2, 8)).shape == (2, 6)
    layer.state_dict()
    assert (layer.tile_shape, layer.out_features) == ((6, 8), 6)


def test_a_weight_that_is_kept_in_parts_is_no_other_shape() -> None:
    layer = linear()
    layer.weight.data = layer.weight.data.flatten()[:5]
    assert layer.state_dict()["weight"].shape == (5,)
    assert layer.tile_shape == (4, 8)


# ---- Other layers -------------------------------------------------------------------------------------------------------


def model() -> Any:
    return convert_to_analog(nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4))), config())


LOST = r"1 layer\(s\) were analog when the model was converted and are digital now: 1\.0 \(Linear\)\. .* Convert the model again"


@pytest.mark.parametrize("look", [lambda net: net.state_dict(), lambda net: attach(net, SGD(net.parameters()))])
def test_a_layer_that_became_digital_is_noticed_once(look: Any) -> None:
    net = copy.deepcopy(model())
    net[1][0] = nn.Linear(8, 4)
    with pytest.warns(UserWarning, match=LOST):
        look(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(net)
    again = convert_to_analog(net, config())
    assert isinstance(again[1][0], AnalogLinear)


def test_analog_optimizer_notices_it_too() -> None:
    net = model()
    net[1][0] = nn.Linear(8, 4)
    with pytest.warns(UserWarning, match=LOST):
        AnalogOptimizer(SGD, net.analog_layers, net.parameters(), lr=0.1)


def test_an_optimizer_of_the_whole_model_notices_it_below_too() -> None:
    net = nn.ModuleDict({"net": model()})
    net["net"][1][0] = nn.Linear(8, 4)
    with pytest.warns(UserWarning, match=r"now: net\.1\.0 \(Linear\)"):
        attach(net, SGD(net.parameters()))


def test_what_is_meant_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = model()
        del net[1]
        net.state_dict()
        net = model()
        net[1][0] = AnalogLinear(8, 4, rpu_config=config())
        net.state_dict()
        convert_to_digital(model()).state_dict()
        AnalogOptimizer(SGD, net.analog_layers, net.parameters())
