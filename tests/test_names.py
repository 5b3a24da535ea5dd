"""A name that is misspelt, or an argument in another's place, is an error or a warning that says what was meant."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import nn

from triton_analog import convert_to_analog
from triton_analog.config import (
    ConfigError,
    InputRangeParameter,
    IOParameters,
    PrePostProcessingParameter,
    SavedInput,
    TorchInferenceRPUConfig,
    WeightClipParameter,
    WeightClipType,
    WeightNoiseInjectionType,
)
from triton_analog.launch import environment
from triton_analog.nn import (
    AnalogConv1d,
    AnalogConv2d,
    AnalogConv3d,
    AnalogGRUCell,
    AnalogHFConv1D,
    AnalogLinear,
    AnalogLSTMCell,
    AnalogLSTMCellCombinedWeight,
    AnalogRNN,
    AnalogVanillaRNNCell,
)


@dataclass
class Preset(TorchInferenceRPUConfig):
    """With a dictionary of its own, which would take any name; and one more field."""

    forward: IOParameters = field(default_factory=lambda: IOParameters(inp_res=254))
    notes: list[str] = field(default_factory=list)


@pytest.mark.parametrize(
    ("section", "name", "meant"),
    [
        (IOParameters(), "input_res", "did you mean 'inp_res'"),
        (WeightClipParameter(), "sigm", "did you mean 'sigma'"),
        (InputRangeParameter(), "enabled", "did you mean 'enable'"),
        (TorchInferenceRPUConfig(), "prepost", "did you mean 'pre_post'"),
        (TorchInferenceRPUConfig(), "inp_res", "it is forward.inp_res"),
        (PrePostProcessingParameter(), "enable", "it is input_range.enable"),
        (WeightClipParameter(), "omega", "it has sigma, type"),
        (Preset(), "foward", "did you mean 'forward'"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_misspelt_field_says_which_one_was_meant(section: Any, name: str, meant: str) -> None:
    before = repr(section)
    with pytest.raises(AttributeError) as written:
        setattr(section, name, 254)
    with pytest.raises(AttributeError) as read:
        getattr(section, name)
    for error in (written, read):
        assert str(error.value).startswith(f"{type(section).__name__} has no field {name!r}")
        assert meant in str(error.value)
    assert repr(section) == before


def test_a_misspelt_keyword_of_a_section_says_which_one_was_meant() -> None:
    with pytest.raises(TypeError, match="IOParameters has no field 'input_res'; did you mean 'inp_res'"):
        IOParameters(input_res=254)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="Preset has no field 'foward'; did you mean 'forward'"):
        Preset(foward=IOParameters())  # type: ignore[call-arg]
    assert Preset(notes=["own"]).notes == ["own"]


def test_a_misspelt_member_says_which_one_was_meant() -> None:
    with pytest.raises(AttributeError, match="got 'ADD_NORML'; did you mean 'ADD_NORMAL'"):
        WeightNoiseInjectionType.ADD_NORML  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(KeyError, match="did you mean 'LAYER_GAUSSIAN'"):
        WeightClipType["LAYER_GAUSIAN"]
    with pytest.raises(ValueError, match="did you mean 'LayerGaussian'"):
        WeightClipType("LayerGausian")
    with pytest.raises(AttributeError, match="allowed are FULL, INT8"):
        SavedInput.QUARTER  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(
        ConfigError, match=r"clip\.type: got 'LAYER_GAUSIAN'; allowed are .*; did you mean 'LAYER_GAUSSIAN"
    ):
        TorchInferenceRPUConfig.from_dict({"clip": {"type": "LAYER_GAUSIAN"}})
    with pytest.raises(ConfigError, match=r"modifer: got \{\}; unknown field; .*; did you mean 'modifier'"):
        TorchInferenceRPUConfig.from_dict({"modifer": {}})


CONFIG = TorchInferenceRPUConfig()


@pytest.mark.parametrize("place", [2, 3, 4])
@pytest.mark.parametrize(
    "layer",
    [
        *(AnalogLinear, AnalogConv1d, AnalogConv2d, AnalogConv3d, AnalogHFConv1D, AnalogRNN),
        *(AnalogVanillaRNNCell, AnalogGRUCell, AnalogLSTMCell, AnalogLSTMCellCombinedWeight),
    ],
)
def test_a_config_in_another_arguments_place_is_refused(layer: Any, place: int) -> None:
    arguments: list[Any] = [4, 2, 1, 1]
    if layer is AnalogRNN:
        arguments = [AnalogLSTMCell, 4, 2, 1]
    arguments[place:] = [CONFIG]
    if layer is AnalogHFConv1D and place == 4:
        assert layer(4, 2, None, None, CONFIG).nf == 4  # here it is in its own
        return
    with pytest.raises(
        TypeError, match=r": got a TorchInferenceRPUConfig; pass the config by its name: rpu_config=config"
    ):
        layer(*arguments)


def test_swapped_arguments_and_other_configs_are_named() -> None:
    with pytest.raises(TypeError, match=r"swap the two: convert_to_analog\(model, config\)"):
        convert_to_analog(CONFIG, nn.Linear(4, 2))  # type: ignore[arg-type]
    other = type("InferenceRPUConfig", (), {"__module__": "aihwkit.simulator.configs"})()
    with pytest.raises(
        ConfigError, match=r"a InferenceRPUConfig of aihwkit\.simulator\.configs; pass a config object of"
    ):
        convert_to_analog(nn.Linear(4, 2), other)
    foreign = TorchInferenceRPUConfig()
    foreign.clip.type = environment  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"clip\.type: got <module"):
        AnalogLinear(4, 2, rpu_config=foreign)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("TRITON_ANALOG_AUTOTUN", "did you mean 'TRITON_ANALOG_AUTOTUNE'?"),
        ("TRITONANALOG_TUNING_DIR", "did you mean 'TRITON_ANALOG_TUNING_DIR'?"),
        ("TRITON_ANALOG_COLOUR", "there are TRITON_ANALOG_TUNING_DIR, TRITON_ANALOG_AUTOTUNE"),
        ("TRITON_CPU_BACKEND", "this Triton is not Triton-CPU; build that from source, or set TRITON_INTERPRET=1"),
    ],
)
def test_a_variable_that_does_nothing_is_told_once(name: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(environment, "_said", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        environment.autotune()
        environment.strict_tuning()
    (warning,) = caught
    assert str(warning.message).startswith(f"{name}=1 ")
    assert meant in str(warning.message)


def test_the_environment_is_read_when_the_package_is_imported(tmp_path: Any) -> None:
    script = tmp_path / "user.py"
    script.write_text("import triton_analog")
    paths = os.pathsep.join(filter(None, sys.path))
    known = {"TRITON_ANALOG_AUTOTUNE": "0", "TRITON_ANALOG_TUNING_DIR": str(tmp_path), "PYTHONPATH": paths}
    for extra, line in (({"TRITON_ANALOG_AUTOTUN": "1"}, 1), ({}, 0)):
        done = subprocess.run(
            [sys.executable, script], env={**os.environ, **known, **extra}, capture_output=True, text=True, check=True
        )
        assert done.stderr.count("UserWarning") == line
        assert done.stderr.count(f"{script}:1: UserWarning: TRITON_ANALOG_AUTOTUN=1") == line
