"""Models of AIHWKIT's torch tiles as ours: the same outputs in evaluation, and every setting that is lost named."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from bridge import HIDDEN, IDEAL, IN, OUT, ROWS, assert_same_outputs, change, disturb, make_config, make_model, quietly
from torch import nn

from triton_analog import import_from_aihwkit
from triton_analog.aihwkit_bridge import base_aihwkit_rpu_config
from triton_analog.config import ConfigError, WeightClipType, WeightNoiseInjectionType, WeightQuantizationType
from triton_analog.convert import convert_to_analog
from triton_analog.nn import (
    AnalogConv2d,
    AnalogGRUCell,
    AnalogLinear,
    AnalogLSTMCell,
    AnalogLSTMCellCombinedWeight,
    AnalogRNN,
    AnalogSequential,
    AnalogVanillaRNNCell,
    AnalogWrapper,
)

NONE, GAUSSIAN, PER_CHANNEL, LEARNED = WeightClipType


def their_config(changes: dict[str, Any] | None = None) -> Any:
    """Converters, ranges and three slices, but for ``changes``."""
    defaults = {
        "mapping.max_input_size": 20,
        "forward.inp_bound": 1.0,
        "forward.inp_res": 1 / 30,
        "forward.out_bound": 2.1234,
        "forward.out_res": 1 / 30,
        "pre_post.input_range.enable": True,
        "pre_post.input_range.init_value": 1.7,
    }
    return change(base_aihwkit_rpu_config(), defaults | (changes or {}))


def their_model(aihwkit: Any, config: Any) -> Any:
    layers = [aihwkit.nn.AnalogLinear(*sizes, rpu_config=config) for sizes in ((IN, HIDDEN), (HIDDEN, OUT))]
    return aihwkit.nn.AnalogSequential(layers[0], nn.Tanh(), layers[1]).eval()


def quiet_import(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_from_aihwkit(model)


# ---- Models made by AIHWKIT ---------------------------------------------------------------------------------------------------

RANGES = {
    "range": {},
    "range without converters": {"forward.inp_res": -1, "forward.out_bound": 0.0, "forward.out_res": -1},
    "range that is not learned": {"pre_post.input_range.learn_input_range": False},
    "dynamic range": {"pre_post.input_range.enable": False, "forward.noise_management": "ABS_MAX"},
    "bound of the DAC": {"pre_post.input_range.enable": False, "forward.inp_bound": 1.3},
    "wide grid of the DAC": {"forward.inp_bound": 2.0, "forward.inp_res": 62},
    "nothing": {
        "pre_post.input_range.enable": False,
        "forward.inp_bound": 0.0,
        "forward.inp_res": -1,
        "forward.out_bound": 0.0,
        "forward.out_res": -1,
    },
    "perfect": {"forward.is_perfect": True, "forward.inp_noise": 1.0},
}
MAPPINGS = {
    "not mapped": {"mapping.weight_scaling_omega": 0.0},
    "per layer": {},
    "per channel": {"mapping.weight_scaling_columnwise": True},
    "half the range": {"mapping.weight_scaling_omega": 0.5},
    "beyond the range": {"mapping.weight_scaling_omega": 1.5, "mapping.weight_scaling_columnwise": True},
    "tiles of 8 outputs": {"mapping.max_output_size": 8},
    "one tile each": {"mapping.max_output_size": 512, "mapping.max_input_size": 512},
    "learned scales": {"mapping.learn_out_scaling": True, "mapping.out_scaling_columnwise": True},
}


@pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=MAPPINGS)
@pytest.mark.parametrize("ranged", RANGES.values(), ids=RANGES)
def test_the_outputs_are_the_same(aihwkit, ranged, mapping):
    model = their_model(aihwkit, their_config(ranged | mapping))
    for tile in model.analog_tiles():
        if tile.out_scaling_alpha is not None:
            nn.init.uniform_(tile.out_scaling_alpha, 0.5, 1.5)
    assert_same_outputs(model, quiet_import(model))


def test_weights_trained_since_they_were_mapped(aihwkit):
    model = their_model(aihwkit, their_config())
    with torch.no_grad():
        for tile in model.analog_tiles():
            tile.tile.weight.add_(0.3 * torch.randn_like(tile.tile.weight))
    assert_same_outputs(model, quiet_import(model))


def test_a_chip_that_was_programmed_and_has_drifted(aihwkit):
    model = their_model(aihwkit, their_config())
    intended = model[0].get_weights()[0]
    model.drift_analog_weights(1e6)
    ours = quiet_import(model)
    assert (ours[0].weight - intended).abs().max() > 0.1 * intended.abs().max()
    assert_same_outputs(model, ours)


def test_convolutions(aihwkit):
    conv = aihwkit.nn.AnalogConv2d(
        3, 6, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2), rpu_config=their_config()
    )
    model = aihwkit.nn.AnalogSequential(conv, nn.ReLU()).eval()
    ours = quiet_import(model)
    assert type(ours[0]) is AnalogConv2d
    x = torch.randn(2, 3, 7, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bidir", [False, True])
@pytest.mark.parametrize(
    "cell",
    [AnalogVanillaRNNCell, AnalogLSTMCell, AnalogLSTMCellCombinedWeight, AnalogGRUCell],
    ids=lambda cell: cell.__name__,
)
def test_recurrent_layers(aihwkit, cell, bidir):
    theirs = getattr(aihwkit.nn, cell.__name__)
    rnn = aihwkit.nn.AnalogRNN(theirs, IN, 6, rpu_config=their_config(), num_layers=2, bidir=bidir, dropout=0.3).eval()
    ours, x = quiet_import(rnn), torch.randn(5, ROWS, IN)
    assert type(ours) is AnalogRNN
    assert (ours.num_layers, ours.bidirectional, ours.dropout, ours.training) == (2, bidir, 0.3, False)
    with torch.no_grad():
        difference = (ours(x)[0] - rnn(x)[0]).abs().amax(2)
    assert (difference > 1e-4).float().mean() <= 0.05


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(IN, HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.norm(self.one(x)))


def test_containers_and_the_model_itself(aihwkit):
    from aihwkit.nn.conversion import convert_to_analog as convert_theirs

    wrapped = convert_theirs(Normed(), their_config()).eval()
    before = [tensor.clone() for tensor in wrapped.parameters()]
    ours = quiet_import(wrapped)
    assert isinstance(ours, Normed)
    assert isinstance(ours, AnalogWrapper)
    assert [name for name, _ in ours.named_analog_layers()] == ["one", "two"]
    assert not any(type(module).__module__.startswith("aihwkit") for module in ours.modules())
    assert_same_outputs(wrapped, ours)
    assert isinstance(wrapped, aihwkit.nn.AnalogWrapper)
    assert all(torch.equal(now, then) for now, then in zip(wrapped.parameters(), before, strict=True))
    assert type(quiet_import(their_model(aihwkit, their_config()))) is AnalogSequential


def test_mode_and_frozen_parameters_stay(aihwkit):
    model = their_model(aihwkit, their_config())
    next(iter(model[0].analog_tiles())).tile.weight.requires_grad_(False)
    model[2].train()
    ours = quiet_import(model)
    assert [layer.training for layer in ours] == [False, False, True]
    assert [layer.weight.requires_grad for layer in (ours[0], ours[2])] == [False, True]


# ---- There and back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [-1, 20])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        IDEAL,
        {"pre_post.input_range.dynamic": True},
        {"pre_post.input_range.learn_input_range": False},
        {"pre_post.input_range.decay": 0.2, "pre_post.input_range.init_from_data": 7},
        {"forward.inp_res": 31},
        {"forward.inp_res": 1 / 31},
        {"clip.type": GAUSSIAN},
        {"clip.type": PER_CHANNEL},
        {"clip.type": LEARNED},
        {"modifier.noise_type": WeightNoiseInjectionType.ADD_NORMAL, "modifier.std_dev": 0.03},
        {
            "clip.type": PER_CHANNEL,
            "modifier.noise_type": WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL,
            "modifier.std_dev": 0.03,
        },
        {"forward.out_noise": 0.04},
        {"forward.out_noise": 0.04, "forward.out_noise_per_channel": True, "clip.type": PER_CHANNEL},
    ],
)
def test_there_and_back(aihwkit, changes, tile):
    model = make_model(make_config(changes | {"mapping.max_input_size": tile}))
    ours = quiet_import(quietly(model, out_noise=True))
    assert_same_outputs(model, ours)
    for before, after in ((model[0], ours[0]), (model[2], ours[2])):
        expected = before.rpu_config
        if before.learnable_weight_clip is not None:
            assert torch.equal(after.learnable_weight_clip.detach(), before.learnable_weight_clip.detach())
            expected.clip.sigma = after.rpu_config.clip.sigma
        else:
            torch.testing.assert_close(after.weight, before.weight, rtol=1e-6, atol=1e-7)
        assert after.rpu_config == expected
        if before.input_range is not None:
            assert torch.equal(after.input_range, before.input_range.abs())
            assert after.input_range.requires_grad == before.input_range.requires_grad
            assert torch.equal(after.input_range_update_idx, before.input_range_update_idx)


@pytest.mark.parametrize("random", [{"forward.inp_sto_round": True}, {"forward.inp_noise": 0.05}], ids=list)
def test_random_inputs_there_and_back(aihwkit, random):
    """They act in evaluation on both sides."""
    model = make_model(make_config(random | {"forward.out_bound": 50.0, "forward.out_res": -1}))
    exported = quietly(model)
    ours = quiet_import(exported)
    assert ours[0].rpu_config == model[0].rpu_config
    x = torch.randn(IN).expand(6000, IN)
    with torch.no_grad():
        expected, *others = (one[0](x) for one in (model, exported, ours))
    for found in others:
        error = expected.std(0) * (2 / len(x)) ** 0.5
        assert ((found.mean(0) - expected.mean(0)).abs() < 5 * error + 1e-5).all()
        torch.testing.assert_close(found.std(0), expected.std(0), rtol=0.07, atol=0)
    assert (expected.std(0) > 0).all()


def test_input_noise_with_the_bound_of_the_dac_for_a_range(aihwkit):
    changes = {"pre_post.input_range.enable": False, "forward.inp_bound": 1.6, "forward.inp_noise": 0.08}
    ours = quiet_import(their_model(aihwkit, their_config(changes)))
    assert ours[0].rpu_config.forward.inp_noise == pytest.approx(0.05)


@pytest.mark.parametrize("quantization", ["DISCRETIZE", "DISCRETIZE_PER_CHANNEL"])
def test_quantized_weights_come_back_quantized_for_good(aihwkit, quantization):
    changes = {"modifier.quantization_type": WeightQuantizationType[quantization], "modifier.res": 15}
    model = make_model(make_config(changes))
    ours = quiet_import(quietly(model))
    assert ours[0].rpu_config.modifier.quantization_type is WeightQuantizationType.NONE
    assert_same_outputs(model, ours)


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions_there_and_back(aihwkit, conv):
    model = disturb(convert_to_analog(conv(3, 6, 2, padding="same", padding_mode="circular"), make_config()))
    ours = quiet_import(quietly(model))
    x = torch.randn(2, 3, *(5, 6, 7)[: model.weight.ndim - 2])
    with torch.no_grad():
        torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-4)
    assert [type(layer) for layer in ours.analog_layers()] == [AnalogConv2d]


# ---- What is not simulated here ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"forward.inp_asymmetry": 0.1}, "forward.inp_asymmetry: got 0.1"),
        ({"forward.out_noise_std": 0.1}, "forward.out_noise_std: got 0.1"),
        ({"forward.out_sto_round": True}, "forward.out_sto_round: got True"),
        ({"forward.out_scale": 2.0}, "forward.out_scale: got 2.0, .*set it to 1.0"),
        ({"forward.out_asymmetry": 0.1}, "forward.out_asymmetry: got 0.1"),
        (
            {"forward.bound_management": "ITERATIVE"},
            "forward.bound_management: got ITERATIVE, .*set it to NONE, .*up to ten",
        ),
        ({"forward.noise_management": "MAX"}, "forward.noise_management: got MAX"),
        ({"forward.noise_management": "ABS_MAX"}, "forward.noise_management: got ABS_MAX, .*disable the input range"),
        (
            {"pre_post.input_range.enable": False, "forward.noise_management": "ABS_MAX", "forward.nm_thres": 1.0},
            "forward.noise_management: got ABS_MAX, .*nm_thres = 0",
        ),
        ({"forward.inp_res": 31}, "forward.inp_bound with inp_res = 31: got 1.0"),
        ({"forward.inp_bound": 0.0}, "forward.inp_bound with inp_res = .*: got 0.0"),
        ({"forward.inp_bound": 0.5, "forward.inp_res": -1}, "forward.inp_bound: got 0.5"),
        ({"pre_post.input_range.enable": False, "forward.inp_res": 31}, "forward.inp_res: got 31"),
        (
            {"pre_post.input_range.enable": False, "forward.inp_bound": 0.0, "forward.inp_res": -1},
            "forward.out_bound: got 2.1234",
        ),
    ],
)
def test_a_setting_that_acts_in_evaluation_is_refused(aihwkit, changes, said):
    model = their_model(aihwkit, their_config(changes))
    with pytest.raises(ConfigError, match=f"^0: {said}"):
        import_from_aihwkit(model)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"forward.out_noise": 0.1}, "forward.out_noise: acts in training only"),
        ({"modifier.type": "MULT_NORMAL"}, "modifier.type MULT_NORMAL: left out"),
        ({"modifier.type": "DISCRETIZE", "modifier.res": 0.1}, "modifier.type DISCRETIZE: left out"),
        ({"modifier.per_batch_sample": True}, "modifier.per_batch_sample = True"),
        ({"clip.type": "FIXED_VALUE", "clip.fixed_value": 0.5}, "clip.type FIXED_VALUE: left out"),
        (
            {"clip.type": "LAYER_GAUSSIAN", "mapping.weight_scaling_omega": 0.5},
            "clip.type LAYER_GAUSSIAN: left out, as a learned clip",
        ),
        ({"mapping.learn_out_scaling": True}, "mapping.learn_out_scaling = True"),
        ({"pre_post.input_range.gradient_scale": 2.0}, "pre_post.input_range.gradient_scale = 2.0"),
        ({"pre_post.input_range.gradient_relative": False}, "pre_post.input_range.gradient_relative = False"),
        ({"pre_post.input_range.manage_output_clipping": True}, "pre_post.input_range.manage_output_clipping = True"),
    ],
)
def test_one_warning_names_what_is_lost_for_training(aihwkit, changes, said):
    model = their_model(aihwkit, their_config(changes))
    with pytest.warns(UserWarning, match="import_from_aihwkit: evaluation is the same, but training differs") as warned:
        import_from_aihwkit(model)
    (warning,) = warned
    assert said in str(warning.message)
    assert "(in 0, 2)" in str(warning.message)
    assert warning.filename == __file__


def test_no_warning_without_reason(aihwkit):
    model = their_model(aihwkit, their_config({"modifier.type": "ADD_NORMAL", "modifier.std_dev": 0.1}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_from_aihwkit(model)


@pytest.mark.parametrize(
    ("relative", "assumed", "omega", "deviation"),
    [(True, 1.0, 1.0, 0.1), (False, 1.0, 1.0, 0.1), (False, 0.5, 1.0, 0.05), (False, 1.0, 0.5, 0.2)],
)
def test_weight_noise_keeps_its_deviation(aihwkit, relative, assumed, omega, deviation):
    changes = {
        "mapping.weight_scaling_omega": omega,
        "modifier.type": "ADD_NORMAL",
        "modifier.std_dev": 0.1,
        "modifier.rel_to_actual_wmax": relative,
        "modifier.assumed_wmax": assumed,
        "forward.out_bound": 0.0,
        "forward.out_res": -1,
    }
    ours = quiet_import(their_model(aihwkit, their_config(changes)))
    assert ours[0].rpu_config.modifier.std_dev == pytest.approx(deviation)


def test_tiles_of_a_slice_with_different_ranges_are_refused(aihwkit):
    model = their_model(aihwkit, their_config({"mapping.max_output_size": 8}))
    model[0].analog_module.array[1][2].set_input_range(1.0)
    with pytest.raises(ValueError, match=r"^0: the tiles of inputs 1 have input ranges \[1.0, 1.7"):
        import_from_aihwkit(model)


def test_other_configs_and_layers_are_refused(aihwkit):
    from aihwkit.simulator.configs import TorchInferenceRPUConfigIRDropT

    layer = aihwkit.nn.AnalogLinear(4, 4, rpu_config=TorchInferenceRPUConfigIRDropT())
    with pytest.raises(TypeError, match="with a TorchInferenceRPUConfigIRDropT; only the torch tiles of"):
        import_from_aihwkit(layer)
    layer = aihwkit.nn.AnalogConv1d(4, 4, 2, rpu_config=their_config())
    with pytest.raises(
        TypeError, match=r"^a: got AIHWKIT's AnalogConv1d; imported are .*: convert this one to digital"
    ):
        import_from_aihwkit(nn.ModuleDict({"a": layer}))
    rnn = aihwkit.nn.AnalogRNN(aihwkit.nn.AnalogLSTMCell, 4, 4, rpu_config=None)
    with pytest.raises(TypeError, match="got an AnalogRNN without tiles"):
        import_from_aihwkit(rnn)


def test_a_model_without_aihwkit_layers_is_refused(aihwkit):
    with pytest.raises(TypeError, match=r"^model: got int"):
        import_from_aihwkit(3)
    with pytest.raises(ValueError, match=r"^model: AnalogLinear has no AIHWKIT layers"):
        import_from_aihwkit(AnalogLinear(2, 2, rpu_config=make_config()))
