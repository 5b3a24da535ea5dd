"""Converting whole models: what is replaced, what stays as it was, and what is said about the rest."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from triton_analog.config import ConfigError, TorchInferenceRPUConfig, WeightClipType, WeightQuantizationType
from triton_analog.convert import convert_to_analog, convert_to_digital
from triton_analog.nn import AnalogLinear, AnalogSequential, AnalogWrapper


def ideal() -> TorchInferenceRPUConfig:
    return TorchInferenceRPUConfig()


def ranged() -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.pre_post.input_range.enable = True
    return config


def coarse() -> TorchInferenceRPUConfig:
    """A dynamic range and so few DAC steps that analog outputs are unlike digital ones."""
    config = TorchInferenceRPUConfig()
    config.pre_post.input_range.enable = config.pre_post.input_range.dynamic = True
    config.forward.inp_res = 4
    return config


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(self.up(x)).relu())


class Net(nn.Module):
    """Blocks, a shared layer and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.blocks = nn.Sequential(Block(), Block())
        self.shared = nn.Linear(6, 6)
        self.again = self.shared
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.note = "kept"

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.again(self.shared(self.blocks(self.embedding(tokens)))))


TOKENS = torch.arange(10)
LAYERS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "shared", "head"]


def names(model: Any) -> list[str]:
    return [name for name, _ in model.named_analog_layers()]


# ---- To analog --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [True, False])
def test_every_linear_layer_is_replaced_and_the_model_still_computes_the_same(inplace: bool) -> None:
    net = Net().eval()
    expected = net(TOKENS)
    analog = convert_to_analog(net, ideal(), inplace=inplace)
    assert names(analog) == LAYERS
    assert not any(type(module) is nn.Linear for module in analog.modules())
    torch.testing.assert_close(analog(TOKENS), expected, atol=1e-5, rtol=1e-5)
    assert isinstance(analog, Net)
    assert isinstance(analog.blocks, AnalogSequential)
    assert analog.note == "kept"
    assert (analog is net) == inplace
    assert (type(net) is Net) != inplace


def test_tied_parameters_and_shared_modules_stay_so() -> None:
    analog = convert_to_analog(Net(), ideal())
    assert analog.head.weight is analog.embedding.weight
    assert analog.shared is analog.again
    assert isinstance(analog.shared, AnalogLinear)


def test_in_place_the_parameters_are_the_very_same_objects() -> None:
    net = Net()
    before = dict(net.named_parameters())
    analog = convert_to_analog(net, ideal(), inplace=True)
    assert dict(analog.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in analog.named_parameters())


def test_in_place_the_old_layers_hold_no_memory() -> None:
    net = Net()
    old, tied = net.blocks[0].up, net.head
    analog = convert_to_analog(net, ideal(), inplace=True)
    assert old.weight.is_meta
    assert tied.weight.is_meta
    assert not any(tensor.is_meta for tensor in (*analog.parameters(), *analog.buffers()))


def test_without_inplace_the_model_is_left_alone() -> None:
    net = Net()
    before = copy.deepcopy(net.state_dict())
    analog = convert_to_analog(net, ideal())
    with torch.no_grad():
        for parameter in analog.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(type(module) is not AnalogLinear for module in net.modules())


def test_mode_and_frozen_parameters_are_kept() -> None:
    net = Net()
    net.blocks[0].eval()
    net.blocks[1].requires_grad_(False)
    analog = convert_to_analog(net, ideal())
    for name, module in net.named_modules():
        assert analog.get_submodule(name).training == module.training, name
    for name, parameter in net.named_parameters():
        assert analog.get_parameter(name).requires_grad == parameter.requires_grad, name


def test_hooks_are_kept_and_their_handles_still_work() -> None:
    net, calls = Net(), []
    before = net.shared.register_forward_pre_hook(lambda *_: calls.append("pre"))
    after = net.blocks.register_forward_hook(lambda *_: calls.append("post"))
    analog = convert_to_analog(net, ideal(), inplace=True)
    analog(TOKENS)
    assert calls == ["post", "pre", "pre"]
    before.remove()
    after.remove()
    analog(TOKENS)
    assert len(calls) == 3


