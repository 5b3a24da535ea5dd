"""A setting that cannot act, or that looks like a mistake, is said once for a model and marked where configs are printed."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_config import set_field, with_range
from torch import nn

from triton_analog import calibrate_input_ranges, convert_to_analog, restore_analog
from triton_analog.calibrate import InputRangeCalibrationType
from triton_analog.config import (
    ConfigWarning,
    TorchInferenceRPUConfig,
    WeightClipType,
    WeightNoiseInjectionType,
    WeightNoiseRefresh,
    WeightNoiseType,
    WeightQuantizationType,
)
from triton_analog.functional import analog_linear, modified_weight
from triton_analog.nn import AnalogConv2d, AnalogLinear, AnalogLSTMCell, AnalogRNN

RANGE = "pre_post.input_range."
ON = {f"{RANGE}enable": True}
DYNAMIC = ON | {f"{RANGE}dynamic": True}
OF_RANGE = {
    "act_range_momentum": 0.9, "learn_input_range": False, "init_value": 2.0, "init_from_data": 10, "init_std_alpha": 2.0,
    "decay": 0.01, "input_min_percentage": 0.9,
}  # fmt: skip


def config_of(values: dict[str, Any]) -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    for path, value in values.items():
        set_field(config, path, value)
    return config


def half_set() -> TorchInferenceRPUConfig:
    return config_of({"modifier.std_dev": 0.03})


@contextmanager
def recorded() -> Iterator[list[str]]:
    """The warnings about configs, as texts."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(one.message) for one in caught if issubclass(one.category, ConfigWarning)]


IDLE: list[tuple[str, dict[str, Any], str]] = [
    ("modifier.std_dev", {"modifier.std_dev": 0.03}, "modifier.noise_type is NONE"),
    ("modifier.noise_type", {"modifier.noise_type": WeightNoiseInjectionType.ADD_NORMAL}, "modifier.std_dev is 0"),
    ("modifier.res", {"modifier.res": 254}, "modifier.quantization_type is NONE"),
    ("modifier.refresh", {"modifier.refresh": WeightNoiseRefresh.STEP}, "no weight noise"),
    ("clip.sigma", {"clip.sigma": 2.5}, "clip.type is NONE"),
    ("clip.sigma", {"clip.sigma": 2.5, "clip.type": WeightClipType.LEARNABLE_PER_CHANNEL}, "LEARNABLE_PER_CHANNEL"),
    ("forward.inp_sto_round", ON | {"forward.inp_sto_round": True}, "forward.inp_res is off"),
    ("forward.out_noise_per_channel", ON | {"forward.out_noise_per_channel": True}, "forward.out_noise is 0"),
    ("forward.w_noise", {"forward.w_noise": 0.02}, "forward.w_noise_type is NONE"),
    ("forward.w_noise_type", {"forward.w_noise_type": WeightNoiseType.PCM_READ}, "forward.w_noise is 0"),
    (f"{RANGE}dynamic", {f"{RANGE}dynamic": True}, "enable is False"),
    (f"{RANGE}fast_mode", {f"{RANGE}fast_mode": True}, "enable is False"),
    *((RANGE + name, {RANGE + name: value}, "enable is False") for name, value in OF_RANGE.items()),
    *((RANGE + name, DYNAMIC | {RANGE + name: value}, "dynamic") for name, value in OF_RANGE.items()),
    (f"{RANGE}act_range_momentum", ON | {f"{RANGE}act_range_momentum": 0.9}, "fast_mode is False"),
    (f"{RANGE}init_std_alpha", ON | {f"{RANGE}fast_mode": True, f"{RANGE}init_std_alpha": 2.0}, "fast_mode"),
    (f"{RANGE}decay", ON | {f"{RANGE}fast_mode": True, f"{RANGE}decay": 0.01}, "fast_mode"),
    (f"{RANGE}init_std_alpha", ON | {f"{RANGE}init_from_data": 0, f"{RANGE}init_std_alpha": 2.0}, "init_from_data is 0"),
    (f"{RANGE}input_min_percentage", ON | {f"{RANGE}decay": 0.0, f"{RANGE}input_min_percentage": 0.9}, "decay is 0"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "values", "why"), IDLE, ids=[f"{path}-{why}" for path, _, why in IDLE])
