"""AnalogLinear: a drop-in ``nn.Linear``, what it holds, how its ranges start up, and how its state and config travel."""

from __future__ import annotations

import copy
import io
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from triton_analog import reference
from triton_analog.config import (
    ConfigError,
    SavedInput,
    TorchInferenceRPUConfig,
    WeightClipType,
    WeightNoiseInjectionType,
    WeightQuantizationType,
)
from triton_analog.nn import AnalogLinear, AnalogSequential, range_startup


def ideal() -> TorchInferenceRPUConfig:
    return TorchInferenceRPUConfig()


def ranged(**values: Any) -> TorchInferenceRPUConfig:
    """A stored input range; ``values`` are further fields of it."""
    config = TorchInferenceRPUConfig()
    config.pre_post.input_range.enable = True
    for name, value in values.items():
        setattr(config.pre_post.input_range, name, value)
    return config


def learned_clip(res: float = 0.0) -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    if res:
        config.modifier.res = res
        config.modifier.quantization_type = WeightQuantizationType.DISCRETIZE_PER_CHANNEL
    return config


def everything() -> TorchInferenceRPUConfig:
    """Three slices of 40 inputs, converters, both noises, a learned range and a learned clip with quantization."""
    config = learned_clip(res=254)
    config.pre_post = ranged().pre_post
    config.mapping.max_input_size = 16
    config.forward.inp_res = config.forward.out_res = 254
    config.forward.out_bound, config.forward.out_noise = 10.0, 0.02
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, 0.02
    return config


def tiled(config: TorchInferenceRPUConfig, max_input_size: int = 16) -> TorchInferenceRPUConfig:
    config.mapping.max_input_size = max_input_size
    return config


# ---- A drop-in nn.Linear ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (5, 40), (2, 3, 4, 40), (0, 40)])
def test_the_default_config_computes_what_torch_does(shape: tuple[int, ...], bias: bool) -> None:
    layer = AnalogLinear(40, 8, bias=bias, rpu_config=tiled(ideal()))
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


def test_it_is_an_nn_linear_with_its_names() -> None:
    layer = AnalogLinear(40, 8, rpu_config=ideal())
    assert isinstance(layer, nn.Linear)
    assert set(layer.state_dict()) == {"weight", "bias", "_extra_state"}
    assert layer(input=torch.randn(2, 40)).shape == (2, 8)


def test_fresh_weights_are_those_of_torch() -> None:
    torch.manual_seed(3)
    layer = AnalogLinear(40, 8, rpu_config=everything())
    torch.manual_seed(3)
    assert torch.equal(layer.weight, nn.Linear(40, 8).weight)


@pytest.mark.parametrize(("given", "shown"), [(None, "nothing"), (TorchInferenceRPUConfig, "class"), ({}, "{}")])
def test_a_missing_config_is_an_error(given: Any, shown: str) -> None:
    with pytest.raises(ConfigError, match=rf"rpu_config: got .*{shown}.*; pass a config object"):
        AnalogLinear(4, 2, rpu_config=given)


def test_an_invalid_config_fails_at_construction() -> None:
    config = ideal()
    config.forward.inp_res = 254
    with pytest.raises(ConfigError, match=r"forward\.inp_res"):
        AnalogLinear(4, 2, rpu_config=config)


