"""The configuration: AIHWKIT's names and defaults, what is refused and how it says so, and its way to JSON and back."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass, field, fields
from math import inf, nan
from typing import Any

import pytest

from triton_analog.config import (
    ConfigError,
    InputRangeParameter,
    IOParameters,
    MappingParameter,
    PrePostProcessingParameter,
    SavedInput,
    TorchInferenceRPUConfig,
    WeightClipParameter,
    WeightClipType,
    WeightModifierParameter,
    WeightNoiseInjectionType,
    WeightNoiseRefresh,
    WeightNoiseType,
    WeightQuantizationType,
)


def set_field(config: TorchInferenceRPUConfig, path: str, value: Any) -> None:
    *sections, name = path.split(".")
    target: Any = config
    for section in sections:
        target = getattr(target, section)
    setattr(target, name, value)


def with_range(**values: Any) -> TorchInferenceRPUConfig:
    """A config with an input range and further fields, written ``forward__inp_res=254``."""
    config = TorchInferenceRPUConfig()
    config.pre_post.input_range.enable = True
    for path, value in values.items():
        set_field(config, path.replace("__", "."), value)
    return config


@pytest.mark.parametrize(
    ("section", "defaults"),
    [
        (
            IOParameters,
            {
                "inp_res": -1,
                "out_noise": 0.0,
                "out_noise_per_channel": False,
                "out_bound": 0.0,
                "out_res": -1,
                "save_input": SavedInput.FULL,  # ours
                "inp_noise": 0.0,
                "inp_sto_round": False,
                "w_noise": 0.0,
                "w_noise_type": WeightNoiseType.NONE,
            },
        ),
        (WeightClipParameter, {"sigma": -1.0, "type": WeightClipType.NONE}),
        (
            WeightModifierParameter,
            {
                "std_dev": 0.0,
                "res": 0.0,
                "noise_type": WeightNoiseInjectionType.NONE,
                "quantization_type": WeightQuantizationType.NONE,
                "refresh": WeightNoiseRefresh.FORWARD,  # ours
            },
        ),
        (MappingParameter, {"max_input_size": -1}),
        (
            InputRangeParameter,
            {
                "enable": False,
                "dynamic": False,
                "fast_mode": False,
                "act_range_momentum": 0.95,
                "learn_input_range": True,
                "init_value": 3.0,
                "init_from_data": 100,
                "init_std_alpha": 3.0,
                "decay": 0.001,
                "input_min_percentage": 0.95,
            },
        ),
    ],
)
def test_sections_have_aihwkits_fields_and_defaults(section: Any, defaults: dict[str, Any]) -> None:
    assert {f.name: getattr(section(), f.name) for f in fields(section)} == defaults


def test_the_config_has_aihwkits_sections() -> None:
    config = TorchInferenceRPUConfig()
    assert [f.name for f in fields(config)] == ["forward", "clip", "modifier", "mapping", "pre_post"]
    assert config.pre_post.input_range == InputRangeParameter()


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (WeightNoiseInjectionType, ["NONE", "ADD_NORMAL", "ADD_NORMAL_PER_CHANNEL"]),
        (WeightQuantizationType, ["NONE", "DISCRETIZE", "DISCRETIZE_PER_CHANNEL"]),
        (WeightClipType, ["NONE", "LAYER_GAUSSIAN", "LAYER_GAUSSIAN_PER_CHANNEL", "LEARNABLE_PER_CHANNEL"]),
    ],
)
def test_enums_have_aihwkits_members(kind: Any, names: list[str]) -> None:
    assert [member.name for member in kind] == names


@pytest.mark.parametrize(
    ("path", "value"), [("inp_res", 254), ("inp_noise", 0.1), ("out_noise", 0.1), ("out_bound", 10.0), ("out_res", 254)]
)
def test_converters_and_output_noise_need_an_input_range(path: str, value: float) -> None:
    config = TorchInferenceRPUConfig()
    setattr(config.forward, path, value)
    with pytest.raises(ConfigError, match=rf"forward\.{path}: got {value}; .*pre_post\.input_range\.enable = True"):
        config.validate()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        # resolutions: between 2 and 2**22 steps, or the inverse
        ("forward.inp_res", 2**22 + 1),
        ("forward.inp_res", 1 / 2**23),
        ("forward.inp_res", 1.5),
        ("forward.inp_res", 1),
        ("forward.inp_res", nan),
        ("forward.inp_res", inf),
        ("forward.inp_res", True),
        ("forward.inp_res", "254"),
        ("forward.inp_res", None),
        ("modifier.res", 2**23),
        # noise and bounds
        ("forward.out_noise", -0.1),
        ("forward.inp_noise", -0.1),
        ("forward.inp_noise", nan),
        ("forward.inp_sto_round", 1),
        ("forward.out_noise", nan),
        ("forward.out_bound", inf),
        ("modifier.std_dev", -0.01),
        ("modifier.std_dev", nan),
        ("forward.out_noise_per_channel", 1),
        # mapping
        ("mapping.max_input_size", 512.0),
        ("mapping.max_input_size", True),
        # input range
        ("pre_post.input_range.enable", "yes"),
        ("pre_post.input_range.act_range_momentum", 1.0),
        ("pre_post.input_range.act_range_momentum", -0.5),
        ("pre_post.input_range.init_value", 0.0),
        ("pre_post.input_range.init_value", inf),
        ("pre_post.input_range.init_from_data", 100.0),
        ("pre_post.input_range.init_std_alpha", 0.0),
        ("pre_post.input_range.decay", -0.001),
        ("pre_post.input_range.input_min_percentage", 1.01),
        ("pre_post.input_range.input_min_percentage", -0.01),
        # enums are members, not strings; sections are sections
        ("clip.type", "LAYER_GAUSSIAN"),
        ("modifier.noise_type", WeightClipType.NONE),
        ("modifier.quantization_type", None),
        ("modifier.refresh", "step"),
        ("forward.save_input", "int8"),
        ("forward.w_noise_type", "PCM_READ"),
        ("forward", {"inp_res": 254}),
    ],
)
def test_a_wrong_value_is_named_with_its_path(path: str, value: Any) -> None:
    config = with_range()
    set_field(config, path, value)
    with pytest.raises(ConfigError) as error:
        config.validate()
    shown = getattr(value, "name", None) or repr(value)
    assert str(error.value).startswith(f"{path}: got {shown}; ")


@pytest.mark.parametrize("sigma", [0.0, -1.0])
@pytest.mark.parametrize("kind", [WeightClipType.LAYER_GAUSSIAN, WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL])
def test_a_gaussian_clip_needs_a_positive_sigma(kind: WeightClipType, sigma: float) -> None:
    with pytest.raises(ConfigError, match=rf"clip\.sigma: got {sigma}; clip\.type {kind.name} needs"):
        with_range(clip__type=kind, clip__sigma=sigma).validate()


def test_quantization_needs_a_resolution() -> None:
    config = with_range(modifier__quantization_type=WeightQuantizationType.DISCRETIZE)
    with pytest.raises(ConfigError, match=r"modifier\.res: got 0\.0; .*DISCRETIZE needs a number of states"):
        config.validate()


def test_a_learned_clip_refuses_one_scale_for_all_channels() -> None:
    config = with_range(clip__type=WeightClipType.LEARNABLE_PER_CHANNEL, modifier__res=254)
    config.modifier.quantization_type = WeightQuantizationType.DISCRETIZE
    with pytest.raises(ConfigError, match=r"modifier\.quantization_type: got DISCRETIZE; .*DISCRETIZE_PER_CHANNEL"):
        config.validate()


def test_an_adc_resolution_needs_a_bound() -> None:
    with pytest.raises(ConfigError, match=r"forward\.out_res: got 254; .*forward\.out_bound is 0\.0"):
        with_range(forward__out_res=254).validate()


def test_a_dynamic_range_cannot_track_extreme_values() -> None:
    config = with_range(pre_post__input_range__dynamic=True, pre_post__input_range__fast_mode=True)
    with pytest.raises(ConfigError, match=r"pre_post\.input_range\.fast_mode: got True; .*dynamic = True"):
        config.validate()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"forward__inp_res": 254},
        {"forward__inp_res": 1 / 254},
        {"forward__inp_res": 2**22},
        {"forward__inp_res": 2},
        {"forward__inp_res": 0},
        {"forward__inp_res": 254, "forward__save_input": SavedInput.INT8},
        {"forward__inp_res": 1 / 254, "forward__save_input": SavedInput.INT8, "pre_post__input_range__dynamic": True},
        {"modifier__refresh": WeightNoiseRefresh.STEP},
        {"forward__out_bound": 10, "forward__out_res": 254, "forward__out_noise": 0.04},
        {"mapping__max_input_size": 0},
        {"pre_post__input_range__act_range_momentum": -1},
        {"pre_post__input_range__init_from_data": -5},
        {"pre_post__input_range__input_min_percentage": 1},
        {"modifier__noise_type": WeightNoiseInjectionType.ADD_NORMAL},
        {"clip__type": WeightClipType.LEARNABLE_PER_CHANNEL, "modifier__res": 254,
         "modifier__quantization_type": WeightQuantizationType.DISCRETIZE_PER_CHANNEL},
        {"clip__type": WeightClipType.LAYER_GAUSSIAN, "clip__sigma": 2.5},
    ],
)  # fmt: skip
def test_what_is_allowed_passes(values: dict[str, Any]) -> None:
    with_range(**values).validate()


@pytest.mark.parametrize("res", [-1, 0, 255, 1 / 255, 2**16])
def test_an_input_is_kept_as_int8_only_where_its_steps_fit(res: float) -> None:
    with pytest.raises(
        ConfigError, match=rf"forward\.save_input: got INT8; .*forward\.inp_res must be .* it is {res}; set"
    ):
        with_range(forward__inp_res=res, forward__save_input=SavedInput.INT8).validate()


def test_what_an_enum_allows_is_in_the_message() -> None:
    with pytest.raises(
        ConfigError, match=r"got 'step'; allowed are WeightNoiseRefresh\.FORWARD, WeightNoiseRefresh\.STEP"
    ):
        with_range(modifier__refresh="step").validate()
    with pytest.raises(ConfigError, match=r"modifier\.refresh: got 'step'; allowed are FORWARD, STEP"):
        TorchInferenceRPUConfig.from_dict({"modifier": {"refresh": "step"}})


def test_a_misspelt_field_is_an_error_and_not_ignored() -> None:
    with pytest.raises(AttributeError, match="input_res"):
        TorchInferenceRPUConfig().forward.input_res = 254  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [512, 1, 8.0, True])
def test_tiles_are_not_cut_along_their_outputs(size) -> None:
    config = TorchInferenceRPUConfig()
    config.mapping.max_output_size = 0  # no limit, as there is none
    assert config == TorchInferenceRPUConfig()
    with pytest.raises(ConfigError, match=rf"mapping\.max_output_size: got {size}; .*export_to_aihwkit"):
        config.mapping.max_output_size = size


def full() -> TorchInferenceRPUConfig:
    """A config without a single default."""
    return with_range(
        forward__inp_res=1 / 254, forward__inp_noise=0.1, forward__inp_sto_round=True,
        forward__out_noise=0.1, forward__out_noise_per_channel=True, forward__out_bound=12,
        forward__out_res=510, forward__save_input=SavedInput.INT8, modifier__refresh=WeightNoiseRefresh.STEP,
        forward__w_noise=0.0175, forward__w_noise_type=WeightNoiseType.PCM_READ,
        clip__sigma=2.5, clip__type=WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL,
        modifier__std_dev=0.03, modifier__res=62, modifier__noise_type=WeightNoiseInjectionType.ADD_NORMAL,
        modifier__quantization_type=WeightQuantizationType.DISCRETIZE, mapping__max_input_size=512,
        pre_post__input_range__fast_mode=True, pre_post__input_range__act_range_momentum=-1,
        pre_post__input_range__learn_input_range=False, pre_post__input_range__init_value=1.5,
        pre_post__input_range__init_from_data=500, pre_post__input_range__init_std_alpha=18.0,
        pre_post__input_range__decay=0.01, pre_post__input_range__input_min_percentage=0.9,
        pre_post__input_range__dynamic=True,
    )  # fmt: skip


def test_the_round_trip_through_json_keeps_every_field() -> None:
    assert len(full().changes()) == len(TorchInferenceRPUConfig().to_dict()["forward"]) + 2 + 5 + 1 + 10
    assert TorchInferenceRPUConfig.from_dict(json.loads(json.dumps(full().to_dict()))) == full()


def test_copies_are_equal_and_independent() -> None:
    for other in (copy.deepcopy(full()), pickle.loads(pickle.dumps(full()))):
        assert other == full()
        other.modifier.res = 30
        assert other != full()


def test_enums_are_written_by_name() -> None:
    assert full().to_dict()["clip"] == {"sigma": 2.5, "type": "LAYER_GAUSSIAN_PER_CHANNEL"}


def test_missing_fields_get_their_default() -> None:
    config = TorchInferenceRPUConfig.from_dict({"modifier": {"std_dev": 0.1}})
    assert config == TorchInferenceRPUConfig(modifier=WeightModifierParameter(std_dev=0.1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"forwards": {}}, "forwards: got {}; unknown field; TorchInferenceRPUConfig has forward, clip"),
        ({"pre_post": {"input_range": {"on": True}}}, "pre_post.input_range.on: got True; unknown field"),
        ({"clip": {"type": "GAUSS"}}, "clip.type: got 'GAUSS'; allowed are NONE, LAYER_GAUSSIAN"),
        ({"clip": {"type": 3}}, "clip.type: got 3; allowed are"),
        ({"forward": 254}, "forward: got 254; a dictionary of fields is needed"),
        ([], r"config: got []; a dictionary of fields is needed"),
    ],
)
def test_a_dictionary_with_something_else_is_refused(values: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TorchInferenceRPUConfig.from_dict(values)
    assert str(error.value).startswith(message)


@dataclass
class Preset(TorchInferenceRPUConfig):
    """How presets are written for AIHWKIT: other defaults in a subclass."""

    forward: IOParameters = field(default_factory=lambda: IOParameters(inp_res=254))
    pre_post: PrePostProcessingParameter = field(default_factory=lambda: with_range().pre_post)


def test_presets_are_subclasses_with_other_defaults() -> None:
    preset = Preset()
    preset.validate()
    preset.forward.inp_res = 1 / 254  # a whole number as default does not make it the type
    preset.validate()
    assert Preset.from_dict(preset.to_dict()) == preset