def test_a_setting_that_cannot_act_is_named_with_its_value_the_reason_and_a_remedy(path, values, why) -> None:
    given = values[path]
    with recorded() as texts:
        layer = AnalogLinear(4, 2, rpu_config=config_of(values))
    assert len(texts) == 1
    shown = getattr(given, "name", given)
    assert f"{path}: got {shown}, which has no effect as " in texts[0]
    assert why in texts[0]
    assert "; set " in texts[0]
    assert f"{path}={shown} (no effect)" in str(layer.rpu_config)
    assert "1 without effect" in repr(layer)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {f"{RANGE}decay": 0.0, f"{RANGE}init_from_data": 0, "clip.sigma": 0.0, "modifier.res": -1},  # off is off
        ON | {RANGE + name: value for name, value in OF_RANGE.items() if name != "act_range_momentum"}
        | {f"{RANGE}learn_input_range": True},
        ON | {f"{RANGE}fast_mode": True, f"{RANGE}act_range_momentum": -1},
        {"modifier.std_dev": 0.03, "modifier.noise_type": WeightNoiseInjectionType.ADD_NORMAL,
         "modifier.refresh": WeightNoiseRefresh.STEP},
        {"modifier.res": 254, "modifier.quantization_type": WeightQuantizationType.DISCRETIZE},
        {"clip.sigma": 2.5, "clip.type": WeightClipType.LAYER_GAUSSIAN},
        ON | {"forward.inp_noise": 0.1},
        ON | {"forward.inp_sto_round": True, "forward.inp_res": 254},
        ON | {"forward.out_noise": 0.1, "forward.out_noise_per_channel": True, "forward.out_bound": 10.0,
              "forward.inp_res": 254, "forward.out_res": 1 / 254},
        {"mapping.max_input_size": 512},
        {"forward.w_noise": 0.02, "forward.w_noise_type": WeightNoiseType.ADDITIVE_CONSTANT},
    ],
)  # fmt: skip
def test_what_acts_is_not_warned_of(values: dict[str, Any]) -> None:
    with recorded() as texts:
        layer = AnalogLinear(4, 2, rpu_config=config_of(values))
        layer(torch.randn(3, 4))
    assert texts == []
    assert "no effect" not in str(layer.rpu_config)
    assert "without effect" not in repr(layer)


@pytest.mark.parametrize("res", [4, 8, 16, 1 / 8])
def test_bits_that_were_taken_for_steps_are_pointed_out(res: float) -> None:
    bits = round(res if res > 1 else 1 / res)
    for path in ("forward.inp_res", "forward.out_res", "modifier.res"):
        values = ON | {"forward.out_bound": 10.0, path: res}
        if path == "modifier.res":
            values["modifier.quantization_type"] = WeightQuantizationType.DISCRETIZE
        with recorded() as texts:
            AnalogLinear(4, 2, rpu_config=config_of(values))
        assert len(texts) == 1
        assert f"{path}: got {res}" in texts[0]
        assert f"{bits} bits are 2**{bits} - 2 = {2**bits - 2} steps" in texts[0]
    with recorded() as texts:
        for other in (2, 3, 17, 254, 1 / 254, -1):
            AnalogLinear(4, 2, rpu_config=config_of(ON | {"forward.inp_res": other}))
    assert texts == []


def test_a_conversion_says_it_once_with_the_number_of_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(2, 2, 1), nn.LSTM(4, 4, 2))
    for _ in range(2):  # another model of the same config is another warning
        with recorded() as texts:
            analog = convert_to_analog(model, half_set())
            analog[0](torch.randn(2, 4))
        assert len(texts) == 1
        assert "modifier.std_dev: got 0.03" in texts[0]
        assert "(4 layers)" in texts[0]


def test_configs_of_single_layers_are_collected() -> None:
    def choose(name: str, layer: nn.Module, config: TorchInferenceRPUConfig) -> TorchInferenceRPUConfig:
        if name == "0":
            config.modifier.std_dev = 0.1
        elif name == "1":
            config.clip.sigma = 2.5
        return config

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with recorded() as texts:
        convert_to_analog(model, TorchInferenceRPUConfig(), specific_rpu_config_fun=choose)
    assert len(texts) == 1
    assert "modifier.std_dev: got 0.1" in texts[0]
    assert "clip.sigma: got 2.5" in texts[0]