@pytest.mark.parametrize(("sizes", "name"), [((0, 4), "in_features"), ((4, 0), "out_features")])
def test_a_layer_of_nothing_is_an_error(sizes: tuple[int, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 0"):
        AnalogLinear(*sizes, rpu_config=ideal())


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_an_input_kept_as_int8_gives_the_same_gradients(dynamic: bool) -> None:
    config = everything()
    config.pre_post.input_range.dynamic = dynamic
    full = AnalogLinear(40, 8, rpu_config=config)
    config.forward.save_input = SavedInput.INT8
    int8 = AnalogLinear(40, 8, rpu_config=config)
    int8.load_state_dict({**full.state_dict(), "_extra_state": int8.get_extra_state()})
    x, gradients = torch.randn(6, 40) * 2, []
    for layer in (full, int8):
        torch.manual_seed(0)
        inputs = x.clone().requires_grad_()
        layer(inputs).square().sum().backward()
        gradients.append([inputs.grad, *(parameter.grad for parameter in layer.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_layers_do_not_share_their_config() -> None:
    config = learned_clip(res=254)
    first, second = (AnalogLinear(4, 2, rpu_config=config) for _ in range(2))
    first.quantize_weights()
    assert second.rpu_config == config == learned_clip(res=254)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_trains(dtype: torch.dtype) -> None:
    layer = AnalogLinear(40, 8, dtype=dtype, rpu_config=everything())
    y = layer(torch.randn(6, 40, dtype=dtype))
    y.float().square().sum().backward()
    assert y.dtype == dtype
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == dtype
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_autocast_gives_the_dtype_of_autocast() -> None:
    layer = AnalogLinear(40, 8, rpu_config=everything())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(6, 40))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_a_printed_layer_is_short_and_its_config_says_what_it_simulates() -> None:
    layer = AnalogLinear(40, 8, rpu_config=everything())
    count = len(layer.rpu_config.changes())
    shape = "in_features=40, out_features=8, bias=True, slices=[14, 13, 13]"
    assert repr(layer) == f"AnalogLinear({shape}, rpu_config: {count} settings)"
    lines = str(layer.rpu_config).splitlines()
    assert lines[0] == "TorchInferenceRPUConfig, different from the defaults:"
    assert len(lines) == 1 + count
    assert "    forward.inp_res=254" in lines
    assert "    clip.type=LEARNABLE_PER_CHANNEL" in lines
    assert str(TorchInferenceRPUConfig()) == "TorchInferenceRPUConfig, all defaults"
    assert "init_value" in repr(layer.rpu_config)  # a default: all of it on request


def test_a_printed_model_says_once_what_its_layers_share_and_of_each_what_differs() -> None:
    model = AnalogSequential(*(AnalogLinear(40, 8, rpu_config=everything()) for _ in range(3)), AnalogSequential())
    model[3].append(AnalogLinear(40, 8, rpu_config=everything()))
    text = repr(model)
    assert text.count("forward.inp_res=254") == 1
    assert text.splitlines()[-1].startswith("rpu_config of all 4 analog layers: forward.inp_res=254, ")
    assert "  (1): AnalogLinear(in_features=40, out_features=8, bias=True, slices=[14, 13, 13])" in text
    model[1].rpu_config.forward.inp_res = -1
    lines = repr(model).splitlines()
    assert lines[2].endswith("slices=[14, 13, 13], rpu_config: forward.inp_res=-1)")
    assert lines[-1].startswith("rpu_config of 3 of 4 analog layers: ")
    assert repr(model[1]).endswith("settings)")
    assert repr(AnalogSequential(nn.ReLU())).endswith("(0): ReLU()\n)")


# ---- Parameters and buffers -------------------------------------------------------------------------------------------


def test_a_stored_range_is_a_parameter_with_an_integer_counter() -> None:
    layer = AnalogLinear(40, 8, dtype=torch.bfloat16, rpu_config=tiled(ranged(init_value=2.0)))
    assert torch.equal(layer.input_range, torch.full((3,), 2.0, dtype=torch.bfloat16))
    assert isinstance(layer.input_range, nn.Parameter)
    assert dict(layer.named_buffers()).keys() == {
        *("input_range_update_idx", "x_min", "x_max", "input_range_residual", "input_range_shift"),
        "input_range_shift_rest",
    }
    assert "input_range_residual" not in layer.state_dict()
    assert not layer.input_range_update_idx.is_floating_point()


@pytest.mark.parametrize("config", [ideal(), ranged(dynamic=True)], ids=["off", "dynamic"])
def test_no_other_range_is_stored(config: TorchInferenceRPUConfig) -> None:
    layer = AnalogLinear(40, 8, rpu_config=config)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert not list(layer.buffers())


def test_a_range_that_is_not_learned_takes_no_gradient() -> None:
    assert not AnalogLinear(4, 2, rpu_config=ranged(learn_input_range=False)).input_range.requires_grad


def test_a_learned_clip_starts_at_the_largest_weights() -> None:
    layer = AnalogLinear(40, 8, rpu_config=tiled(learned_clip()))
    assert layer.learnable_weight_clip.shape == (3, 8)
    assert torch.equal(layer.learnable_weight_clip, reference.absmax(layer.weight.detach(), 3))


def test_slices_are_nearly_equal() -> None:
    assert (
        AnalogLinear(257, 2, rpu_config=tiled(ranged(), 128)).get_split_sizes()
        == reference.split_sizes(257, 128)
        == [86, 86, 85]
    )


def test_reset_parameters_also_resets_ranges_and_clip_after_to_empty() -> None:
    with torch.device("meta"):
        layer = AnalogLinear(40, 8, rpu_config=everything())
    layer.to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(77)
    layer.reset_parameters()
    assert layer.weight.abs().max() < 1
    assert torch.equal(layer.input_range, torch.full((3,), 3.0))
    assert torch.equal(layer.learnable_weight_clip, reference.absmax(layer.weight.detach(), 3))
    for buffer in layer.buffers():
        assert torch.equal(buffer, torch.zeros_like(buffer))


# ---- The start-up of input ranges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [True, False])
def test_the_first_training_batches_set_the_range_before_it_is_used(learned: bool) -> None:
    config = tiled(ranged(init_from_data=2, init_std_alpha=2.5, learn_input_range=learned))
    layer = AnalogLinear(40, 8, rpu_config=config)
    batches = [torch.randn(2, 5, 40) * scale for scale in (1, 4, 9)]
    stds = [reference.std(x.reshape(-1, 40), 3) for x in batches]
    for x, expected in zip(batches, [stds[0], (stds[0] + stds[1]) / 2, (stds[0] + stds[1]) / 2], strict=True):
        y = layer(x)
        torch.testing.assert_close(layer.input_range.detach(), 2.5 * expected)
        clamped = [
            part.clamp(-r, r) for part, r in zip(x.split(layer.get_split_sizes(), -1), 2.5 * expected, strict=True)
        ]
        expected_y = nn.functional.linear(torch.cat(clamped, -1), layer.weight, layer.bias)
        torch.testing.assert_close(y, expected_y, atol=1e-4, rtol=1e-4)
    assert layer.input_range_update_idx.tolist() == [2, 2, 2]


def test_evaluation_leaves_the_range_alone() -> None:
    layer = AnalogLinear(40, 8, rpu_config=ranged()).eval()
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(5, 40))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_no_start_up_is_possible() -> None:
    layer = AnalogLinear(40, 8, rpu_config=ranged(init_from_data=0))
    layer(torch.randn(5, 40))
    assert layer.input_range.item() == 3.0


def test_fast_mode_tracks_extreme_values() -> None:
    layer = AnalogLinear(40, 8, rpu_config=tiled(ranged(fast_mode=True, act_range_momentum=-1)))
    batches = [torch.randn(5, 40) for _ in range(3)]
    for x in batches:
        layer(x)
    torch.testing.assert_close(layer.input_range.detach(), reference.absmax(torch.cat(batches), 3).amax(1))
    parts = torch.cat(batches).split(layer.get_split_sizes(), -1)
    torch.testing.assert_close(layer.x_min, torch.stack([part.min() for part in parts]))


def test_a_start_up_of_500_batches_ends_in_bfloat16() -> None:
    layer = AnalogLinear(4, 2, dtype=torch.bfloat16, rpu_config=ranged(init_from_data=500))
    layer.input_range_update_idx.fill_(255)
    for _ in range(246):
        layer(torch.randn(3, 4, dtype=torch.bfloat16))
    assert layer.input_range_update_idx.item() == 500


def test_a_start_up_in_bfloat16_ends_where_that_in_float32_does() -> None:
    config = ranged(init_from_data=500)
    narrow, wide = (AnalogLinear(4, 2, dtype=dtype, rpu_config=config) for dtype in (torch.bfloat16, torch.float32))
    for step in range(500):
        x = torch.randn(16, 4, dtype=torch.bfloat16) * (1 if step < 250 else 1.5)
        with torch.no_grad():
            narrow(x)
            wide(x.float())
    ulp = 2.0**-7 * 2  # between 2 and 4
    assert 3 < wide.input_range.item() < 4
    assert abs(narrow.input_range.item() - wide.input_range.item()) <= ulp


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(3, 39), ValueError, r"x: got shape \(3, 39\)"),
        (torch.randn(3, 40, dtype=torch.float64), TypeError, "x: dtype torch.float64"),
        (torch.ones(3, 40, dtype=torch.int64), TypeError, "x: got dtype torch.int64"),
        (torch.tensor(1.0), ValueError, "x: a single number"),
    ],
    ids=["features", "dtype", "integers", "number"],
)
def test_a_refused_call_changes_nothing(x: Tensor, error: Any, message: str) -> None:
    layer = AnalogLinear(40, 8, rpu_config=everything())
    layer(torch.randn(5, 40))
    before = copy.deepcopy([*layer.parameters(), *layer.buffers()])
    with pytest.raises(error, match=message):
        layer(x)
    assert all(map(torch.equal, before, [*layer.parameters(), *layer.buffers()]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_a_batch_once(reentrant: bool) -> None:
    layer = AnalogLinear(40, 8, rpu_config=everything())
    twin = copy.deepcopy(layer)
    x = torch.randn(5, 40, requires_grad=True)
    torch.manual_seed(1)
    twin(x).square().sum().backward()
    torch.manual_seed(1)
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert layer.input_range_update_idx.tolist() == [1, 1, 1]
    assert torch.equal(layer.input_range, twin.input_range)
    for own, other in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def learned_batches(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of all coming updates of a range, and so a count of their launches."""
    inputs: list[Tensor] = []
    update = range_startup.update_input_range
    monkeypatch.setattr(
        range_startup, "update_input_range", lambda x, *args, **kwargs: (inputs.append(x), update(x, *args, **kwargs))
    )
    return inputs


@pytest.mark.parametrize("checkpointed", [None, False, True], ids=["plain", "checkpoint", "reentrant checkpoint"])
def test_two_forwards_in_the_start_up_before_one_backward(checkpointed: bool | None) -> None:
    layer = AnalogLinear(40, 8, rpu_config=tiled(ranged(init_from_data=3, decay=0.0)))
    x = (torch.randn(4, 5, 40) * torch.tensor([1.0, 4.0, 2.0, 3.0])[:, None, None]).requires_grad_()
    ranges, outputs = [], []
    for part in x:
        run = layer if checkpointed is None else lambda x: checkpoint(layer, x, use_reentrant=checkpointed)
        outputs.append(run(part))
        ranges.append(layer.input_range.detach().repeat_interleave(torch.tensor(layer.get_split_sizes())))
    torch.stack(outputs).sum().backward()
    assert layer.input_range_update_idx.tolist() == [3, 3, 3]
    if checkpointed is not None:  # recomputed with the range as it is by then
        ranges = ranges[-1:] * 4
    inside = x.detach().abs() <= torch.stack(ranges)[:, None]
    torch.testing.assert_close(x.grad, inside * layer.weight.detach().sum(0))
    assert layer.input_range.grad.isfinite().all()


def test_a_start_up_launches_nothing_once_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = AnalogLinear(40, 8, rpu_config=tiled(ranged(init_from_data=3)))
    inputs = learned_batches(monkeypatch)
    layer(torch.randn(0, 40))  # an empty batch does not count
    for repeat in range(6):
        checkpoint(layer, torch.randn(5, 40), use_reentrant=False).sum().backward()
        assert layer._forwards_seen == min(repeat + 1, 3)
    assert len(inputs) == 1 + 3
    layer.rpu_config.pre_post.input_range.init_from_data = 5  # goes on where it stopped
    for _ in range(4):
        layer(torch.randn(5, 40))
    assert len(inputs) == 1 + 5
    assert layer.input_range_update_idx.tolist() == [5, 5, 5]
    layer.reset_analog_state()
    layer(torch.randn(5, 40))
    assert layer.input_range_update_idx.tolist() == [1, 1, 1]


def test_a_slice_without_deviation_does_not_keep_the_start_up_going(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = AnalogLinear(40, 8, rpu_config=tiled(ranged(init_from_data=2)))
    inputs, x = learned_batches(monkeypatch), torch.randn(5, 40)
    first = x.clone()
    first[:, :14] = 0
    for batch in (first, x, x):
        layer(batch)
    assert len(inputs) == 2
    assert layer.input_range_update_idx.tolist() == [1, 2, 2]


@pytest.mark.parametrize("assign", [True, False])
def test_a_loaded_start_up_goes_on_where_its_slowest_slice_was(assign: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    state = AnalogLinear(40, 8, rpu_config=tiled(ranged(init_from_data=5))).state_dict()
    state["input_range_update_idx"] = torch.tensor([5, 3, 4])
    layer = AnalogLinear(40, 8, device="meta" if assign else None, rpu_config=tiled(ranged(init_from_data=5)))
    layer.load_state_dict(state, assign=assign)
    for copied in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        inputs = learned_batches(monkeypatch)
        for _ in range(4):
            copied(torch.randn(5, 40))
        assert len(inputs) == 2
        assert copied.input_range_update_idx.tolist() == [5, 5, 5]


def test_a_state_dict_without_a_counter_leaves_the_count_alone() -> None:
    layer = AnalogLinear(40, 8, rpu_config=tiled(ranged(init_from_data=2)))
    layer(torch.randn(5, 40))
    layer.load_state_dict(nn.Linear(40, 8).state_dict(), strict=False)
    assert layer._forwards_seen == 1


def _rank(rank: int, store: str, results: str) -> None:
    """Two processes with different data; what each ends with goes to a file."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(0)
    layer = AnalogLinear(40, 8, rpu_config=tiled(ranged(init_from_data=2)))
    local = AnalogLinear(40, 8, rpu_config=tiled(ranged(init_from_data=2)))
    local.process_group = None
    torch.manual_seed(rank)
    for _ in range(2):
        x = torch.randn(4 + rank, 40) * (1 + 3 * rank)
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        local(x)
    if rank == 0:  # the start-up is over: a forward by one rank alone must not wait for the other
        layer(x)
    torch.save([x, layer.state_dict(), local.state_dict(), layer._forwards_seen], f"{results}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_data_parallel_ranks_agree_on_the_range_of_the_global_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    (_, state, local, _), (_, other_state, other_local, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(state["input_range"], other_state["input_range"])
    assert state["input_range_update_idx"].tolist() == other_state["input_range_update_idx"].tolist() == [2, 2, 2]
    assert (local["input_range"] < other_local["input_range"]).all()  # process_group = None: each rank for itself
    batches = [[], []]  # type: list[list[Tensor]]
    for rank in (0, 1):
        torch.manual_seed(rank)
        for step in (0, 1):
            batches[step].append(torch.randn(4 + rank, 40) * (1 + 3 * rank))
    expected = sum(3 * reference.std(torch.cat(batch), 3) for batch in batches) / 2
    torch.testing.assert_close(state["input_range"], expected)


# ---- What the optimizer may do to the learned numbers -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["input_range", "learnable_weight_clip"])
def test_a_negative_learned_number_counts_by_its_magnitude(name: str) -> None:
    config = everything()
    config.pre_post.input_range.init_from_data = 0
    layer, x = AnalogLinear(40, 8, rpu_config=config).eval(), torch.randn(5, 40)
    before = layer(x)
    with torch.no_grad():
        getattr(layer, name).neg_()
    assert torch.equal(layer(x), before)


def test_ranges_of_different_slices_get_different_gradients() -> None:
    layer = AnalogLinear(40, 8, rpu_config=tiled(ranged(init_from_data=0, init_value=0.5, decay=0.0)))
    layer(torch.randn(50, 40)).square().sum().backward()
    assert layer.input_range.grad.unique().numel() == 3


@pytest.mark.parametrize("training", [True, False])
def test_the_stored_weight_is_never_changed_by_a_forward(training: bool) -> None:
    layer = AnalogLinear(40, 8, rpu_config=everything()).train(training)
    before, version = layer.weight.clone(), layer.weight._version
    for _ in range(3):
        layer(torch.randn(5, 40)).sum().backward()
    assert torch.equal(layer.weight, before)
    assert layer.weight._version == version


def test_noise_is_drawn_in_training_only() -> None:
    layer, x = AnalogLinear(40, 8, rpu_config=everything()), torch.randn(5, 40)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# ---- Weights --------------------------------------------------------------------------------------------------------------


def gaussian(kind: WeightClipType, sigma: float = 1.5) -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.clip.type, config.clip.sigma = kind, sigma
    return config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_gaussian_clip_clamps_to_unbiased_deviations(per_channel: bool, dtype: torch.dtype) -> None:
    kind = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL if per_channel else WeightClipType.LAYER_GAUSSIAN
    layer = AnalogLinear(40, 8, dtype=dtype, rpu_config=tiled(gaussian(kind)))
    layer.set_weights(torch.randn(8, 40) * torch.arange(1, 9)[:, None])
    wide = layer.weight.detach().double()
    bound = 1.5 * (wide.std(dim=1, keepdim=True) if per_channel else wide.std())
    assert (wide.abs() > bound).any()
    layer.clip_weights()
    torch.testing.assert_close(layer.weight.detach(), wide.clamp(-bound, bound).to(dtype))
    assert layer.weight.grad_fn is None


def test_a_weight_computed_after_construction_cannot_be_changed() -> None:
    layer = parametrize.register_parametrization(
        AnalogLinear(40, 8, rpu_config=gaussian(WeightClipType.LAYER_GAUSSIAN)), "weight", nn.Tanh()
    )
    for change in (layer.clip_weights, layer.quantize_weights, lambda: layer.set_weights(torch.zeros(8, 40))):
        with pytest.raises(ValueError, match=r"weight: .* is not a parameter but computed from others"):
            change()


@pytest.mark.parametrize("config", [ideal(), learned_clip()], ids=["none", "learned"])
def test_other_clips_leave_the_stored_weight_alone(config: TorchInferenceRPUConfig) -> None:
    layer = AnalogLinear(40, 8, rpu_config=config)
    before = layer.weight.clone()
    layer.clip_weights()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(("shape", "per_channel"), [((1, 1), False), ((1, 5), True)])
def test_a_single_weight_has_no_deviation_to_be_clipped_to(shape: tuple[int, int], per_channel: bool) -> None:
    kind = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL if per_channel else WeightClipType.LAYER_GAUSSIAN
    layer = AnalogLinear(*shape, rpu_config=gaussian(kind))
    before = layer.weight.clone()
    layer.clip_weights()
    assert torch.equal(layer.weight, before)


def test_set_weights_restarts_the_learned_clip_in_place() -> None:
    layer = AnalogLinear(40, 8, rpu_config=tiled(learned_clip()))
    clip, weight = layer.learnable_weight_clip, layer.weight
    new = torch.randn(8, 40)
    layer.set_weights(new)
    assert layer.learnable_weight_clip is clip
    assert layer.weight is weight
    assert torch.equal(layer.weight, new)
    assert torch.equal(clip, reference.absmax(new, 3))


def test_weights_and_biases_go_in_and_out() -> None:
    layer = AnalogLinear(4, 2, rpu_config=ideal())
    weight, bias = torch.randn(2, 4), torch.randn(2)
    layer.set_weights_and_biases(weight, bias)
    out_weight, out_bias = layer.get_weights_and_biases()
    assert torch.equal(out_weight, weight)
    assert torch.equal(out_bias, bias)
    out_weight.zero_()
    assert torch.equal(layer.weight, weight)
    assert AnalogLinear(4, 2, bias=False, rpu_config=ideal()).get_weights_and_biases()[1] is None


def test_wrong_weights_are_named_and_change_nothing() -> None:
    layer = AnalogLinear(4, 2, rpu_config=ideal())
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=r"weight: got shape \(4, 2\); \(2, 4\) is needed"):
        layer.set_weights(torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"bias: got shape \(4,\); \(2,\) is needed"):
        layer.set_weights_and_biases(torch.randn(2, 4), torch.randn(4))
    with pytest.raises(ValueError, match=r"bias: given, but .* bias=False"):
        AnalogLinear(4, 2, bias=False, rpu_config=ideal()).set_weights_and_biases(torch.randn(2, 4), torch.randn(2))
    with pytest.raises(TypeError, match=r"weight: got list; a torch\.Tensor is needed"):
        layer.set_weights([[0.0] * 4] * 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bias: got float"):
        layer.set_weights_and_biases(torch.randn(2, 4), 1.0)  # type: ignore[arg-type]
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("clipped", [True, False])
def test_quantize_weights_bakes_the_quantized_weight_in(clipped: bool) -> None:
    config = tiled(learned_clip(res=30))
    if not clipped:
        config.clip.type = WeightClipType.NONE
    layer, x = AnalogLinear(40, 8, rpu_config=config).eval(), torch.randn(5, 40)
    if clipped:
        with torch.no_grad():
            layer.learnable_weight_clip.mul_(0.6)
    expected, _ = reference.weight(
        layer.weight.detach(), 3, clip=layer.learnable_weight_clip, quantization="per_channel", res=30
    )
    before = layer(x)
    layer.quantize_weights()
    torch.testing.assert_close(layer.weight.detach(), expected)
    torch.testing.assert_close(layer(x), before)
    assert layer.rpu_config.modifier.quantization_type is WeightQuantizationType.NONE
    assert layer.rpu_config.clip.type is WeightClipType.NONE
    assert "learnable_weight_clip" not in layer.state_dict()
    layer.quantize_weights()  # nothing is left to do
    torch.testing.assert_close(layer.weight.detach(), expected)


# ---- From and to torch ----------------------------------------------------------------------------------------------------


def test_from_digital_takes_over_the_very_parameters() -> None:
    digital = nn.Linear(40, 8, dtype=torch.bfloat16).eval()
    digital.weight.requires_grad_(False)
    layer = AnalogLinear.from_digital(digital, everything())
    assert layer.weight is digital.weight
    assert layer.bias is digital.bias
    assert not layer.weight.requires_grad
    assert not layer.training
    assert layer.input_range.dtype == torch.bfloat16
    assert torch.equal(layer.learnable_weight_clip, reference.absmax(layer.weight, 3).bfloat16())
    back = AnalogLinear.to_digital(layer)
    assert type(back) is nn.Linear
    assert back.weight is digital.weight
    assert back.bias is digital.bias
    assert not back.training


def test_from_digital_without_bias_and_back() -> None:
    layer = AnalogLinear.from_digital(nn.Linear(4, 2, bias=False), ideal())
    assert layer.bias is None
    assert AnalogLinear.to_digital(layer).bias is None


def test_from_digital_of_another_layer_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"module: got Conv1d; a torch\.nn\.Linear is needed"):
        AnalogLinear.from_digital(nn.Conv1d(4, 2, 1), ideal())  # type: ignore[arg-type]


def test_from_digital_draws_no_random_numbers() -> None:
    digital = nn.Linear(40, 8)
    state = torch.get_rng_state()
    AnalogLinear.from_digital(digital, everything())
    assert torch.equal(torch.get_rng_state(), state)


def test_from_digital_works_on_the_meta_device() -> None:
    layer = AnalogLinear.from_digital(nn.Linear(40, 8, device="meta"), everything())
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    assert layer.learnable_weight_clip.shape == (3, 8)


def test_move_to_meta_empties_only_the_digital_layer() -> None:
    digital = nn.Linear(4, 2)
    layer = AnalogLinear.from_digital(digital, ideal())
    AnalogLinear.move_to_meta(digital)
    assert digital.weight.is_meta
    assert layer.weight.device.type == "cpu"
    assert layer(torch.randn(3, 4)).isfinite().all()


# ---- State -----------------------------------------------------------------------------------------------------------------


def trained() -> AnalogLinear:
    layer = AnalogLinear(40, 8, rpu_config=everything())
    for _ in range(3):
        layer(torch.randn(5, 40) * 2)
    return layer


def test_a_state_dict_is_plain_tensors_that_the_safe_loader_takes() -> None:
    layer = trained()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(type(value) is Tensor and value.is_contiguous() for value in loaded.values())
    fresh = AnalogLinear(40, 8, rpu_config=everything())
    fresh.load_state_dict(loaded)
    for name, value in layer.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


def test_every_layer_of_a_nested_model_gets_its_own_config_back() -> None:
    configs = [ideal(), ranged(decay=0.5), ranged(dynamic=True)]

    def model(*configs: TorchInferenceRPUConfig) -> nn.Module:
        first, second, third = (AnalogLinear(4, 4, rpu_config=config) for config in configs)
        return nn.Sequential(first, nn.ModuleDict({"deep": nn.Sequential(second, nn.Sequential(third))}))

    target = model(ideal(), ranged(), ranged(dynamic=True, decay=0.25))
    target.load_state_dict(model(*configs).state_dict())
    layers = [module for module in target.modules() if isinstance(module, AnalogLinear)]
    assert [layer.rpu_config for layer in layers] == configs


@pytest.mark.parametrize("assign", [True, False])
def test_a_state_brings_the_parameters_its_config_needs(assign: bool) -> None:
    source = trained()
    plain = AnalogLinear(40, 8, rpu_config=tiled(ideal()))
    plain.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(plain.input_range, source.input_range)
    assert torch.equal(plain.input_range_update_idx, source.input_range_update_idx)
    x = torch.randn(5, 40)
    assert torch.equal(plain.eval()(x), source.eval()(x))
    source.quantize_weights()
    plain.load_state_dict(source.state_dict(), assign=assign)
    assert plain.learnable_weight_clip is None


def test_other_slices_are_refused_and_the_layer_is_left_alone() -> None:
    layer, other = trained(), AnalogLinear(40, 8, rpu_config=tiled(everything(), 20))
    before = copy.deepcopy(layer.state_dict())
    message = r"mapping.max_input_size: got 20, .* slices of \[20, 20\], but this layer has slices of \[14, 13, 13\]"
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(other.state_dict())
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    "state",
    [
        torch.tensor([1, 2, 3], dtype=torch.uint8),
        torch.tensor(list(b'{"forward": {"inp_res": 254}}'), dtype=torch.uint8),
        torch.tensor(list(b'{"backward": {}}'), dtype=torch.uint8),
        torch.tensor(list(b"[1]"), dtype=torch.uint8),
        {"inp_res": 254},
    ],
    ids=["no JSON", "invalid config", "unknown field", "no dictionary", "no tensor"],
)
def test_a_damaged_config_is_refused_and_the_layer_is_left_alone(state: Any) -> None:
    layer = trained()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="_extra_state: "):
        layer.load_state_dict({**AnalogLinear(40, 8, rpu_config=everything()).state_dict(), "_extra_state": state})
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_the_config_survives_a_cast_of_the_state_dict() -> None:
    halves = {name: value.half() for name, value in trained().state_dict().items()}
    layer = AnalogLinear(40, 8, dtype=torch.half, rpu_config=tiled(ideal()))
    layer.load_state_dict(halves)
    assert layer.rpu_config == everything()


def test_the_stored_config_always_has_the_same_size() -> None:
    config = everything()
    config.modifier.std_dev = 0.0123456789012345678
    sizes = {AnalogLinear(40, 8, rpu_config=c).get_extra_state().shape for c in (ideal(), everything(), config)}
    assert len(sizes) == 1


def test_a_torch_state_dict_loads_and_restarts_the_learned_clip() -> None:
    layer, digital = trained(), nn.Linear(40, 8)
    with torch.no_grad():
        digital.weight.mul_(20)
    result = layer.load_state_dict(digital.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert torch.equal(layer.weight, digital.weight)
    assert torch.equal(layer.learnable_weight_clip, reference.absmax(digital.weight.detach(), 3))
    assert layer.rpu_config == everything()


def test_a_torch_state_dict_loads_strictly_where_it_has_every_parameter() -> None:
    model, digital = nn.Sequential(AnalogLinear(40, 8, rpu_config=tiled(ideal()))), nn.Sequential(nn.Linear(40, 8))
    model.load_state_dict(digital.state_dict())
    assert torch.equal(model[0].weight, digital[0].weight)
    assert model[0].rpu_config == tiled(ideal())
    with pytest.raises(RuntimeError, match=r"Missing key.*input_range"):
        AnalogLinear(40, 8, rpu_config=ranged()).load_state_dict(nn.Linear(40, 8).state_dict())


def test_a_state_dict_of_the_predecessor_loads_strictly() -> None:
    layer = AnalogLinear(40, 8, rpu_config=everything())
    layer.input_range_residual.fill_(1)
    state = {
        "weight": torch.randn(8, 40),
        "bias": torch.randn(8),
        "input_range": torch.rand(3),
        "learnable_weight_clip": torch.rand(3, 8),
        "input_range_update_idx": torch.tensor([-torch.inf, 7.0, 0.0]),  # -inf marks a calibrated range
        "x_min": torch.zeros(3),
        "x_max": torch.zeros(3),
    }
    layer.load_state_dict(state)
    assert layer.rpu_config == everything()
    assert layer.input_range_update_idx.tolist() == [100, 7, 0]
    assert all(torch.equal(own, state[name]) for name, own in layer.named_parameters())
    assert not layer.input_range_residual.any()


def test_a_state_dict_fills_a_layer_without_memory() -> None:
    layer = AnalogLinear(40, 8, device="meta", rpu_config=everything())
    layer.load_state_dict(trained().state_dict(), assign=True)
    layer(torch.randn(5, 40)).sum().backward()
    assert layer.input_range_update_idx.tolist() == [4, 4, 4]


@pytest.mark.parametrize("wrong", ["wrold", "", 3, [0, 1]])
def test_a_process_group_that_is_none_is_an_error(wrong: Any) -> None:
    layer = AnalogLinear(4, 2, rpu_config=ranged())
    with pytest.raises(ValueError, match=r"process_group: got .*; allowed are 'world'"):
        layer.process_group = wrong
    assert layer.process_group == "world"


def test_copies_share_a_process_group_and_pickles_leave_it_behind(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = AnalogLinear(4, 2, rpu_config=ranged())
        layer.process_group = dist.new_group([0])
        assert copy.deepcopy(layer).process_group is layer.process_group
        assert pickle.loads(pickle.dumps(layer)).process_group == "world"
        layer.process_group = None
        assert pickle.loads(pickle.dumps(layer)).process_group is None
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_and_pickles_compute_the_same_and_are_independent(copied: Any) -> None:
    layer, x = trained().eval(), torch.randn(5, 40)
    other = copied(layer)
    assert torch.equal(other(x), layer(x))
    other.rpu_config.modifier.res = 6
    other.set_weights(torch.zeros(8, 40))
    assert layer.rpu_config == everything()
    assert layer.weight.any()


# ---- Changing the config of a layer ---------------------------------------------------------------------------------------


def test_numbers_may_change_between_forwards_and_are_checked() -> None:
    layer, x = AnalogLinear(40, 8, rpu_config=ranged(init_from_data=0)).eval(), torch.randn(5, 40)
    exact = layer(x)
    layer.rpu_config.forward.inp_res = 6
    assert not torch.allclose(layer(x), exact)
    layer.rpu_config.forward.out_res = 254
    with pytest.raises(ConfigError, match=r"forward\.out_res: got 254"):
        layer(x)


def test_a_compiled_layer_names_the_field_of_a_config_made_invalid_too() -> None:
    """One graph without breaks cannot raise it: then torch quotes it."""
    layer, x = AnalogLinear(40, 8, rpu_config=ranged(init_from_data=0)).eval(), torch.randn(5, 40)
    for options, error in (({}, ConfigError), ({"fullgraph": True}, torch._dynamo.exc.Unsupported)):
        torch._dynamo.reset()
        layer.rpu_config.forward.out_res = -1
        compiled = torch.compile(layer, backend="aot_eager", **options)
        compiled(x)
        layer.rpu_config.forward.out_res = 254
        with pytest.raises(error, match=r"forward\.out_res: got 254; .*forward\.out_bound"):
            compiled(x)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("config", "change"),
    [
        (ideal(), lambda config: setattr(config.pre_post.input_range, "enable", True)),
        (ranged(), lambda config: setattr(config.pre_post.input_range, "dynamic", True)),
        (ideal(), lambda config: setattr(config.clip, "type", WeightClipType.LEARNABLE_PER_CHANNEL)),
        (ranged(), lambda config: setattr(config.mapping, "max_input_size", 16)),
    ],
    ids=["enable", "dynamic", "learned clip", "slices"],
)
def test_changes_that_need_other_parameters_are_refused_by_the_forward(
    config: Any, change: Any, compiled: bool
) -> None:
    layer = AnalogLinear(40, 8, rpu_config=config)
    torch._dynamo.reset()
    forward = torch.compile(layer, backend="eager") if compiled else layer
    forward(torch.randn(5, 40))
    change(layer.rpu_config)
    with pytest.raises(ConfigError, match=r"the config was changed and now needs .* layer\.reconfigure"):
        forward(torch.randn(5, 40))


def test_reconfigure_adds_and_removes_parameters() -> None:
    layer, x = AnalogLinear(40, 8, rpu_config=tiled(ideal())), torch.randn(5, 40)
    weight = layer.weight
    layer.reconfigure(everything())
    assert layer.input_range.shape == (3,)
    assert layer.learnable_weight_clip.shape == (3, 8)
    layer(x).sum().backward()
    layer.reconfigure(tiled(ideal()))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert layer.weight is weight
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_reconfigure_switches_learning_of_the_range() -> None:
    layer = AnalogLinear(40, 8, rpu_config=ranged())
    layer.reconfigure(ranged(learn_input_range=False))
    assert not layer.input_range.requires_grad
    layer.reconfigure(ranged(learn_input_range=True))
    assert layer.input_range.requires_grad


def test_reconfigure_refuses_other_slices() -> None:
    layer = AnalogLinear(40, 8, rpu_config=tiled(ranged()))
    with pytest.raises(ConfigError, match=r"mapping\.max_input_size: got -1, .*build the layer"):
        layer.reconfigure(ranged())
    assert layer.rpu_config == tiled(ranged())


# ---- On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_training_step_never_waits_for_the_device() -> None:
    config = everything()
    config.clip.type, config.clip.sigma = WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, 2.5
    layers = [AnalogLinear(40, 8, device="cuda", rpu_config=config) for config in (config, everything())]
    x = torch.randn(5, 40, device="cuda")
    for repeat in range(2):  # compiling the kernels may wait
        torch.cuda.set_sync_debug_mode("error" if repeat else "default")
        try:
            for layer in layers:
                layer(x).square().sum().backward()
                layer.clip_weights()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(layer.input_range_update_idx.tolist() == [2, 2, 2] for layer in layers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_training_step_can_be_captured_in_a_graph() -> None:
    layer = AnalogLinear(40, 8, device="cuda", rpu_config=everything())
    x = torch.randn(5, 40, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x).square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.square().sum().backward()
        layer.clip_weights()
    outputs = []
    for _ in range(3):
        graph.replay()
        outputs.append(y.clone())
    assert layer.input_range_update_idx.tolist() == [4, 4, 4]
    assert not torch.equal(outputs[0], outputs[1])  # noise is drawn anew in every replay


# ---- Finding layers -----------------------------------------------------------------------------------------------------


def test_a_layer_lists_itself() -> None:
    layer = AnalogLinear(4, 2, rpu_config=ideal())
    assert list(layer.named_analog_layers()) == [("", layer)]
    assert list(layer.analog_layers()) == [layer]


def test_a_container_lists_each_layer_once_and_acts_on_all() -> None:
    shared = AnalogLinear(4, 4, rpu_config=learned_clip(res=30))
    model = AnalogSequential(shared, nn.ReLU(), AnalogSequential(AnalogLinear(4, 4, rpu_config=ideal())), shared)
    assert [name for name, _ in model.named_analog_layers()] == ["0", "2.0"]
    seen: list[nn.Module] = []
    assert model.apply_to_analog_layers(seen.append) is model
    assert seen == list(model.analog_layers())
    model.quantize_weights()
    assert shared.rpu_config.modifier.quantization_type is WeightQuantizationType.NONE


def tied(*configs: TorchInferenceRPUConfig) -> AnalogSequential:
    """Layers that share one weight."""
    layers = [AnalogLinear(40, 40, rpu_config=config) for config in configs]
    for layer in layers:
        layer.weight = layers[0].weight
    return AnalogSequential(*layers)


@pytest.mark.parametrize("sigmas", [(0.5, 0.5), (0.5, 0.7)], ids=["equal clips", "different clips"])
def test_a_shared_weight_is_clipped_once_for_equal_clips(sigmas: tuple[float, float]) -> None:
    model = tied(*(gaussian(WeightClipType.LAYER_GAUSSIAN, sigma) for sigma in sigmas))
    expected = model[0].weight.detach().clone()
    for sigma in dict.fromkeys(sigmas):
        bound = sigma * expected.std()
        expected.clamp_(-bound, bound)
    model.clip_weights()
    torch.testing.assert_close(model[0].weight.detach(), expected)


@pytest.mark.parametrize("widths", [(16, 16), (16, 20)], ids=["equal slices", "different slices"])
def test_a_shared_weight_is_quantized_once_for_equal_slices(widths: tuple[int, int]) -> None:
    config = ideal()
    config.modifier.res, config.modifier.quantization_type = 15, WeightQuantizationType.DISCRETIZE
    model = tied(*(tiled(copy.deepcopy(config), width) for width in widths))
    expected = model[0].weight.detach()
    for slices in dict.fromkeys(layer.slices for layer in model):
        expected, _ = reference.weight(expected, slices, quantization="per_tensor", res=15)
    model.quantize_weights()
    torch.testing.assert_close(model[0].weight.detach(), expected)
    assert all(layer.rpu_config.modifier.quantization_type is WeightQuantizationType.NONE for layer in model)


# ---- Compiled ------------------------------------------------------------------------------------------------------------


def clip_only() -> TorchInferenceRPUConfig:
    return tiled(learned_clip())


@pytest.mark.parametrize("dynamic", [False, True], ids=["one batch size", "any batch size"])
@pytest.mark.parametrize("make", [everything, ranged, clip_only], ids=["everything", "range", "learned clip"])
def test_a_compiled_layer_is_one_graph_that_stays_and_computes_the_same(make: Any, dynamic: bool) -> None:
    torch._dynamo.reset()
    layer = AnalogLinear(40, 8, rpu_config=make())
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 6, 7):
            x = torch.randn(rows if dynamic else 5, 40)
            for model in (compiled, twin):
                torch.manual_seed(rows)
                model(x).square().sum().backward()
    for (name, own), other in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other, msg=name)
        torch.testing.assert_close(own.grad, other.grad, msg=name)
    for own, other in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(own, other)


def test_a_compiled_layer_sees_changed_numbers() -> None:
    torch._dynamo.reset()
    layer, x = AnalogLinear(40, 8, rpu_config=everything()), torch.randn(5, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for std_dev in (0.01, 0.02, 0.03):
        layer.rpu_config.modifier.std_dev = std_dev
        torch.manual_seed(0)
        y = compiled(x)
        torch.manual_seed(0)
        torch.testing.assert_close(y, layer(x))
