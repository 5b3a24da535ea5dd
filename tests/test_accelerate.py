"""Hugging Face's accelerate: models below its hooks, and analog checkpoints that its loaders put onto devices and disks."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from triton_analog import TorchInferenceRPUConfig, convert_to_analog, convert_to_digital
from triton_analog.config import WeightClipType, WeightNoiseInjectionType, WeightNoiseRefresh
from triton_analog.nn import AnalogLinear

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
analog_accelerate = pytest.importorskip("triton_analog.integrations.accelerate", reason="accelerate is not installed")
hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")

X = torch.linspace(-1, 1, 36).reshape(3, 12)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Any) -> Any:
        return self.second(self.first(x).relu())


def recipe(std_dev: float = 0.1) -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 8
    config.forward.inp_res = 254
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.init_from_data = 3
    config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, std_dev
    config.modifier.refresh = WeightNoiseRefresh.STEP
    return config


def trained() -> Any:
    net = convert_to_analog(Net(), recipe())
    for _ in range(4):
        net(torch.randn(5, 12))
    with torch.no_grad():
        for layer in net.analog_layers():
            layer.learnable_weight_clip.mul_(0.7)
    return net.eval()


def fresh(where: str) -> Any:
    """To be loaded into, with another config than the file."""
    if where == "meta":
        with accelerate.init_empty_weights():
            return convert_to_analog(Net(), recipe(std_dev=0.5))
    return convert_to_analog(Net(), recipe(std_dev=0.5))


# ---- Checkpoints --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained model, and the folder of its shards."""
    net, folder = trained(), tmp_path_factory.mktemp("checkpoint")
    accelerate.Accelerator(cpu=True).save_model(net, folder, max_shard_size="1KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return net, folder


def check(net: Any, source: Any) -> None:
    with torch.no_grad():
        assert torch.equal(net.eval()(X), source(X))
    for own, other in zip(net.analog_layers(), source.analog_layers(), strict=True):
        assert own.rpu_config == other.rpu_config


@pytest.mark.parametrize(
    ("load", "device_map", "where"),
    [
        ("load_checkpoint_in_model", None, "cpu"),  # torch fills no model of which nothing has memory this way
        ("load_checkpoint_in_model", {"first": "cpu", "second": "cpu"}, "cpu"),
        ("load_checkpoint_in_model", {"first": "cpu", "second": "cpu"}, "meta"),
        ("load_checkpoint_and_dispatch", {"": "cpu"}, "cpu"),
        ("load_checkpoint_and_dispatch", {"": "cpu"}, "meta"),
        ("load_checkpoint_and_dispatch", "auto", "meta"),
    ],
    ids=str,
)
def test_accelerates_loaders_load_ranges_clips_and_configs(
    load: str, device_map: Any, where: str, checkpoint: Any
) -> None:
    source, folder = checkpoint
    net = fresh(where)
    getattr(accelerate, load)(net, folder, device_map=device_map)
    check(net, source)
    for own, other in zip(net.analog_layers(), source.analog_layers(), strict=True):
        assert torch.equal(own.input_range, other.input_range)
        assert torch.equal(own.learnable_weight_clip, other.learnable_weight_clip)
        assert torch.equal(own.input_range_update_idx, other.input_range_update_idx)
    ranges = [layer.input_range.clone() for layer in net.analog_layers()]
    net.train()(100 * X).sum().backward()
    assert all(map(torch.equal, ranges, [layer.input_range for layer in net.analog_layers()]))
    copy.deepcopy(net).load_state_dict(net.state_dict())


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_what_goes_onto_a_disk_has_its_config_too(where: str, checkpoint: Any, tmp_path: Path) -> None:
    source, folder = checkpoint
    places = {"device_map": {"first": "cpu", "second": "disk"}, "offload_folder": tmp_path}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = analog_accelerate.load_checkpoint_and_dispatch(fresh(where), folder, **places)
        check(net, source)
    assert net.second.weight.is_meta
    assert net.second.input_range_update_idx.tolist() == [3, 3]


def test_accelerates_own_loader_does_not_go_on_with_another_config_in_silence(checkpoint: Any, tmp_path: Path) -> None:
    _, folder = checkpoint
    net = accelerate.load_checkpoint_and_dispatch(
        fresh("cpu"), folder, device_map={"first": "cpu", "second": "disk"}, offload_folder=tmp_path
    )
    with pytest.warns(UserWarning, match="offloaded to a disk, unread: .*triton_analog.integrations.accelerate"):
        net(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(X)


@pytest.mark.parametrize("kind", ["file", "torch.save", "index"])
def test_every_form_of_a_checkpoint_is_read(kind: str, checkpoint: Any, tmp_path: Path) -> None:
    source, folder = checkpoint
    path = next(folder.glob("*.index.json"))
    if kind == "file":
        accelerate.Accelerator(cpu=True).save_model(source, tmp_path)
        path = tmp_path / "model.safetensors"
    elif kind == "torch.save":
        path = tmp_path / "pytorch_model.bin"
        torch.save(source.state_dict(), path)
    check(analog_accelerate.load_checkpoint_and_dispatch(fresh("meta"), path, device_map={"": "cpu"}), source)


def test_other_slices_are_refused(checkpoint: Any, tmp_path: Path) -> None:
    config = recipe()
    config.mapping.max_input_size = -1
    with pytest.raises(ValueError, match=r"mapping\.max_input_size: got 8, which cuts"):
        accelerate.load_checkpoint_in_model(convert_to_analog(Net(), config), checkpoint[1], device_map={"": "cpu"})
    with pytest.raises(FileNotFoundError, match="holds neither"):
        analog_accelerate.load_checkpoint_and_dispatch(fresh("cpu"), tmp_path)


def test_an_analog_model_is_offloaded_after_its_conversion() -> None:
    net = trained()
    expected = net(X).detach()
    accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    assert net.first.weight.is_meta
    with torch.no_grad():
        assert torch.equal(net(X), expected)


# ---- Conversion below hooks ------------------------------------------------------------------------------------------------


def dispatched(offload: bool = False) -> Any:
    device_map = {"first": "cpu", "second": "disk" if offload else "cpu"}
    return accelerate.dispatch_model(Net(), device_map, offload_dir="." if offload else None, force_hooks=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_that_only_move_things_move_to_the_analog_layer(inplace: bool) -> None:
    digital = dispatched().eval()
    expected = digital(X).detach()
    hook = digital.first._hf_hook
    net = convert_to_analog(digital, TorchInferenceRPUConfig(), inplace=inplace)
    assert {type(net.first), type(net.second)} == {AnalogLinear}
    assert type(net.first._hf_hook) is type(hook)
    torch.testing.assert_close(net(X).detach(), expected)
    seen: list[nn.Module] = []
    net.first._hf_hook.pre_forward = lambda module, *args, **kwargs: (seen.append(module), (args, kwargs))[1]
    net(X)
    assert seen == [net.first]
    back = convert_to_digital(net)
    assert isinstance(back.first._hf_hook, hooks.AlignDevicesHook)
    torch.testing.assert_close(back(X).detach(), expected)


def test_offloaded_layers_stay_digital_and_the_remedy_is_to_convert_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    digital = dispatched(offload=True)
    with pytest.warns(
        UserWarning, match=r"second: a hook of accelerate \(AlignDevicesHook\) offloads its weight"
    ) as said:
        net = convert_to_analog(digital, TorchInferenceRPUConfig())
    assert "Convert the model before it is dispatched" in str(said[0].message)
    assert "conversion_map" not in str(said[0].message)
    assert (type(net.first), type(net.second)) == (AnalogLinear, nn.Linear)
    torch.testing.assert_close(net(X).detach(), digital(X).detach())


def test_hooks_that_do_more_are_left_alone() -> None:
    digital = Net()
    hooks.add_hook_to_module(digital.first, hooks.ModelHook())
    with pytest.warns(UserWarning, match=r"first: a hook of accelerate \(ModelHook\) replaced its forward"):
        net = convert_to_analog(digital, TorchInferenceRPUConfig())
    assert type(net.first) is nn.Linear