@pytest.mark.parametrize(
    "build",
    [
        lambda config: [AnalogLinear(4, 4, rpu_config=config) for _ in range(3)],
        lambda config: [AnalogLinear(4, 4, rpu_config=config), AnalogConv2d(2, 2, 1, rpu_config=config)],
        lambda config: AnalogRNN(AnalogLSTMCell, 4, 4, 2, bidir=True, rpu_config=config),
        lambda config: AnalogLSTMCell(4, 4, rpu_config=config),
    ],
)
def test_layers_of_one_config_say_it_once(build: Callable[[Any], Any]) -> None:
    with recorded() as texts:
        build(half_set())
    assert len(texts) == 1


def test_the_warning_points_at_the_line_that_built_the_layer() -> None:
    with pytest.warns(ConfigWarning) as caught:
        AnalogLinear(4, 2, rpu_config=half_set())
    with pytest.warns(ConfigWarning) as converted:
        convert_to_analog(nn.Linear(4, 2), half_set())
    assert {one.filename for one in [*caught, *converted]} == {__file__}


def test_a_config_that_is_changed_by_hand_warns_at_the_next_forward_once_for_the_model() -> None:
    model = convert_to_analog(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), TorchInferenceRPUConfig())
    model(torch.randn(2, 4))
    for layer in model.analog_layers():
        layer.rpu_config.modifier.std_dev = 0.1
    with recorded() as texts:
        model(torch.randn(2, 4))
        model(torch.randn(2, 4))
    assert len(texts) == 1
    with recorded() as texts:
        for layer in model.analog_layers():
            layer.reconfigure(config_of({"clip.sigma": 2.5}))
    assert len(texts) == 1


def test_copies_and_checkpoints_do_not_say_it_again() -> None:
    with pytest.warns(ConfigWarning):
        model = convert_to_analog(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), half_set())
    state = model.state_dict()
    with recorded() as texts:
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other(torch.randn(2, 4))
            other.load_state_dict(state)
            other(torch.randn(2, 4))
    assert texts == []
    with recorded() as texts:
        restore_analog(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), state)
    assert len(texts) == 1


def test_what_the_library_switches_off_itself_is_not_warned_of() -> None:
    config = config_of({"modifier.res": 254, "modifier.quantization_type": WeightQuantizationType.DISCRETIZE})
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN, 2.5
    config.pre_post.input_range.enable, config.pre_post.input_range.init_value = True, 2.0
    model = convert_to_analog(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config).eval()
    with recorded() as texts:
        model.quantize_weights()
        model(torch.randn(2, 4))
        calibrate_input_ranges(model, InputRangeCalibrationType.MAX, [torch.randn(2, 4)], verbose=False)
    assert texts == []


def test_a_printed_config_lists_what_does_not_act() -> None:
    config = half_set()
    assert repr(config).endswith("# without effect: modifier.std_dev")
    assert "modifier.std_dev=0.03 (no effect)" in str(config)
    config.modifier.noise_type = WeightNoiseInjectionType.ADD_NORMAL
    assert "without effect" not in repr(config)
    assert repr(with_range()) == repr(copy.deepcopy(with_range()))


# ---- Functions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"weight_noise_std": 0.1}, "weight_noise_std"),
        ({"weight_noise": "per_channel"}, "weight_noise"),
        ({"weight_res": 254}, "weight_res"),
        ({"dynamic_input_range": True, "out_noise_per_channel": True}, "out_noise_per_channel"),
        ({"out_bound_per_channel": True}, "out_bound_per_channel"),
        ({"range_decay": 0.01}, "range_decay"),
        ({"fast_mode": True}, "fast_mode"),
        ({"input_min_percentage": 0.9}, "input_min_percentage"),
        ({"dynamic_input_range": True, "inp_res": 8}, "inp_res"),
        ({"weight_quantization": "per_tensor", "weight_res": 8}, "weight_res"),
    ],
)
def test_an_argument_that_cannot_act_is_said_once_for_each_place(arguments: dict[str, Any], name: str) -> None:
    x, w = torch.randn(3, 4), torch.randn(2, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            analog_linear(x, w, **arguments)
    (warning,) = caught
    assert str(warning.message).startswith(f"{name}: got {arguments[name]!r}, ")
    assert warning.filename == __file__


def test_a_weight_made_in_advance_needs_the_kind_of_its_noise_too() -> None:
    with pytest.warns(UserWarning, match=r"weight_noise_std: got 0\.1, which has no effect as weight_noise is 'none'"):
        modified_weight(torch.randn(2, 4), weight_noise_std=0.1)
