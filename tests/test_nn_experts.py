"""Experts of a mixture on analog tiles, against their digital module and against analog linear layers, one for each matrix."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_analog import (
    AnalogOptimizer,
    InputRangeCalibrationType,
    TorchInferenceRPUConfig,
    analog_summary,
    calibrate_input_ranges,
    convert_to_analog,
    convert_to_digital,
    export_to_aihwkit,
    restore_analog,
)
from triton_analog.config import (
    ConfigError,
    WeightClipType,
    WeightNoiseInjectionType,
    WeightNoiseRefresh,
    WeightQuantizationType,
)
from triton_analog.convert import CONVERSION_MAP
from triton_analog.nn import AnalogExperts, AnalogLinear
from triton_analog.optim import attach, parameter_groups

E, H, INNER = 4, 6, 5


class Experts(nn.Module):
    def __init__(self, gated: bool = True, transposed: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.has_gate, self.is_transposed = gated, transposed
        outer = 2 * INNER if gated else INNER
        self.up = "gate_up_proj" if gated else "up_proj"
        for name, (n, k) in {self.up: (outer, H), "down_proj": (H, INNER)}.items():
            setattr(self, name, nn.Parameter(torch.randn(E, *((k, n) if transposed else (n, k))) * k**-0.5))
            if bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(E, n)))
        self.act_fn = nn.SiLU()

    def linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        weight, bias = getattr(self, name)[expert], getattr(self, f"{name}_bias", None)
        return F.linear(x, weight.T if self.is_transposed else weight, None if bias is None else bias[expert])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(E):
            token, place = torch.where(top_k_index == expert)
            hidden = self.linear(self.up, expert, hidden_states[token])
            if self.has_gate:
                gate, up = hidden.chunk(2, -1)
                hidden = self.act_fn(gate) * up
            else:
                hidden = self.act_fn(hidden)
            y = self.linear("down_proj", expert, hidden)
            out = out.index_add(0, token, y * top_k_weights[token, place, None])
        return out


class Net(nn.Module):
    """Each token has its experts."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.experts = Experts(**options)

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        index = ROUTES[: len(x)] if index is None else index
        return self.experts(x, index, torch.linspace(0.2, 0.9, index.numel()).view_as(index))


ROUTES = torch.tensor([[0, 1], [1, 0], [3, 1], [0, 3], [1, 3], [3, 0], [0, 1]])
"""Expert 2 has no rows."""
X = torch.linspace(-2, 2, 7 * H).view(7, H).sin()
MAP = CONVERSION_MAP | {Experts: AnalogExperts}


def everything() -> TorchInferenceRPUConfig:
    """All that is not random."""
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 4
    config.forward.inp_res = config.forward.out_res = 30
    config.forward.out_bound = 3.0
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.init_from_data = 2
    config.modifier.quantization_type, config.modifier.res = WeightQuantizationType.DISCRETIZE_PER_CHANNEL, 2**6 - 2
    config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    return config


def clipped(kind: WeightClipType = WeightClipType.LAYER_GAUSSIAN) -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.clip.type, config.clip.sigma = kind, 1.0
    return config


def analog(config: TorchInferenceRPUConfig | None = None, net: nn.Module | None = None, **options: Any) -> Any:
    return convert_to_analog(net or Net(**options), config or TorchInferenceRPUConfig(), conversion_map=MAP)


class LinearExperts(Experts):
    """The same of analog linear layers, one for each matrix."""

    def __init__(self, other: Experts, config: TorchInferenceRPUConfig) -> None:
        nn.Module.__init__(self)
        self.up, self.has_gate, self.is_transposed, self.act_fn = other.up, other.has_gate, False, other.act_fn
        self.layers = nn.ModuleDict()
        for name in (other.up, "down_proj"):
            for expert, weight in enumerate(getattr(other, name)):
                matrix = weight.T if other.is_transposed else weight
                bias = getattr(other, f"{name}_bias", None)
                layer = AnalogLinear(matrix.shape[1], len(matrix), bias is not None, rpu_config=config)
                layer.set_weights_and_biases(matrix.detach(), None if bias is None else bias[expert].detach())
                self.layers[f"{name}_{expert}"] = layer

    def linear(self, name: str, expert: int, x: Tensor) -> Tensor:
        return self.layers[f"{name}_{expert}"](x) if len(x) else x.new_zeros(0, self.width(name))

    def width(self, name: str) -> int:
        return self.layers[f"{name}_0"].out_features


LAYOUTS = [{}, {"transposed": True, "bias": True}, {"gated": False, "bias": True}, {"gated": False, "transposed": True}]


