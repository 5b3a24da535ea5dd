"""Models as AIHWKIT's: the same outputs in evaluation, whatever the config, and every difference said.

AIHWKIT's torch tile itself is the judge, so that most tests need it.
"""

from __future__ import annotations

import copy
import io
import math
import sys
import warnings
from typing import Any

import pytest
import torch
from bridge import (
    HIDDEN,
    IDEAL,
    IN,
    OUT,
    ROWS,
    assert_same_outputs,
    disturb,
    make_config,
    make_model,
    quietly,
    tiles_of,
)
from helpers import assert_same_up_to_one_step
from torch import Tensor, nn

import triton_analog
from triton_analog import export_to_aihwkit
from triton_analog.aihwkit_bridge import base_aihwkit_rpu_config
from triton_analog.config import (
    ConfigError,
    TorchInferenceRPUConfig,
    WeightClipType,
    WeightNoiseInjectionType,
    WeightNoiseRefresh,
    WeightNoiseType,
    WeightQuantizationType,
)
from triton_analog.convert import convert_to_analog
from triton_analog.nn import (
    AnalogGRUCell,
    AnalogLinear,
    AnalogLSTMCell,
    AnalogLSTMCellCombinedWeight,
    AnalogRNN,
    AnalogVanillaRNNCell,
)

NONE, GAUSSIAN, PER_CHANNEL, LEARNED = WeightClipType


# ---- Outputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_output_size", [-1, 8])
@pytest.mark.parametrize("tile", [-1, 20])
@pytest.mark.parametrize("adc", [True, False], ids=["adc", "no adc"])
@pytest.mark.parametrize("ranged", ["static", "dynamic"])
@pytest.mark.parametrize(
    ("clip", "quantization"),
    [
        *((clip, quantization) for clip in (NONE, GAUSSIAN, PER_CHANNEL) for quantization in WeightQuantizationType),
        (LEARNED, WeightQuantizationType.NONE),
        (LEARNED, WeightQuantizationType.DISCRETIZE_PER_CHANNEL),
    ],
)
def test_the_outputs_are_the_same(aihwkit, clip, quantization, ranged, adc, tile, max_output_size):
    changes = {
        "mapping.max_input_size": tile,
        "clip.type": clip,
        "modifier.quantization_type": quantization,
        "modifier.res": 14,
        "pre_post.input_range.dynamic": ranged == "dynamic",
    }
    changes |= {} if adc else {"forward.out_bound": 0.0, "forward.out_res": -1}
    model = make_model(make_config(changes))
    assert_same_outputs(model, quietly(model, max_output_size))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pre_post.input_range.enable": True},
        {"pre_post.input_range.enable": True, "pre_post.input_range.dynamic": True},
        {"modifier.quantization_type": WeightQuantizationType.DISCRETIZE_PER_CHANNEL, "modifier.res": 1 / 14},
        {"clip.type": LEARNED},
        {"pre_post.input_range.enable": True, "forward.out_bound": 1.0},
    ],
    ids=["ideal", "range", "dynamic range", "quantization", "learned clip", "bound"],
)
def test_what_is_off_stays_off(aihwkit, changes):
    model = make_model(make_config(IDEAL | changes))
    exported = quietly(model)
    x = 5 * torch.randn(ROWS, IN)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("res", [31, 1 / 31, 30, 1 / 30, 2.5, 254])
def test_a_dac_without_a_step_at_its_range_rounds_beyond_it_as_ours_does(aihwkit, res):
    model = make_model(make_config({"forward.inp_res": res, "forward.out_bound": 0.0, "forward.out_res": -1}))
    assert_same_outputs(model, quietly(model), 3 * torch.randn(ROWS, IN))


@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 3, IN)])
def test_inputs_of_any_rank(aihwkit, shape):
    model = make_model(make_config())
    assert_same_outputs(model, quietly(model), torch.randn(shape))


