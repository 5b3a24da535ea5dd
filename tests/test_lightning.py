"""Code for AIHWKIT-Lightning: its module paths, what its users say and torch does not, its version 1, and its checkpoints."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import pkgutil
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import triton_analog
from triton_analog import config, convert_to_analog, convert_to_digital, lightning
from triton_analog.config import (
    ConfigError,
    TorchInferenceRPUConfig,
    WeightModifierParameter,
    WeightModifierType,
    WeightNoiseInjectionType,
    WeightQuantizationType,
)
from triton_analog.nn import (
    AnalogConv1d,
    AnalogConv2d,
    AnalogConv3d,
    AnalogGRUCell,
    AnalogLinear,
    AnalogLSTMCell,
    AnalogRNN,
)

NOT_HERE = {"TorchLinear", "TritonLinear", "MappableRPU", "PrePostProcessingRPU", "is_at_least_volta_gpu", "unfold3d"}
"""What has no meaning here: functions inside its layers, and sections that nothing uses."""
NO_MODULES = ("torch_utils", "triton_utils", "helpers", "VERSION")


# ---- Paths --------------------------------------------------------------------------------------------------------------


def test_every_public_name_of_the_predecessor_is_at_its_path_here() -> None:
    theirs = pytest.importorskip(
        "aihwkit_lightning", reason="the predecessor is an optional peer: pip install aihwkit-lightning"
    )
    seen = 0
    for found in pkgutil.walk_packages(theirs.__path__, "aihwkit_lightning."):
        if any(part in found.name for part in NO_MODULES):
            continue
        if found.name == "aihwkit_lightning.nn.export" and importlib.util.find_spec("aihwkit") is None:
            continue
        module = importlib.import_module(found.name)
        ours = importlib.import_module(found.name.replace("aihwkit_lightning", "triton_analog"))
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "").startswith("aihwkit_lightning")
            if own and not name.startswith("_") and name not in NOT_HERE:
                reexport = value.__module__ != found.name and not found.ispkg
                assert hasattr(ours, name) or reexport, f"{found.name}.{name}"
                seen += 1
    assert seen > 60


def test_the_modules_are_modules() -> None:
    import triton_analog.nn.modules.rnn.cells
    import triton_analog.simulator.configs.configs as configs

    assert configs.TorchInferenceRPUConfig is TorchInferenceRPUConfig
    assert triton_analog.nn.modules.rnn.cells.AnalogGRUCell is AnalogGRUCell
    for path, names in lightning.MODULES.items():
        name = f"triton_analog.{path}"
        module = importlib.import_module(name)
        assert importlib.util.find_spec(name) is not None
        assert {*names} <= {*vars(module)}
    assert pickle.loads(pickle.dumps(configs.TorchInferenceRPUConfig)) is TorchInferenceRPUConfig


def test_the_table_of_the_documentation_names_every_path() -> None:
    text = (Path(__file__).parents[1] / "docs" / "lightning.md").read_text("utf-8")
    told: set[str] = set()
    for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE):
        outer, _, inner = row.partition(", and in it ")
        paths = re.findall(r"`([\w.]+)`", outer)
        told |= {*paths, *(paths[-1] + part for part in re.findall(r"`(\.\w+)`", inner))}
    assert {*lightning.MODULES} <= told
    for path in told:
        importlib.import_module(f"triton_analog.{path}")


def test_a_star_import_leaves_the_users_names_alone() -> None:
    names: dict[str, Any] = {
        "nn": nn,
        "functional": nn.functional,
        "ops": torch.ops,
        "__version__": "mine",
        "config": 1,
    }
    mine = dict(names)
    exec("from triton_analog import *", names)
    assert {name: names[name] for name in mine} == mine
    assert names["convert_to_analog"] is convert_to_analog


def test_the_version_is_written_once() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+", triton_analog.__version__)
    assert triton_analog.__version__ not in text.partition("dependencies")[0]
    assert 'attr = "triton_analog.version.__version__"' in text


# ---- What its users say -------------------------------------------------------------------------------------------------


def test_inp_is_another_name_for_the_input() -> None:
    for layer, x in (
        (AnalogLinear(4, 2, rpu_config=TorchInferenceRPUConfig()), torch.randn(3, 4)),
        (AnalogConv1d(4, 2, 1, rpu_config=TorchInferenceRPUConfig()), torch.randn(3, 4, 5)),
        (AnalogConv2d(4, 2, 1, rpu_config=TorchInferenceRPUConfig()), torch.randn(3, 4, 5, 5)),
        (AnalogConv3d(4, 2, 1, rpu_config=TorchInferenceRPUConfig()), torch.randn(3, 4, 5, 5, 5)),
    ):
        assert torch.equal(layer(inp=x), layer(x))
        assert torch.equal(layer(input=x), layer(x))
        with pytest.raises(TypeError, match="input: one tensor is needed, but input and inp were both given"):
            layer(x, inp=x)
        with pytest.raises(TypeError, match="input: one tensor is needed, but none was given"):
            layer()
    rnn = AnalogRNN(AnalogLSTMCell, 4, 3, rpu_config=TorchInferenceRPUConfig())
    x, states = torch.randn(5, 2, 4), rnn.get_zero_state(2)
    assert torch.equal(rnn(inp=x, states=states)[0], rnn(x, states)[0])
    with pytest.raises(TypeError, match="hx: given, and states too"):
        rnn(x, states, states=states)


def test_the_cells_of_a_recurrent_layer_are_reached_by_its_paths() -> None:
    model = convert_to_analog(nn.GRU(4, 3, 2), TorchInferenceRPUConfig())
    assert [layer.cell for layer in model.rnn.layers] == [model.cells["l0"], model.cells["l1"]]
    assert model.rnn.num_layers == 2
    model = convert_to_analog(nn.LSTM(4, 3, 2, bidirectional=True), TorchInferenceRPUConfig())
    assert model.rnn.layers[1].directions[0].cell is model.cells["l1"]
    assert model.rnn.layers[1].directions[1].cell is model.cells["l1_reverse"]
    weight = torch.randn(12, 3)
    model.rnn.layers[0].directions[1].cell.weight_hh.set_weights_and_biases(weight, torch.zeros(12))
    assert torch.equal(model.state_dict()["weight_hh_l0_reverse"], weight)


def test_slices_have_their_name_for_them() -> None:
    tiles = TorchInferenceRPUConfig()
    tiles.mapping.max_input_size = 16
    assert AnalogLinear(40, 2, rpu_config=tiles).in_sizes == [14, 13, 13]
    convolution = AnalogConv2d(4, 2, 3, rpu_config=tiles)
    assert convolution.in_sizes == [12, 12, 12]
    assert (convolution.in_features, convolution.out_features) == (36, 2)


NORMAL, QUANTIZED = WeightNoiseInjectionType, WeightQuantizationType


@pytest.mark.parametrize(
    ("kind", "noise", "quantization"),
    [
        ("DISCRETIZE", NORMAL.NONE, QUANTIZED.DISCRETIZE),
        ("DISCRETIZE_PER_CHANNEL", NORMAL.NONE, QUANTIZED.DISCRETIZE_PER_CHANNEL),
        ("ADD_NORMAL", NORMAL.ADD_NORMAL, QUANTIZED.NONE),
        ("ADD_NORMAL_PER_CHANNEL", NORMAL.ADD_NORMAL_PER_CHANNEL, QUANTIZED.NONE),
        ("DISCRETIZE_ADD_NORMAL", NORMAL.ADD_NORMAL, QUANTIZED.DISCRETIZE),
        (
            "DISCRETIZE_ADD_NORMAL_PER_CHANNEL",
            NORMAL.ADD_NORMAL_PER_CHANNEL,
            QUANTIZED.DISCRETIZE_PER_CHANNEL,
        ),
    ],
)
def test_a_kind_of_version_1_is_translated_and_warns(kind: str, noise: Any, quantization: Any) -> None:
    made = TorchInferenceRPUConfig()
    with pytest.warns(DeprecationWarning, match=rf"modifier\.type: got {kind}, .*{noise}.*{quantization}") as caught:
        made.modifier.type = WeightModifierType[kind]
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="a kind of version 1"):
        built = WeightModifierParameter(type=WeightModifierType[kind])
    assert built == made.modifier == WeightModifierParameter(noise_type=noise, quantization_type=quantization)
    assert made.modifier.type is WeightModifierType[kind]
    assert TorchInferenceRPUConfig.from_dict(made.to_dict()) == made


def test_what_version_1_switches_off_is_off() -> None:
    modifier = WeightModifierParameter(
        type=WeightModifierType.NONE, noise_type=NORMAL.ADD_NORMAL, enable_during_test=False
    )
    assert modifier.noise_type is NORMAL.ADD_NORMAL
    with pytest.warns(DeprecationWarning, match="a kind of version 1"):
        modifier.type = WeightModifierType.NONE
    assert modifier == WeightModifierParameter()
    with pytest.warns(UserWarning, match=r"modifier\.enable_during_test: got True, which stays False"):
        modifier.enable_during_test = True
    assert modifier.enable_during_test is False
    with pytest.raises(ConfigError, match=r"modifier\.type: got .*ADD_NORMAL.*; it is deprecated, and allowed are"):
        modifier.type = NORMAL.ADD_NORMAL  # type: ignore[assignment]


# ---- Checkpoints and scripts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "Conv2d", "Conv3d", "LSTM", "GRU"])
def test_checkpoints_go_there_and_come_back(kind: str) -> None:
    pytest.importorskip(
        "aihwkit_lightning", reason="the predecessor is an optional peer: pip install aihwkit-lightning"
    )
    from aihwkit_lightning.nn.conversion import convert_to_analog as convert_theirs
    from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig as TheirConfig

    def ranged(made: Any) -> Any:
        made.pre_post.input_range.enable, made.pre_post.input_range.init_value = True, 1.5
        made.mapping.max_input_size = 5
        return made

    options = {"kernel_size": 3} if "Conv" in kind else {}

    def digital() -> nn.Module:
        return nn.Sequential(OrderedDict(layer=getattr(nn, kind)(4, 6, **options)))

    theirs = convert_theirs(digital(), ranged(TheirConfig()))
    ours = convert_to_analog(digital(), ranged(TorchInferenceRPUConfig()))
    ours.load_state_dict(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, check_dtype=False)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    theirs.load_state_dict({key: value for key, value in ours.state_dict().items() if "_extra_state" not in key})
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, check_dtype=False)
    digital().load_state_dict(convert_to_digital(ours).state_dict())


EXAMPLE = """
from torch import Tensor
from torch.nn import Linear, ReLU, Sequential
from torch.nn.functional import mse_loss
from torch.optim import SGD