@pytest.mark.parametrize("inplace", [True, False])
def test_what_was_added_to_a_layer_is_kept_both_ways(inplace: bool) -> None:
    net, seen = Net(), []
    net.shared.note = "mine"
    net.shared.register_buffer("scale", torch.ones(3))
    net.shared.register_buffer("scratch", torch.ones(2), persistent=False)
    net.shared.register_state_dict_pre_hook(lambda module, *_: seen.append(type(module)))
    net.shared.register_state_dict_post_hook(lambda module, *_: seen.append(type(module)))
    net.shared.register_load_state_dict_pre_hook(lambda module, *_: seen.append(type(module)))
    net.shared.register_load_state_dict_post_hook(lambda module, *_: seen.append(type(module)))
    keys = set(net.state_dict())
    model = net
    for convert, kind in (
        (lambda net: convert_to_analog(net, ranged(), inplace=inplace), AnalogLinear),
        (lambda net: convert_to_digital(net, inplace=inplace), nn.Linear),
    ):
        model = convert(model)
        seen.clear()
        model.load_state_dict(model.state_dict())
        assert seen == [kind] * 8  # the layer has two names
        assert model.shared.note == "mine"
        assert torch.equal(model.shared.scale, torch.ones(3))
        assert keys <= set(model.state_dict())
        assert "shared.scratch" not in model.state_dict()
        assert torch.equal(model.shared.scratch, torch.ones(2))
    assert set(model.state_dict()) == keys
    assert vars(model.shared).keys() == vars(net.shared).keys()
    assert type(model.shared) is nn.Linear


def test_dtype_and_meta_device_are_kept() -> None:
    config = ideal()
    config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    assert convert_to_analog(Block().bfloat16(), config).up.learnable_weight_clip.dtype == torch.bfloat16
    with torch.device("meta"):
        net = Net()
    assert all(parameter.is_meta for parameter in convert_to_analog(net, config).parameters())


def test_converting_twice_changes_nothing() -> None:
    analog = convert_to_analog(Net(), ideal())
    modules = dict(analog.named_modules())
    again = convert_to_analog(analog, coarse(), inplace=True)
    assert again is analog
    assert dict(again.named_modules()) == modules
    assert all(layer.rpu_config == ideal() for layer in analog.analog_layers())


def test_layers_get_configs_of_their_own() -> None:
    config = ideal()
    config.modifier.res, config.modifier.quantization_type = 30, WeightQuantizationType.DISCRETIZE
    analog = convert_to_analog(Net(), config)
    configs = [layer.rpu_config for layer in analog.analog_layers()]
    assert len({id(own) for own in [config, *configs]}) == len(LAYERS) + 1
    analog.quantize_weights()
    assert config.modifier.quantization_type is WeightQuantizationType.DISCRETIZE
    assert all(own.modifier.quantization_type is WeightQuantizationType.NONE for own in configs)


def test_a_function_chooses_the_config_of_each_layer() -> None:
    seen = []

    def choose(name: str, module: nn.Module, config: TorchInferenceRPUConfig) -> TorchInferenceRPUConfig:
        seen.append((name, type(module)))
        config.mapping.max_input_size = 3 if name.endswith("down") else -1
        return config

    config = ideal()
    analog = convert_to_analog(Net(), config, specific_rpu_config_fun=choose, module_name="net")
    assert seen == [(f"net.{name}", nn.Linear) for name in LAYERS]
    assert analog.blocks[0].down.get_split_sizes() == [3, 3, 3, 3]
    assert analog.blocks[0].up.get_split_sizes() == [6]
    assert config == ideal()


@pytest.mark.parametrize("wrong", [None, "invalid"])
def test_a_wrong_choice_names_the_layer_and_nothing_is_changed(wrong: Any) -> None:
    def choose(name: str, module: nn.Module, config: Any) -> Any:
        if name == "shared":
            if wrong is None:
                return None
            config.forward.inp_res = 254
        return config

    net = Net()
    with pytest.raises(ConfigError, match="specific_rpu_config_fun for 'shared': "):
        convert_to_analog(net, ideal(), specific_rpu_config_fun=choose, inplace=True)
    assert type(net) is Net
    assert not any(isinstance(module, AnalogLinear) for module in net.modules())