@pytest.mark.parametrize("options", LAYOUTS)
def test_ideal_experts_compute_what_the_digital_ones_do(options: dict[str, bool]) -> None:
    net = Net(**options)
    torch.testing.assert_close(analog(net=net)(X), net(X))


@pytest.mark.parametrize("options", LAYOUTS)
def test_outputs_gradients_and_ranges_are_those_of_analog_linear_layers(options: dict[str, bool]) -> None:
    net = Net(**options)
    ours = analog(everything(), net).experts
    theirs = LinearExperts(net.experts, everything())
    for scale in (1.0, 0.5, 0.7):  # two batches for the start-up of the ranges, then one with ranges that learn
        index, weights = ROUTES, torch.linspace(0.2, 0.9, ROUTES.numel()).view_as(ROUTES).requires_grad_()
        results = []
        for experts in (ours, theirs):
            experts.zero_grad()
            x = (X * scale).requires_grad_()
            y = experts(x, index, weights)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, weights), retain_graph=True)))
            y.square().sum().backward()
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    for stack, tiles in ours.tiles.items():
        stacked = getattr(ours, stack).grad
        for expert, tile in enumerate(tiles):
            layer = theirs.layers[f"{stack}_{expert}"]
            grad = stacked[expert].T if net.experts.is_transposed else stacked[expert]
            torch.testing.assert_close(grad, torch.zeros_like(grad) if layer.weight.grad is None else layer.weight.grad)
            for name in ("input_range", "learnable_weight_clip"):
                torch.testing.assert_close(getattr(tile, name), getattr(layer, name))
                assert (getattr(tile, name).grad is None) == (expert == 2) == (getattr(layer, name).grad is None)
                if expert != 2:
                    torch.testing.assert_close(getattr(tile, name).grad, getattr(layer, name).grad)


def test_an_expert_without_rows_leaves_its_ranges_alone_and_starts_up_later() -> None:
    model = analog(everything())
    dead = model.experts.tiles["gate_up_proj"][2]
    for _ in range(5):
        model(X)
    assert dead.input_range_update_idx.eq(0).all()
    assert dead.input_range.eq(dead.rpu_config.pre_post.input_range.init_value).all()
    model(X[:2], torch.tensor([[2, 0], [2, 1]]))
    assert dead.input_range_update_idx.eq(1).all()
    assert not dead.input_range.eq(dead.rpu_config.pre_post.input_range.init_value).any()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_stacked_parameters_may_be_computed() -> None:
    """Adapters of experts (PEFT's ``target_parameters``) are parametrizations."""
    net = analog(TorchInferenceRPUConfig())
    expected = copy.deepcopy(net)
    with torch.no_grad():
        expected.experts.down_proj.mul_(2)
    torch.nn.utils.parametrize.register_parametrization(net.experts, "down_proj", Doubled())
    torch.testing.assert_close(net(X), expected(X))
    net(X).sum().backward()
    assert net.experts.parametrizations.down_proj.original.grad.abs().sum() > 0


def test_stacked_biases_do_not_decay() -> None:
    net = analog(TorchInferenceRPUConfig(), bias=True)
    decayed, others = parameter_groups(net, 0.1)
    stacked = {id(p) for name, p in net.named_parameters() if name.endswith("bias")}
    assert stacked
    assert stacked.isdisjoint(map(id, decayed["params"]))
    assert stacked <= set(map(id, others["params"]))


def test_indices_that_are_no_experts_count_for_nothing_and_no_rows_give_none() -> None:
    net = Net()
    model = analog(net=net)
    index = ROUTES.clone()
    index[::2, 0] = E  # as expert parallelism marks what other ranks compute
    torch.testing.assert_close(model(X, index), net(X, index))
    assert model(X, torch.full_like(ROUTES, E)).eq(0).all()
    assert model(X[:0]).shape == (0, H)
    with pytest.raises(TypeError, match="top_k_index, top_k_weights"):
        model.experts(X)


@pytest.mark.parametrize("copied", [copy.deepcopy, "pickle"])
def test_experts_can_be_copied_and_pickled(copied: Any) -> None:
    model = analog(everything())
    model(X)
    if copied == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        again = copied(model)
    with torch.no_grad():
        again.experts.gate_up_proj.mul_(2)
        assert torch.equal(again.experts.tiles["gate_up_proj"][1].weight, again.experts.gate_up_proj[1])
        assert not torch.equal(again.eval()(X), model.eval()(X))
        again.experts.gate_up_proj.div_(2)
        assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("inplace", [True, False])