def test_zero_channels_slices_and_ranges(aihwkit):
    model = make_model(make_config({"clip.type": PER_CHANNEL}))
    with torch.no_grad():
        model[0].weight[3] = 0.0
        model[0].weight[:, :17] = 0.0
        model[0].input_range[1] = 0.0
    assert_same_outputs(model, quietly(model))


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_largest_weight_of_each_slice_or_channel_is_one_on_its_tile(aihwkit, per_channel):
    model = make_model(make_config({"clip.type": PER_CHANNEL if per_channel else NONE}))
    layer = quietly(model)[0]
    for (tile,), weight in zip(tiles_of(layer), model[0].weight.split(model[0].get_split_sizes(), 1), strict=True):
        mapped = tile.tile.weight.abs().amax(1)
        expected = torch.ones(HIDDEN) if per_channel else weight.abs().amax(1) / weight.abs().max()
        torch.testing.assert_close(mapped, expected)
    torch.testing.assert_close(layer.get_weights()[0], model[0].weight.detach())
    layer.remap_analog_weights()
    torch.testing.assert_close(layer.get_weights()[0], model[0].weight.detach())


def test_ranges_and_their_counters_go_tile_by_tile(aihwkit):
    model = make_model(make_config())
    model[0].input_range_update_idx.copy_(torch.tensor([3, 5, 7]))
    for s, row in enumerate(tiles_of(quietly(model, 8)[0])):
        assert len(row) == 3
        for tile in row:
            assert tile.input_range.item() == model[0].input_range[s].abs().item()
            assert tile.input_range_update_idx.item() == model[0].input_range_update_idx[s].item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_goes_through_fp32(aihwkit, dtype):
    model = make_model(make_config({"clip.type": LEARNED}), ensure_analog_root=True)
    model = nn.Sequential(model, nn.LayerNorm(OUT)).to(dtype).eval()
    exported = quietly(model)
    assert {tensor.dtype for tensor in exported.parameters()} == {torch.float32}
    assert_same_outputs(copy.deepcopy(model).float(), exported)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


# ---- Models ----------------------------------------------------------------------------------------------------------------


def test_every_layer_keeps_its_own_config(aihwkit):
    def choose(name: str, _: nn.Module, config: TorchInferenceRPUConfig) -> TorchInferenceRPUConfig:
        return make_config({"forward.inp_res": 8, "mapping.max_input_size": 7} if name == "2" else {})

    model = make_model(make_config(), specific_rpu_config_fun=choose)
    exported = quietly(model)
    assert [tiles_of(exported[i])[0][0].rpu_config.forward.inp_res for i in (0, 2)] == [30, 8]
    assert [len(tiles_of(exported[i])) for i in (0, 2)] == [3, 3]
    assert_same_outputs(model, exported)


def test_a_single_layer(aihwkit):
    layer = disturb(AnalogLinear(IN, OUT, rpu_config=make_config()))
    exported = quietly(layer)
    assert type(exported) is aihwkit.nn.AnalogLinear
    assert_same_outputs(layer, exported)