def test_excluded_modules_stay_digital_with_all_below_them() -> None:
    analog = convert_to_analog(Net(), ideal(), exclude_modules=["blocks.0", "head"])
    assert names(analog) == ["blocks.1.up", "blocks.1.down", "shared"]
    assert type(analog.blocks[0].up) is nn.Linear


def test_excluding_one_name_of_a_shared_module_excludes_it() -> None:
    analog = convert_to_analog(Net(), ideal(), exclude_modules=["again"])
    assert analog.shared is analog.again
    assert type(analog.shared) is nn.Linear


@pytest.mark.parametrize(
    ("excluded", "error", "message"),
    [
        ("up", ValueError, "no module is called 'up'"),
        ([nn.Linear], TypeError, "exclude_modules: got .*; a list of full module names"),
        (["blocks.0.upp"], ValueError, r"no module is called 'blocks.0.upp'; did you mean 'blocks.0.up'"),
        (["up"], ValueError, "no module is called 'up'"),
    ],
)
def test_exclusions_are_exact_names(excluded: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        convert_to_analog(Net(), ideal(), exclude_modules=excluded)


def test_a_single_name_may_be_excluded_without_a_list() -> None:
    model = convert_to_analog(Net(), ideal(), exclude_modules="head")
    assert type(model.head) is nn.Linear
    assert type(model.blocks[0].up) is AnalogLinear


class Scaled(nn.Linear):
    """A user's layer: a linear one with something more."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)

    @classmethod
    def from_digital(cls, module: nn.Linear, rpu_config: TorchInferenceRPUConfig) -> AnalogLinear:
        return AnalogLinear.from_digital(module, rpu_config)


def test_what_cannot_be_converted_is_left_digital_with_one_warning_that_names_it() -> None:
    net = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "scaled": Scaled(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "normed": weight_norm(nn.Linear(4, 4)),
            "pruned": nn.Linear(4, 4),
            "patched": nn.Linear(4, 4),
            "nothing": nn.Linear(4, 4),
            "conv": nn.LazyConv2d(1, 1),
            "up": nn.ConvTranspose1d(1, 1, 1),
            "lstm": nn.LSTM(4, 4),
            "cell": nn.GRUCell(4, 4),
            "norm": nn.LayerNorm(4),
            "embedding": nn.Embedding(4, 4),
        }
    )
    prune.random_unstructured(net["pruned"], "weight", amount=1)
    net["patched"].forward = lambda x: x
    net["nothing"].weight = nn.Parameter(torch.empty(4, 0))
    with pytest.warns(UserWarning, match="left 9 module") as caught:
        analog = convert_to_analog(net, ideal(), inplace=True)
    assert names(analog) == ["plain", "lstm.cells.l0.weight_ih", "lstm.cells.l0.weight_hh"]
    (warning,) = caught
    for part in (
        *("scaled: Scaled is a subclass", "attention: Multihead", "normed: its weight", "pruned: its weight"),
        *("patched: its forward was replaced", "nothing: its weight is empty"),
        *("conv: LazyConv2d has no weight yet; run the model once", "up: no analog class for ConvT"),
        "cell: no analog class for GRUCell",
    ):
        assert part in str(warning.message)
    assert warning.filename == __file__


def test_a_sequence_with_a_forward_of_its_own_keeps_it_around_analog_layers() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    net.forward = lambda x: x + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        analog = convert_to_analog(nn.ModuleList([net]), ideal(), inplace=True)
    assert names(analog) == ["0.0"]
    assert analog[0] is net
    assert analog[0](torch.zeros(1)) == 1


def test_excluded_or_mapped_modules_are_not_warned_about() -> None:
    net = nn.ModuleDict({"scaled": Scaled(4, 4), "mapped": Scaled(4, 4)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        analog = convert_to_analog(net, ideal(), conversion_map={Scaled: Scaled}, exclude_modules=["scaled"])
    assert names(analog) == ["mapped"]


def test_a_custom_map_replaces_the_default_one() -> None:
    analog = convert_to_analog(nn.Sequential(nn.Linear(4, 4), nn.Sequential()), ideal(), conversion_map={})
    assert names(analog) == []
    assert not isinstance(analog, AnalogSequential)


@pytest.mark.parametrize("wrong", [[nn.Linear], {nn.Linear: nn.ReLU}, {"Linear": AnalogLinear}])
def test_a_map_of_something_else_is_an_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"conversion_map: got .* a dict from torch classes to analog classes"):
        convert_to_analog(Net(), ideal(), conversion_map=wrong)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="module: got list"):
        convert_to_analog([], ideal())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rpu_config: got nothing"):
        convert_to_analog(Net(), None)  # type: ignore[arg-type]


def test_verbose_lists_every_replacement(capsys: pytest.CaptureFixture[str]) -> None:
    convert_to_analog(Block(), ideal(), verbose=True)
    assert capsys.readouterr().out == "up: Linear -> AnalogLinear\ndown: Linear -> AnalogLinear\n"


@pytest.mark.parametrize("inplace", [True, False])
def test_a_single_layer_converts_to_itself(inplace: bool) -> None:
    digital = nn.Linear(4, 2)
    weight = digital.weight
    analog = convert_to_analog(digital, ideal(), inplace=inplace)
    assert type(analog) is AnalogLinear
    assert torch.equal(analog.weight, weight)
    assert (analog.weight is weight) == inplace


def test_the_root_can_stay_as_it_is() -> None:
    analog = convert_to_analog(Block(), ideal(), ensure_analog_root=False)
    assert type(analog) is Block
    assert type(analog.up) is AnalogLinear


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_transformer_runs_its_analog_layers_in_evaluation(activation: str) -> None:
    encoder_layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=activation, batch_first=True)
    digital = nn.TransformerEncoder(encoder_layer, 2).eval()
    with pytest.warns(UserWarning, match="self_attn: MultiheadAttention"):
        analog = convert_to_analog(digital, coarse())
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        fast = analog(x)
    torch.testing.assert_close(fast, analog(x).detach())  # with gradients, torch takes no shortcut
    assert not torch.allclose(fast, digital(x), atol=1e-2)
    back = convert_to_digital(analog)
    assert back.layers[0].activation_relu_or_gelu == digital.layers[0].activation_relu_or_gelu
    torch.testing.assert_close(back(x), digital(x))


# ---- To digital -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [True, False])
def test_the_way_back_restores_the_model(inplace: bool) -> None:
    net = Net()
    net.blocks[0].eval()
    net.shared.requires_grad_(False)
    analog = convert_to_analog(net, coarse())
    back = convert_to_digital(analog, inplace=inplace)
    assert [(name, type(module)) for name, module in back.named_modules()] == [
        (name, type(module)) for name, module in net.named_modules()
    ]
    assert back.head.weight is back.embedding.weight
    assert back.shared is back.again
    assert [module.training for module in back.modules()] == [module.training for module in net.modules()]
    assert not back.shared.weight.requires_grad
    assert (back is analog) == inplace
    assert isinstance(analog, AnalogWrapper) != inplace
    for name, value in net.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert back.state_dict().keys() == net.state_dict().keys()


def test_a_set_limits_what_becomes_digital() -> None:
    analog = convert_to_analog(nn.Sequential(nn.Linear(4, 4), Block()), ideal())
    back = convert_to_digital(analog, conversion_set={AnalogLinear})
    assert type(back) is AnalogSequential
    assert type(back[0]) is nn.Linear
    assert type(back[1].up) is nn.Linear


@pytest.mark.parametrize("wrong", [[AnalogLinear], {nn.Linear}, "AnalogLinear"])
def test_a_set_of_something_else_is_an_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"conversion_set: got .* a set of analog classes"):
        convert_to_digital(convert_to_analog(Block(), ideal()), conversion_set=wrong)


# ---- The wrapper ------------------------------------------------------------------------------------------------------


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_wrapping_keeps_the_object_its_class_and_its_names() -> None:
    net = Net()
    keys = list(net.state_dict())
    wrapped = AnalogWrapper(net)
    assert wrapped is net
    assert isinstance(wrapped, Net)
    assert isinstance(wrapped, AnalogWrapper)
    assert type(wrapped).__name__ == "Net"
    assert list(wrapped.state_dict()) == keys


def test_wrapping_twice_or_wrapping_analog_modules_does_nothing() -> None:
    net = AnalogWrapper(Net())
    kind = type(net)
    assert AnalogWrapper(net) is net
    assert type(net) is kind
    layer = AnalogLinear(4, 2, rpu_config=ideal())
    assert AnalogWrapper(layer) is layer
    assert type(layer) is AnalogLinear


def test_classes_of_one_name_keep_their_own_methods() -> None:
    def make(value: int) -> nn.Module:
        class Twin(nn.Module):
            def forward(self) -> int:
                return value

        return AnalogWrapper(Twin())

    first, second = make(1), make(2)
    assert (first(), second()) == (1, 2)
    assert type(AnalogWrapper(Block())) is type(AnalogWrapper(Block()))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_converted_models_can_be_copied_and_pickled(copied: Any) -> None:
    analog = convert_to_analog(Net(), coarse())
    other = copied(analog)
    assert type(other) is type(analog)
    assert names(other) == LAYERS
    assert other.shared is other.again
    assert other.head.weight is other.embedding.weight
    assert other.note == "kept"
    assert torch.equal(other(TOKENS), analog(TOKENS))
    with torch.no_grad():
        other.shared.weight.zero_()
    assert analog.shared.weight.any()


class Stateful(nn.Module):
    """A module that decides itself what a pickle holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.cache = nn.Linear(4, 4), lambda: None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.cache = "restored"


class Rebuilt(nn.Module):
    """A module that is rebuilt by its constructor."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.layer = size, nn.Linear(size, size)

    def __reduce__(self) -> Any:
        return type(self), (self.size,), self.__dict__


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_classs_own_way_to_be_pickled_is_respected(copied: Any) -> None:
    other = copied(convert_to_analog(AnalogWrapper(Stateful()), ideal(), inplace=True))
    assert other.cache == "restored"
    assert names(other) == ["layer"]
    rebuilt = convert_to_analog(Rebuilt(3), ideal())
    other = copied(rebuilt)
    assert type(other) is type(rebuilt)
    assert torch.equal(other.layer.weight, rebuilt.layer.weight)


def test_the_class_of_a_wrapped_model_still_makes_models() -> None:
    fresh = type(AnalogWrapper(Rebuilt(3)))(5)
    assert fresh.size == 5
    assert isinstance(fresh, AnalogWrapper)


def test_a_wrapper_acts_on_every_layer_once() -> None:
    config = ideal()
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN, 0.5
    analog = convert_to_analog(Net(), config)
    before = analog.shared.weight.detach().clone()
    analog.clip_weights()
    bound = 0.5 * before.std()
    torch.testing.assert_close(analog.shared.weight.detach(), before.clamp(-bound, bound))
    seen: list[nn.Module] = []
    assert analog.apply_to_analog_layers(seen.append) is analog
    assert len(seen) == len(LAYERS)


def test_something_else_cannot_be_wrapped() -> None:
    with pytest.raises(TypeError, match="model: got int"):
        AnalogWrapper(3)
    with pytest.raises(TypeError, match=r"model: call AnalogWrapper\(model\)"):
        AnalogWrapper()


class Clipper(nn.Module):
    """A model with a method whose name a wrapper adds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def clip_weights(self) -> str:
        return "mine"


@pytest.mark.parametrize("wrap", [AnalogWrapper, lambda net: convert_to_analog(net, ideal(), inplace=True)])
def test_a_model_whose_own_methods_would_be_hidden_is_refused_and_left_alone(wrap: Any) -> None:
    net = Clipper()
    with pytest.raises(TypeError, match="model: Clipper has clip_weights of its own"):
        wrap(net)
    assert type(net) is Clipper
    assert type(net.layer) is nn.Linear
    analog = AnalogSequential(convert_to_analog(net, ideal(), ensure_analog_root=False))
    assert names(analog) == ["0.layer"]
    assert analog[0].clip_weights() == "mine"