def test_there_and_back_the_parameters_stay(inplace: bool) -> None:
    net = Net(transposed=True, bias=True)
    before, output = dict(net.named_parameters()), net(X)
    model = convert_to_analog(net, everything(), conversion_map=MAP, inplace=inplace)
    assert isinstance(model.experts, Experts)
    assert {name for name, _ in model.named_parameters()} > before.keys()
    assert all((parameter is before[name]) == inplace for name, parameter in model.named_parameters() if name in before)
    digital = convert_to_digital(model, conversion_set={AnalogExperts})
    assert type(digital.experts) is Experts
    assert list(digital.state_dict()) == list(before)
    assert torch.equal(digital(X), output)


def test_a_summary_counts_experts_and_a_warning_names_those_of_other_kinds() -> None:
    assert analog_summary(analog()).share == 1
    with pytest.warns(
        UserWarning, match=r"0.0 % of 360 weights are on tiles. experts: Experts computes with its own gate_up"
    ):
        convert_to_analog(Net(), TorchInferenceRPUConfig())


def unclear() -> nn.Module:
    net = Net(gated=False)
    del net.experts.is_transposed
    return net


def flat() -> nn.Module:
    net = Net()
    net.experts.down_proj = nn.Parameter(torch.randn(H, INNER))
    return net


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (unclear, "leave open which dimension counts inputs.*set module.is_transposed"),
        (flat, "down_proj of Experts is torch.float32 of shape .6, 5.; .* of shape .E, N, K.,"),
    ],
)
def test_parameters_that_do_not_fit_stay_digital_with_the_reason(make: Any, why: str) -> None:
    net = make()
    with pytest.warns(UserWarning, match=why):
        model = convert_to_analog(net, TorchInferenceRPUConfig(), conversion_map=MAP, inplace=True)
    assert type(model.experts) is Experts
    with pytest.raises(ValueError, match=why):
        AnalogExperts.from_digital(net.experts, TorchInferenceRPUConfig())


def test_a_gate_of_the_class_itself_is_used() -> None:
    class Own(Experts):
        def _apply_gate(self, hidden: Tensor) -> Tensor:
            return hidden[..., ::2].clamp(max=0.3) * (hidden[..., 1::2] + 1)

    experts = AnalogExperts.from_digital(Own(), TorchInferenceRPUConfig())
    weights = torch.ones(7, 1)
    hidden = experts._apply_gate(X @ experts.gate_up_proj[3].T)
    torch.testing.assert_close(experts(X, torch.full((7, 1), 3), weights), hidden @ experts.down_proj[3].T)


# ---- Training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [WeightClipType.LAYER_GAUSSIAN, WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL])
@pytest.mark.parametrize("how", ["AnalogOptimizer", "attach", "master", "model.clip_weights"])
@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_is_clipped_by_its_own_deviation(kind: WeightClipType, how: str, transposed: bool) -> None:
    model = analog(clipped(kind), transposed=transposed)
    stacks = [model.experts.gate_up_proj, model.experts.down_proj]
    with torch.no_grad():
        for stack in stacks:
            stack *= torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(E, 1, 1)
    expected = []
    for stack in stacks:
        sigma = stack.detach().std(
            (1, 2) if kind is WeightClipType.LAYER_GAUSSIAN else 1 if transposed else 2, keepdim=True
        )
        expected.append(stack.detach().clamp(-sigma, sigma))
    for stack in stacks:
        stack.grad = torch.zeros_like(stack)
    if how == "AnalogOptimizer":
        AnalogOptimizer(torch.optim.SGD, model.analog_layers, model.parameters(), lr=0.1).step()
    elif how == "model.clip_weights":
        model.clip_weights()
    else:
        copies = [nn.Parameter(stack.detach().double()) for stack in stacks] if how == "master" else stacks
        for own in copies:
            own.grad = torch.zeros_like(own)
        optimizer = torch.optim.SGD(copies, lr=0.1)
        attach(model, optimizer, dict(zip(stacks, copies, strict=True)) if how == "master" else None)
        optimizer.step()
    for stack, wanted in zip(stacks, expected, strict=True):
        torch.testing.assert_close(stack.detach(), wanted)


def test_noise_that_lasts_is_each_experts_own_and_is_drawn_anew_after_a_step() -> None:
    config = TorchInferenceRPUConfig()
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.3
    config.modifier.refresh = WeightNoiseRefresh.STEP
    model = analog(config)
    optimizer = AnalogOptimizer(torch.optim.SGD, model.analog_layers, model.parameters(), lr=0.0)
    first = model(X)
    assert torch.equal(model(X), first)
    first.sum().backward()
    optimizer.step()
    assert not torch.equal(model(X), first)
    seeds = {int(layer.weight_noise_seed) for layer in model.analog_layers()}
    assert len(seeds) == 2 * E