from LIBRARY.nn.conversion import convert_to_analog
from LIBRARY.optim.analog_optimizer import AnalogOptimizer
from LIBRARY.simulator.configs import WeightClipType
from LIBRARY.simulator.configs.configs import TorchInferenceRPUConfig
from LIBRARY.simulator.parameters.enums import WeightNoiseInjectionType

config = TorchInferenceRPUConfig()
config.pre_post.input_range.enable = True
config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN, 2.5
config.forward.inp_res = 254
config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.0001
model = convert_to_analog(Sequential(Linear(4, 8), ReLU(), Linear(8, 2)), rpu_config=config, exclude_modules="1")
optimizer = AnalogOptimizer(SGD, model.analog_layers, model.parameters(), lr=0.1)
x, y = Tensor([[0.1, 0.2, 0.4, 0.3], [0.2, 0.1, 0.1, 0.3]]), Tensor([[1.0, 0.5], [0.7, 0.3]])
losses = []
for _ in range(30):
    optimizer.zero_grad()
    loss = mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(losses[-1] < losses[0])
"""


@pytest.mark.parametrize("library", ["aihwkit_lightning", "triton_analog"])
def test_one_script_runs_with_either_package(library: str) -> None:
    pytest.importorskip(library, reason="the predecessor is an optional peer: pip install aihwkit-lightning")
    script = EXAMPLE.replace("LIBRARY", library)
    root = str(Path(__file__).parents[1])
    # The predecessor looks for a GPU without the interpreter; kernels in it would be slow here.
    environment = os.environ | {"TRITON_INTERPRET": "1" if library == "aihwkit_lightning" else "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, cwd=root
    )
    assert done.stdout == "True\n", done.stderr
    assert config.ConfigWarning.__name__ not in done.stderr