class Net(nn.Module):
    """A shared layer, a hook, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ROWS, IN)
        self.shared = nn.Linear(IN, IN)
        self.again = self.shared
        self.head = nn.Linear(IN, ROWS, bias=False)
        self.head.weight = self.embedding.weight
        self.seen: list[Any] = []

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.again(self.shared(self.embedding(tokens))))


def test_shared_modules_stay_shared_and_tied_weights_become_copies(aihwkit):
    model = disturb(convert_to_analog(Net(), make_config()))
    with pytest.warns(UserWarning, match="tied to embedding is a copy on tiles of its own .in head."):
        exported = export_to_aihwkit(model)
    assert exported.again is exported.shared
    assert isinstance(exported.embedding, nn.Embedding)
    assert_same_outputs(model, exported, torch.arange(ROWS))


def test_the_root_gets_aihwkits_methods_and_nothing_of_ours_is_left(aihwkit):
    exported = quietly(disturb(convert_to_analog(Net(), make_config())))
    assert isinstance(exported, aihwkit.nn.AnalogWrapper)
    assert isinstance(exported, Net)
    assert not any(type(module).__module__.startswith("triton_analog") for module in exported.modules())
    assert len(list(exported.analog_tiles())) == 6
    exported.drift_analog_weights(100.0)
    sequence = quietly(make_model(make_config()))
    assert type(sequence) is aihwkit.nn.AnalogSequential


def test_a_root_that_is_not_analog_itself(aihwkit):
    model = nn.Sequential(disturb(AnalogLinear(IN, OUT, rpu_config=make_config())), nn.Tanh())
    exported = quietly(model)
    assert isinstance(exported, nn.Sequential)
    assert len(list(exported.analog_tiles())) == 3
    assert_same_outputs(model, exported)


def test_two_classes_of_the_same_name(aihwkit):
    quietly(disturb(convert_to_analog(Net(), make_config())))
    other = type("Net", (nn.Module,), {"forward": lambda self, x: self.layer(x)})()
    other.layer = nn.Linear(IN, OUT)
    model = disturb(convert_to_analog(other, make_config()))
    assert_same_outputs(model, quietly(model))


def test_the_model_stays_as_it_is(aihwkit):
    model = make_model(make_config({"clip.type": LEARNED}))
    model[0].weight.requires_grad_(False)
    model[2].train()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    parameters = [(id(parameter), parameter.requires_grad) for parameter in model.parameters()]
    exported = quietly(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [(id(parameter), parameter.requires_grad) for parameter in model.parameters()] == parameters
    assert [module.training for module in model] == [False, False, True]
    assert [module.training for module in exported] == [False, False, True]
    assert not tiles_of(exported[0])[0][0].tile.weight.requires_grad
    assert tiles_of(exported[2])[0][0].tile.weight.requires_grad
    with torch.no_grad():
        model[0].weight.zero_()
    assert exported[0].get_weights()[0].abs().max() > 0


def test_hooks_come_along(aihwkit):
    model, seen = make_model(make_config()), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    quietly(model)(torch.randn(ROWS, IN))
    assert seen == [aihwkit.nn.AnalogLinear]


@pytest.mark.parametrize("clip", [NONE, PER_CHANNEL, LEARNED])
def test_the_result_can_be_copied_saved_and_trained(aihwkit, clip):
    model = make_model(make_config({"clip.type": clip}))
    exported, x = quietly(model), torch.randn(ROWS, IN)
    assert_same_outputs(model, copy.deepcopy(exported))
    saved = io.BytesIO()
    torch.save(exported.state_dict(), saved)
    saved.seek(0)
    other = quietly(make_model(make_config({"clip.type": clip})))
    other.load_state_dict(torch.load(saved, weights_only=False))
    assert_same_outputs(model, other)
    optimizer = aihwkit.optim.AnalogSGD(exported.parameters(), lr=0.05)
    exported.train()
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (exported(x) - 0.1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for tile in exported.analog_tiles():  # scales follow the largest weights as ours do; a learned clip's were fixed
        largest = tile.tile.weight.abs().amax(1)
        assert (largest.amax() == 1) == (clip is not LEARNED)
        assert (largest == 1).all() == (clip is PER_CHANNEL)


# ---- Noise and other settings for training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("adc", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_output_noise_has_the_same_total_deviation(aihwkit, per_channel, adc):
    changes = {
        "mapping.max_input_size": 13,
        "forward.out_noise": 0.2,
        "forward.out_noise_per_channel": per_channel,
        "clip.type": PER_CHANNEL if adc and per_channel else NONE,
    }
    changes |= (
        {"forward.out_bound": 50.0, "forward.out_res": -1} if adc else {"forward.out_bound": 0.0, "forward.out_res": -1}
    )
    layer = disturb(AnalogLinear(IN, OUT, rpu_config=make_config(changes)))
    assert layer.slices == 4
    layer.rpu_config.pre_post.input_range.init_from_data = 0
    exported = quietly(layer, out_noise=True)
    x = torch.randn(IN).expand(6000, IN)
    with torch.no_grad():
        ours, theirs = layer.train()(x).std(0), exported(x).std(0)
    torch.testing.assert_close(theirs, ours, rtol=0.06, atol=0)


def test_output_noise_is_off_in_evaluation_unless_asked_for(aihwkit):
    model, x = make_model(make_config({"forward.out_noise": 0.5})), torch.randn(ROWS, IN)
    with pytest.warns(UserWarning, match=r"forward.out_noise: left out, .* out_noise=True .in 0, 2."):
        exported = export_to_aihwkit(model)
    assert torch.equal(exported(x), exported(x))
    assert_same_outputs(model, exported, x)


def test_output_noise_of_another_scale_is_refused(aihwkit):
    model = make_model(make_config({"forward.out_noise": 0.5, "clip.type": PER_CHANNEL}))
    with pytest.raises(
        ConfigError, match=r"^0: forward.out_noise_per_channel: got False.*set it to True, or .*out_noise=False"
    ):
        export_to_aihwkit(model, out_noise=True)


def test_read_noise_of_weights_is_refused(aihwkit):
    noise = {"forward.w_noise": 0.02, "forward.w_noise_type": WeightNoiseType.PCM_READ}
    with pytest.raises(ConfigError, match=r"^0: forward.w_noise: got 0\.02, .* set it to 0"):
        export_to_aihwkit(make_model(make_config(noise)))


@pytest.mark.parametrize("kind", ["ADD_NORMAL", "ADD_NORMAL_PER_CHANNEL"])
@pytest.mark.parametrize("clip", [NONE, LEARNED])
def test_weight_noise_has_the_same_deviation_in_training_and_is_off_in_evaluation(aihwkit, clip, kind):
    changes = IDEAL | {
        "clip.type": clip,
        "modifier.noise_type": WeightNoiseInjectionType[kind],
        "modifier.std_dev": 0.1,
    }
    layer = disturb(AnalogLinear(IN, OUT, rpu_config=make_config(changes)))
    exported, x = quietly(layer), torch.eye(IN)
    with torch.no_grad():
        assert torch.equal(exported(x), exported(x))
        noise = [
            torch.stack([module.train()(x) for _ in range(400)]).std(0).square().mean(0) for module in (layer, exported)
        ]
    torch.testing.assert_close(noise[1], noise[0], rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clip.type": PER_CHANNEL}, "clip.type LAYER_GAUSSIAN_PER_CHANNEL: becomes LAYER_GAUSSIAN"),
        ({"clip.type": GAUSSIAN}, "clip.type LAYER_GAUSSIAN: becomes LAYER_GAUSSIAN"),
        ({"clip.type": LEARNED}, "clip.type LEARNABLE_PER_CHANNEL: the weights are clipped once"),
        (
            {"modifier.quantization_type": WeightQuantizationType.DISCRETIZE, "modifier.res": 14},
            "modifier.quantization_type DISCRETIZE: the weights are quantized once",
        ),
        (
            {"modifier.noise_type": WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, "modifier.std_dev": 0.1},
            "modifier.noise_type ADD_NORMAL_PER_CHANNEL: left out",
        ),
        (
            {
                "modifier.noise_type": WeightNoiseInjectionType.ADD_NORMAL,
                "modifier.std_dev": 0.1,
                "modifier.refresh": WeightNoiseRefresh.STEP,
            },
            "modifier.refresh STEP",
        ),
        ({"pre_post.input_range.fast_mode": True}, "pre_post.input_range.fast_mode"),
    ],
)
def test_one_warning_names_what_acts_otherwise_in_training(aihwkit, changes, said):
    model = make_model(make_config(changes))
    with pytest.warns(UserWarning, match="in training AIHWKIT differs") as warned:
        export_to_aihwkit(model)
    (warning,) = warned
    assert said in str(warning.message)
    assert "(in 0, 2)" in str(warning.message)
    assert warning.filename == __file__


def test_no_warning_without_reason(aihwkit):
    changes = {
        "modifier.noise_type": WeightNoiseInjectionType.ADD_NORMAL,
        "modifier.std_dev": 0.1,
        "forward.out_noise": 0.1,
        "pre_post.input_range.decay": 0.1,
    }
    model = make_model(make_config(changes))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exported = export_to_aihwkit(model, out_noise=True)
    theirs = tiles_of(exported[0])[0][0].rpu_config
    assert theirs.forward.out_noise == pytest.approx(0.1 / math.sqrt(3))
    assert theirs.modifier.std_dev == 0.1
    assert theirs.pre_post.input_range.decay == 0.1


# ---- Convolutions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "bias": False},
        {"kernel_size": 2, "stride": 2, "padding": 1, "dilation": 2},
        {"kernel_size": 2, "padding": "same"},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": "valid", "stride": 3},
    ],
)
@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions(aihwkit, conv, options, padding_mode):
    digital = conv(3, 6, padding_mode=padding_mode, **options)
    model = disturb(convert_to_analog(digital, make_config({"clip.type": LEARNED})))
    exported = quietly(model)
    assert all(isinstance(layer, aihwkit.nn.AnalogConv2d) for layer in exported.analog_layers())
    size = (7, 8, 9)[: digital.weight.ndim - 2]
    for x in torch.randn(2, 3, *size), torch.randn(3, *size):
        with torch.no_grad():
            assert_same_up_to_one_step(model(x), exported(x), step=0.2)


def test_kernels_of_different_sizes_and_quantized_weights(aihwkit):
    digital = nn.Sequential(
        nn.Conv3d(2, 4, (3, 1, 2), stride=(2, 1, 1), padding=(1, 0, 2), dilation=(2, 1, 3)),
        nn.Flatten(2, 3),
        nn.Conv2d(4, 5, (2, 3), padding=(0, 1)),
        nn.Flatten(2),
        nn.Conv1d(5, 3, 4, stride=3),
    )
    quantized = {"modifier.quantization_type": WeightQuantizationType.DISCRETIZE_PER_CHANNEL, "modifier.res": 14}
    model = disturb(convert_to_analog(digital, make_config(quantized | {"pre_post.input_range.dynamic": True})))
    x = torch.randn(2, 2, 7, 5, 6)
    with torch.no_grad():
        assert_same_up_to_one_step(model(x), quietly(model, max_output_size=2)(x), step=0.2)


def test_groups_are_refused(aihwkit):
    model = convert_to_analog(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), make_config())
    with pytest.raises(
        ValueError, match=r"^0: groups: got 2; AIHWKIT has convolutions with groups = 1 only; convert this"
    ):
        export_to_aihwkit(model)


# ---- Recurrent layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidir", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "cell",
    [AnalogVanillaRNNCell, AnalogLSTMCell, AnalogLSTMCellCombinedWeight, AnalogGRUCell],
    ids=lambda cell: cell.__name__,
)
def test_recurrent_layers(aihwkit, cell, layers, bidir):
    rnn = disturb(
        AnalogRNN(cell, IN, 6, num_layers=layers, bidir=bidir, rpu_config=make_config({"clip.type": PER_CHANNEL}))
    )
    exported, x = quietly(rnn), torch.randn(5, ROWS, IN)
    assert type(exported) is aihwkit.nn.AnalogRNN
    assert {type(tile.rpu_config) for tile in exported.analog_tiles()} == {
        aihwkit.simulator.configs.TorchInferenceRPUConfig
    }
    with torch.no_grad():
        (ours, _), (theirs, states) = rnn(x), exported(x)
    assert_same_up_to_one_step(ours, theirs, step=0.2)
    assert len(states) == layers


@pytest.mark.parametrize(
    ("cell", "options", "said"),
    [
        (AnalogGRUCell, {"batch_first": True}, "batch_first: got True"),
        (AnalogLSTMCell, {"proj_size": 2}, "proj_size: got 2"),
        (AnalogVanillaRNNCell, {"nonlinearity": "relu"}, "nonlinearity: got relu"),
    ],
)
def test_a_recurrent_layer_that_aihwkit_does_not_have_is_named(aihwkit, cell, options, said):
    model = nn.ModuleDict({"memory": AnalogRNN(cell, 4, 6, rpu_config=make_config(), **options)})
    with pytest.raises(ValueError, match=f"^memory: {said}.*convert this layer to digital"):
        export_to_aihwkit(model)


def test_a_recurrent_layer_with_torchs_states_is_named_with_the_remedy(aihwkit):
    model = convert_to_analog(nn.LSTM(4, 6), make_config())
    with pytest.raises(ValueError, match=r"lists_states: got False.*set lists_states = True"):
        export_to_aihwkit(model)


class Scaled(AnalogLinear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Loud(AnalogRNN):
    def forward(self, input: Any, hx: Any = None) -> Any:
        output, states = super().forward(input, hx)
        return 2 * output, states


class OtherCell(AnalogGRUCell):
    def step(self, projected: Tensor, state: Any, shared: Any) -> Any:
        return (2 * super().step(projected, state, shared)[0],)


@pytest.mark.parametrize(
    "module",
    [
        lambda config: AnalogGRUCell(4, 6, rpu_config=config),
        lambda config: Scaled(4, 6, rpu_config=config),
        lambda config: Loud(AnalogGRUCell, 4, 6, rpu_config=config),
    ],
    ids=["a cell on its own", "a subclass", "a recurrent subclass"],
)
def test_what_computes_something_else_is_refused(aihwkit, module):
    model = nn.ModuleDict({"other": module(make_config())})
    with pytest.raises(TypeError, match=r"^other: AIHWKIT has nothing like this .*: convert this one to digital"):
        export_to_aihwkit(model)


def test_a_replaced_forward_and_an_unknown_cell_are_refused(aihwkit):
    layer = AnalogLinear(4, 6, rpu_config=make_config())
    layer.forward = torch.relu
    with pytest.raises(TypeError, match="nothing like this AnalogLinear"):
        export_to_aihwkit(layer)
    with pytest.raises(
        ValueError, match="cell: got OtherCell, which AIHWKIT's AnalogRNN does not have; it has AnalogVanilla"
    ):
        export_to_aihwkit(AnalogRNN(OtherCell, 4, 6, rpu_config=make_config()))


# ---- Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((3,), TypeError, "^model: got int"),
        ((nn.Linear(2, 2),), ValueError, "^model: Linear has no analog layers; .* convert_to_analog"),
        ((AnalogLinear(2, 2, rpu_config=make_config()), 2.0), TypeError, "^max_output_size: got 2.0"),
    ],
)
def test_wrong_arguments(arguments, error, said):
    with pytest.raises(error, match=said):
        export_to_aihwkit(*arguments)


def test_a_config_that_became_invalid_is_refused(aihwkit):
    model = make_model(make_config())
    model[2].rpu_config.forward.out_bound = 0.0
    with pytest.raises(ConfigError, match=r"forward\.out_res"):
        export_to_aihwkit(model)


@pytest.mark.parametrize(
    "call",
    [
        lambda: triton_analog.export_to_aihwkit(AnalogLinear(2, 2, rpu_config=make_config())),
        lambda: triton_analog.import_from_aihwkit(nn.Linear(2, 2)),
        base_aihwkit_rpu_config,
    ],
    ids=["export", "import", "config"],
)
def test_without_the_package_the_error_says_how_to_install_it(monkeypatch, call):
    monkeypatch.setitem(sys.modules, "aihwkit", None)
    with pytest.raises(
        ImportError, match=r"needs the package aihwkit.*pip install --only-binary :all: --no-deps aihwkit==1\.1\.0 "
    ) as caught:
        call()
    assert caught.value.name == "aihwkit"


def test_the_base_config_is_ideal(aihwkit):
    layer = aihwkit.nn.AnalogLinear(IN, OUT, rpu_config=base_aihwkit_rpu_config())
    x = 10 * torch.randn(ROWS, IN)
    weight, bias = layer.get_weights()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias))