def test_experts_whose_weights_are_read_instead_are_named() -> None:
    model = analog()
    model.forward = lambda x: (x @ model.experts.gate_up_proj.sum(0).T) @ model.experts.gate_up_proj.sum(0)
    with pytest.warns(UserWarning, match="without ever being called: experts. Their parents read the weights"):
        model(X).sum().backward()


def test_quantizing_replaces_each_experts_weight() -> None:
    config = TorchInferenceRPUConfig()
    config.modifier.quantization_type, config.modifier.res = WeightQuantizationType.DISCRETIZE, 2**3 - 2
    model = analog(config, transposed=True)
    with torch.no_grad():
        expected = model.eval()(X)
        model.quantize_weights()
        torch.testing.assert_close(model(X), expected)
    assert all(len(weight.unique()) <= 7 for weight in model.experts.gate_up_proj)
    assert len(model.experts.gate_up_proj.unique()) > 7


def test_calibration_sets_the_ranges_of_each_expert_and_names_those_without_data() -> None:
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 3
    model = analog(config).eval()
    with pytest.warns(
        UserWarning, match=r"left 2 analog layer\(s\) as they were: experts.tiles.gate_up_proj.2, .* No data"
    ):
        calibrate_input_ranges(model, InputRangeCalibrationType.MAX, [X], verbose=False)
    for expert, tile in enumerate(model.experts.tiles["gate_up_proj"]):
        rows = X[(ROUTES == expert).any(1)]
        if expert == 2:
            assert tile.input_range is None
        else:
            torch.testing.assert_close(tile.input_range.detach(), rows.abs().view(-1, 2, 3).amax((0, 2)))


# ---- Saving -----------------------------------------------------------------------------------------------------------


def test_the_state_dict_has_the_digital_keys_and_stacks_what_belongs_to_them() -> None:
    net = Net(bias=True)
    model = analog(everything(), net)
    state = model.state_dict()
    digital = net.state_dict()
    assert {name: state[name].shape for name in digital} == {name: value.shape for name, value in digital.items()}
    assert state["experts.input_range_gate_up_proj"].shape == (E, 2)
    assert state["experts.learnable_weight_clip_down_proj"].shape == (E, 2, H)
    assert state["experts._extra_state_down_proj"].ndim == 1
    assert not any(re.search(r"tiles", key) for key in state)


def test_checkpoints_load_into_a_model_converted_alike_and_restore_one() -> None:
    model = analog(everything())
    model(X)
    own = everything()
    own.forward.out_bound = 9.0
    model.experts.tiles["down_proj"][1].reconfigure(own)
    state = copy.deepcopy(model.state_dict())
    for again in (analog(everything()), restored(state)):
        again.load_state_dict(state)
        assert again.experts.tiles["down_proj"][1].rpu_config.forward.out_bound == 9.0
        with torch.no_grad():
            assert torch.equal(again.eval()(X), model.eval()(X))


def restored(state: Any) -> Any:
    net = Net()
    net.experts.has_bias = False  # the interface of transformers, by which restoring knows experts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experts.forward, "__wrapped__", Experts.forward, raising=False)
        patch.setattr(
            Experts, "_apply_gate", lambda self, h: self.act_fn(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1], raising=False
        )
        return restore_analog(net, state)


def test_a_digital_checkpoint_loads_and_learned_clips_start_from_it() -> None:
    model, net = analog(everything()), Net()
    with torch.no_grad():
        net.experts.gate_up_proj.mul_(3)
    missing, unexpected = model.load_state_dict(net.state_dict(), strict=False)
    assert unexpected == []
    assert all("tiles" in key for key in missing)
    tile = model.experts.tiles["gate_up_proj"][1]
    torch.testing.assert_close(tile.learnable_weight_clip.amax(0), net.experts.gate_up_proj[1].abs().amax(1))


def test_a_wrong_file_or_config_is_refused() -> None:
    model = analog(everything())
    other = everything()
    other.mapping.max_input_size = 2
    with pytest.raises(RuntimeError, match="max_input_size"):
        model.load_state_dict(analog(other).state_dict())
    with pytest.raises(ConfigError, match="rpu_config"):
        AnalogExperts.from_digital(Experts(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", LAYOUTS[:3])
def test_exported_experts_compute_the_same(options: dict[str, bool], aihwkit: Any) -> None:
    config = everything()
    config.clip.type = WeightClipType.NONE
    model = analog(config, **options)
    model(X)
    exported = export_to_aihwkit(model.eval())
    layer = exported.experts.tiles["down_proj"][1]
    assert isinstance(layer, aihwkit.nn.AnalogLinear)
    assert not any("_proj" in name for name, _ in exported.named_parameters() if "tiles" not in name)
    with torch.no_grad():
        torch.testing.assert_close(exported(X), model(X), atol=1e-4, rtol=1e-4)
