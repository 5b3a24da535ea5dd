"""AnalogConv1d/2d/3d: torch's convolutions whose patches tiles multiply, with groups, every padding, and torch's state dict."""

from __future__ import annotations

import copy
import io
import pickle
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_equal_sums
from test_memory import kept_bytes, saved_for_backward
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triton_analog import AnalogOptimizer, convert_to_analog, convert_to_digital, functional, launch, reference
from triton_analog.calibrate import InputRangeCalibrationType, calibrate_input_ranges
from triton_analog.config import (
    ConfigError,
    SavedInput,
    TorchInferenceRPUConfig,
    WeightClipType,
    WeightNoiseInjectionType,
    WeightNoiseRefresh,
    WeightQuantizationType,
)
from triton_analog.functional import analog_linear
from triton_analog.nn import AnalogConv1d, AnalogConv2d, AnalogConv3d, AnalogLinear, AnalogSequential
from triton_analog.optim import before_step

SIZE = (7, 6, 5)
ANALOG = {1: AnalogConv1d, 2: AnalogConv2d, 3: AnalogConv3d}
DIGITAL = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
all_ranks = pytest.mark.parametrize("rank", [1, 2, 3])


def ideal() -> TorchInferenceRPUConfig:
    return TorchInferenceRPUConfig()


def tiled(max_input_size: int = 9) -> TorchInferenceRPUConfig:
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = max_input_size
    return config


def ranged(**values: Any) -> TorchInferenceRPUConfig:
    """Slices with stored input ranges; ``values`` are further fields of them."""
    config = tiled()
    config.pre_post.input_range.enable = True
    for name, value in values.items():
        setattr(config.pre_post.input_range, name, value)
    return config


def learned_clip() -> TorchInferenceRPUConfig:
    config = tiled()
    config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    return config


def without_noise() -> TorchInferenceRPUConfig:
    """Slices, converters, a learned range, and a learned clip with quantization."""
    config = ranged()
    config.forward.inp_res = config.forward.out_res = 254
    config.forward.out_bound = 4.0
    config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL
    config.modifier.quantization_type, config.modifier.res = WeightQuantizationType.DISCRETIZE_PER_CHANNEL, 254
    return config


def everything() -> TorchInferenceRPUConfig:
    """:func:`without_noise`, and both noises."""
    config = without_noise()
    config.forward.out_noise = 0.02
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, 0.02
    return config


def inputs(rank: int, channels: int = 4, batch: int = 2, **kind: Any) -> Tensor:
    return torch.randn(batch, channels, *SIZE[:rank], **{"dtype": torch.float64, **kind})


def analog(rank: int, config: TorchInferenceRPUConfig, *sizes: Any, **options: Any) -> Any:
    return ANALOG[rank](*(sizes or (4, 6, 3)), rpu_config=config, **{"dtype": torch.float64, **options})


def assert_same_gradients(one: nn.Module, other: nn.Module) -> None:
    expected = dict(other.named_parameters())
    assert dict(one.named_parameters()).keys() == expected.keys()
    for name, parameter in one.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name].grad.view_as(parameter), msg=name)


# ---- A drop-in for torch's layers ---------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "stride": {"stride": 2},
    "padding": {"padding": 2},
    "valid": {"padding": "valid"},
    "same": {"padding": "same"},
    "same, even kernel": {"kernel_size": 4, "padding": "same", "dilation": 1},
    "same, dilation": {"kernel_size": 2, "padding": "same", "dilation": 3},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "out_channels": 8},
    "one element": {"kernel_size": 1},
    "side by side": {"kernel_size": 2, "stride": 2},
    "all of it": {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2, "groups": 2},
    **{mode: {"padding": 2, "padding_mode": mode, "stride": 2} for mode in ("reflect", "replicate", "circular")},
    **{f"{mode} same": {"padding": "same", "padding_mode": mode} for mode in ("zeros", "reflect", "replicate", "circular")},
    **{f"{mode} valid": {"padding": "valid", "padding_mode": mode} for mode in ("reflect", "circular")},
}  # fmt: skip
PER_DIMENSION = {"kernel_size": (3, 2, 1), "stride": (1, 2, 3), "padding": (2, 0, 1), "dilation": (2, 1, 1)}


def assert_computes_what_torch_does(rank: int, x: Tensor, **options: Any) -> None:
    options = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "dtype": torch.float64, **options}
    layer = ANALOG[rank](**options, rpu_config=tiled())
    twin = DIGITAL[rank](**options)
    twin.load_state_dict(layer.state_dict(), strict=False)
    own, others = (x.clone().requires_grad_() for _ in range(2))
    y, expected = layer(own), twin(others)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous()
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(own.grad, others.grad)
    assert_same_gradients(layer, twin)


@pytest.mark.parametrize("options", OPTIONS)
@all_ranks
def test_the_ideal_device_computes_what_torch_does(rank: int, options: str) -> None:
    assert_computes_what_torch_does(rank, inputs(rank), **OPTIONS[options])


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
@all_ranks
def test_every_dimension_may_have_numbers_of_its_own(rank: int, mode: str) -> None:
    numbers = {name: values[:rank] for name, values in PER_DIMENSION.items()}
    assert_computes_what_torch_does(rank, inputs(rank), **numbers, padding_mode=mode)


@pytest.mark.parametrize("options", ["plain", "groups", "reflect", "same"])
@all_ranks
def test_an_input_without_a_batch_has_an_output_without_one(rank: int, options: str) -> None:
    assert_computes_what_torch_does(rank, inputs(rank)[0], **OPTIONS[options])


@pytest.mark.parametrize("options", ["plain", "groups", "circular"])
def test_an_empty_batch_gives_an_empty_one(options: str) -> None:
    assert_computes_what_torch_does(2, inputs(2, batch=0), **OPTIONS[options])


@all_ranks
def test_it_is_torchs_layer_with_its_names_shapes_and_fresh_weights(rank: int) -> None:
    torch.manual_seed(3)
    layer = ANALOG[rank](4, 6, 3, groups=2, rpu_config=everything())
    torch.manual_seed(3)
    twin = DIGITAL[rank](4, 6, 3, groups=2)
    assert isinstance(layer, DIGITAL[rank])
    assert torch.equal(layer.weight, twin.weight)
    assert torch.equal(layer.bias, twin.bias)
    assert (layer.in_features, layer.out_features) == (2 * 3**rank, 6)
    assert layer(input=inputs(rank, dtype=torch.float32)).shape[:2] == (2, 6)


@pytest.mark.parametrize(("rank", "layout"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_the_output_has_the_memory_layout_of_torchs(rank: int, layout: torch.memory_format) -> None:
    layer, x = analog(rank, ideal()), inputs(rank)
    assert layer(x).is_contiguous()
    assert layer(x[::2]).is_contiguous()
    assert layer(x.transpose(-1, -2)).is_contiguous()
    last = x.to(memory_format=layout)
    assert layer(last).is_contiguous(memory_format=layout)
    torch.testing.assert_close(layer(last), layer(x))
    torch.testing.assert_close(layer.to(memory_format=layout)(last), layer(x))


def test_numbers_changed_after_construction_count() -> None:
    layer, x = analog(2, tiled(), padding="same"), inputs(2)
    layer.dilation, layer.stride = (2, 1), (1, 1)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding="same", dilation=layer.dilation))
    layer.padding, layer.stride = (1, 0), (2, 3)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, (2, 3), (1, 0), (2, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@all_ranks
def test_every_dtype_trains(rank: int, dtype: torch.dtype) -> None:
    layer = analog(rank, everything(), groups=2, padding=1, dtype=dtype)
    y = layer(inputs(rank, dtype=dtype))
    y.float().square().sum().backward()
    assert y.dtype == dtype
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == dtype
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_bfloat16_is_as_near_to_the_truth_as_torchs() -> None:
    layer = analog(2, ideal(), padding=1, dtype=torch.bfloat16)
    x = inputs(2, dtype=torch.bfloat16)
    truth = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
    error = (layer(x) - truth).abs().max()
    assert error <= 2 * (F.conv2d(x, layer.weight, layer.bias, padding=1) - truth).abs().max()


@pytest.mark.parametrize("options", ["plain", "groups", "reflect"])
def test_autocast_gives_the_dtype_of_autocast(options: str) -> None:
    layer = analog(2, everything(), 4, 6, dtype=torch.float32, **{"kernel_size": 3, **OPTIONS[options]})
    x = inputs(2, dtype=torch.float32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32


def test_the_kernels_compute_what_the_reference_does(backend: str, device: torch.device) -> None:
    torch.manual_seed(0)
    layer = analog(2, without_noise(), 4, 4, 2, groups=2, padding=1, dtype=torch.float32, device=device)
    with torch.no_grad():
        layer.input_range.uniform_(1, 2)
    layer.rpu_config.pre_post.input_range.init_from_data = 0
    twin, x = copy.deepcopy(layer).to("cpu", torch.float64), inputs(2)
    y = layer(x.to(device, torch.float32))
    with torch.no_grad(), launch.backend("reference"):
        expected = twin.eval()(x)
    step = 2 * 4.0 * 2 * layer.weight.abs().max().item() / 254 * len(layer.get_split_sizes())
    assert (y.double().cpu() - expected).abs().max() < 1.5 * step
    y.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


# ---- What the tiles see -------------------------------------------------------------------------------------------------


def rows_of(layer: Any, x: Tensor) -> Tensor:
    """``[B, places, in_channels * prod(kernel_size)]`` in the order of torch's weight: every output picks one element."""
    columns = layer.in_channels * prod(layer.kernel_size)
    options = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    picks = DIGITAL[layer.RANK](layer.in_channels, columns, **options, bias=False, dtype=x.dtype)
    picks.weight.data = torch.eye(columns, dtype=x.dtype).view_as(picks.weight)
    return picks(x).flatten(2).transpose(1, 2)


def linear_like(layer: Any) -> AnalogLinear:
    linear = AnalogLinear(layer.in_features, layer.out_features, dtype=layer.weight.dtype, rpu_config=layer.rpu_config)
    state = layer.state_dict()
    linear.load_state_dict({**state, "weight": state["weight"].flatten(1)})
    return linear


CONFIGS: dict[str, dict[str, Any]] = {
    "static": {},
    "dynamic": {"dynamic": True},
    "fast": {"fast_mode": True},
    "never from data": {"init_from_data": 0, "init_value": 1.5},
}


@pytest.mark.parametrize("saved", SavedInput)
@pytest.mark.parametrize("kind", CONFIGS)
@all_ranks
def test_it_is_the_linear_layer_of_its_patches_with_everything_on(rank: int, kind: str, saved: SavedInput) -> None:
    config = everything()
    config.forward.save_input = saved
    for name, value in CONFIGS[kind].items():
        setattr(config.pre_post.input_range, name, value)
    layer = analog(rank, config, 4, 6, 2, stride=2, padding=1)
    linear = linear_like(layer)
    assert layer.get_split_sizes() == linear.get_split_sizes()
    for scale in (1, 3):
        own, others = ((inputs_ * scale).requires_grad_() for inputs_ in [inputs(rank)] * 2)
        rows = rows_of(layer, others)
        torch.manual_seed(7)
        y = layer(own)
        torch.manual_seed(7)
        expected = linear(rows).transpose(1, 2).reshape(y.shape)
        torch.testing.assert_close(y, expected)
        layer.zero_grad()
        linear.zero_grad()
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(own.grad, others.grad)
        for one in (layer, linear):
            before_step(one)  # which adds the decay
        assert_same_gradients(layer, linear)
        for buffer, other in zip(layer.buffers(), linear.buffers(), strict=True):
            torch.testing.assert_close(buffer, other)
    if kind != "dynamic":
        assert layer.input_range.grad.abs().max() > 0
    assert layer.learnable_weight_clip.grad.abs().max() > 0


def test_slices_cut_the_patches_and_are_nearly_equal() -> None:
    layer = analog(2, ranged(), 3, 4, 3)
    assert layer.get_split_sizes() == [9, 9, 9]
    layer.reconfigure(ranged())
    uneven = analog(2, tiled(8), 3, 4, (3, 2))
    assert uneven.get_split_sizes() == [6, 6, 6]
    assert analog(1, tiled(4), 2, 4, 5).get_split_sizes() == [4, 3, 3]
    with pytest.raises(ConfigError, match=r"mapping\.max_input_size: got 4, which cuts 27 inputs"):
        layer.reconfigure(tiled(4))


def test_every_slice_is_clamped_to_its_own_range() -> None:
    config = ranged(init_from_data=0)
    config.mapping.max_input_size = 5
    layer, x = analog(1, config, 4, 3, 3), inputs(1)
    ranges = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    layer.set_input_range(ranges)
    assert layer.get_split_sizes() == [4, 4, 4]
    limit = ranges.repeat_interleave(4)
    clamped = rows_of(layer, x).clamp(-limit, limit)
    expected = clamped @ layer.weight.flatten(1).T + layer.bias
    torch.testing.assert_close(layer(x), expected.transpose(1, 2))


# ---- Groups -------------------------------------------------------------------------------------------------------------


@all_ranks
def test_groups_are_layers_of_their_own(rank: int) -> None:
    """Outputs, gradients, ranges and clips, while the ranges start up and afterwards."""
    config = without_noise()
    config.pre_post.input_range.init_from_data = 1
    config.mapping.max_input_size = 7
    layer = analog(rank, config, 6, 4, 2, groups=2, padding=1)
    S = layer.slices
    parts = [analog(rank, config, 3, 2, 2, padding=1) for _ in range(2)]
    for group, part in enumerate(parts):
        part.set_weights_and_biases(*(tensor.chunk(2)[group] for tensor in layer.get_weights_and_biases()))
    assert layer.input_range.shape == (2 * S,)
    assert layer.learnable_weight_clip.shape == (S, 4)
    for _ in range(2):
        x = inputs(rank, channels=6) * torch.tensor([1.0, 2, 3, 4, 5, 6]).view(-1, *[1] * rank)
        own, others = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = layer(own)
        expected = torch.cat([part(x) for part, x in zip(parts, others.chunk(2, 1), strict=True)], 1)
        torch.testing.assert_close(y, expected)
        layer.zero_grad()
        for part in parts:
            part.zero_grad()
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(own.grad, others.grad)
        for name, dim in (("weight", 0), ("bias", 0), ("input_range", 0), ("learnable_weight_clip", 1)):
            joined = torch.cat([getattr(part, name) for part in parts], dim)
            torch.testing.assert_close(getattr(layer, name), joined)
            grads = torch.cat([getattr(part, name).grad for part in parts], dim)
            torch.testing.assert_close(getattr(layer, name).grad, grads, msg=name)
    assert layer.input_range_update_idx.tolist() == [1] * 2 * S


@pytest.mark.parametrize("noise", ["per_tensor", "per_channel"])
def test_groups_of_a_product_draw_noise_of_their_own(noise: Any) -> None:
    w, b = torch.randn(6, 5), torch.randn(6)
    x, ranges = torch.randn(4, 15), torch.rand(6) + 1
    keywords: dict[str, Any] = {
        "max_input_size": 3, "out_noise": 0.1, "weight_noise": noise, "weight_noise_std": 0.1, "inp_res": 254,
    }  # fmt: skip
    seed = torch.tensor([11])
    y = analog_linear(x, w, b, input_range=ranges, groups=3, seed=seed, **keywords)
    parts = [
        analog_linear(x_, w_, b_, input_range=r, seed=seed + group, **keywords)
        for group, (x_, w_, b_, r) in enumerate(
            zip(x.chunk(3, 1), w.chunk(3), b.chunk(3), ranges.chunk(3), strict=True)
        )
    ]
    assert torch.equal(y, torch.cat(parts, 1))
    tile = functional.modified_weight(
        w, max_input_size=3, weight_noise=noise, weight_noise_std=0.1, groups=3, seed=seed
    )
    given = analog_linear(x, w, b, input_range=ranges, groups=3, seed=seed, tile_weight=tile, **keywords)
    assert_equal_sums(given, y, terms=5)  # the groups' weights are slices of one tensor here, aligned in another way


@pytest.mark.parametrize("groups", [0, 4, 1.5])
def test_groups_that_divide_nothing_are_an_error(groups: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"groups: got {groups}; a number >= 1 that divides the 6 outputs of the weight"
    ):
        analog_linear(torch.randn(2, 12), torch.randn(6, 3), groups=groups)
    with pytest.raises(ValueError, match=rf"groups: got {groups}; .* divides the 6 input features"):
        functional.update_input_range(torch.randn(2, 6), torch.ones(1), torch.zeros(1).long(), groups=groups)
    with pytest.raises(ValueError, match=r"bias: got shape \(4,\); \(6,\) is needed"):
        analog_linear(torch.randn(2, 6), torch.randn(6, 3), torch.randn(4), groups=2)


@pytest.mark.parametrize("fast", [False, True], ids=["deviations", "extremes"])
@pytest.mark.parametrize("empty", [False, True], ids=["data", "an empty batch"])
@pytest.mark.parametrize("distributed", [False, True], ids=["alone", "two ranks"])
def test_ranges_of_groups_start_up_side_by_side(
    fast: bool, empty: bool, distributed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two ranks that see the same, too: their extremes are the same, and their deviations nearly."""
    x = torch.randn(0 if empty else 40, 12) * torch.arange(1, 13)
    monkeypatch.setattr(functional, "_gather", lambda part, group: torch.stack([part] * 2))

    def learned(x: Tensor, slices: int, **keywords: Any) -> list[Tensor]:
        state = [torch.ones(slices), torch.zeros(slices, dtype=torch.int64), torch.zeros(slices), torch.zeros(slices)]
        r, count, low, high = state
        functional.update_input_range(
            x, r, count, x_min=low, x_max=high, max_input_size=4, fast_mode=fast,
            process_group="both" if distributed else None, **keywords,
        )  # fmt: skip
        return state

    expected = [torch.cat(parts) for parts in zip(*(learned(part, 2) for part in x.chunk(2, 1)), strict=True)]
    for own, other in zip(learned(x, 4, groups=2), expected, strict=True):
        torch.testing.assert_close(own, other)
    assert (expected[1] == (0 if empty else 1)).all()


def test_noise_that_lasts_for_a_step_is_that_of_every_group() -> None:
    config = ranged(init_from_data=0)
    config.modifier.refresh = WeightNoiseRefresh.STEP
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.1
    layer, x = analog(2, config, groups=2), inputs(2)
    first = layer(x)
    assert torch.equal(layer(x), first)
    noisy, _ = functional.modified_weight(
        layer.matrix, max_input_size=9, weight_noise="per_tensor", weight_noise_std=0.1, groups=2,
        seed=layer.weight_noise_seed,
    )  # fmt: skip
    expected = F.conv2d(x.clamp(-3, 3), noisy.view_as(layer.weight), layer.bias, groups=2)
    torch.testing.assert_close(first, expected)
    layer.redraw_weight_noise()
    assert not torch.allclose(layer(x), first)


# ---- Input ranges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_the_first_training_batches_set_the_ranges_from_the_patches(mode: str) -> None:
    layer = analog(2, ranged(init_from_data=2, init_std_alpha=2.5), padding=1, padding_mode=mode)
    padded = F.pad(inputs(2), (1, 1, 1, 1), mode="constant" if mode == "zeros" else mode)
    rows = F.unfold(padded, 3).transpose(1, 2).flatten(0, 1)
    x = padded[..., 1:-1, 1:-1]
    for _ in range(3):
        layer(x)
    torch.testing.assert_close(layer.input_range.detach(), 2.5 * reference.std(rows, 4))
    assert layer.input_range_update_idx.tolist() == [2] * 4


def test_activation_checkpointing_counts_a_batch_once() -> None:
    layer, x = analog(2, everything(), groups=2), inputs(2, requires_grad=True)
    twin = copy.deepcopy(layer)
    torch.manual_seed(1)
    twin(x).square().sum().backward()
    torch.manual_seed(1)
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert layer.input_range_update_idx.tolist() == [1] * 4
    assert torch.equal(layer.input_range, twin.input_range)
    assert_same_gradients(layer, twin)


def little_net(**options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, **options),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, groups=2, padding="valid", **options),
        nn.Flatten(2),
        nn.Conv1d(8, 4, 2, dilation=2, padding=1, padding_mode="circular", **options),
        nn.Unflatten(2, (1, 2, 2)),
        nn.Conv3d(4, 4, (1, 2, 2), groups=4, **options),
        nn.Flatten(),
        nn.Linear(4, 2, **options),
    )


def images(batch: int = 3, **kind: Any) -> Tensor:
    return torch.randn(batch, 3, 6, 6, **kind)


def test_calibration_finds_the_ranges_of_the_patches() -> None:
    net = little_net()
    model = convert_to_analog(net, tiled()).eval()
    batches = [images(), images(1)]
    seen: dict[int, list[Tensor]] = {index: [] for index in (0, 2, 4, 6)}
    for index, rows in seen.items():
        net[index].register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].detach()))
    for batch in batches:
        net(batch)
    calibrate_input_ranges(model, InputRangeCalibrationType.MAX, batches, verbose=False)
    for index, xs in seen.items():
        layer = model[index]
        groups = torch.cat([rows_of(layer, x).flatten(0, 1) for x in xs]).chunk(layer.groups, 1)
        expected = torch.cat([reference.absmax(rows, layer.slices).amax(1) for rows in groups])
        torch.testing.assert_close(layer.input_range.detach(), expected)
    assert model[2].input_range.shape == (2 * 2,)
    assert model[6].input_range.shape == (4,)


@pytest.mark.parametrize("kind", [kind for kind in InputRangeCalibrationType if kind.name != "NONE"])
def test_a_calibrated_model_can_be_trained_on(kind: InputRangeCalibrationType) -> None:
    model = convert_to_analog(little_net(), tiled()).eval()
    calibrate_input_ranges(model, kind, [images(), images()], verbose=False)
    before = [layer.input_range.detach().clone() for layer in model.analog_layers()]
    model.train()(images()).sum().backward()
    for layer, ranges in zip(model.analog_layers(), before, strict=True):
        assert torch.equal(layer.input_range, ranges)
        assert layer.input_range.grad.isfinite().all()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (inputs(2, channels=3), ValueError, r"x: got shape \(2, 3, 7, 6\); \[B, 4, \.\.\.\]"),
        (inputs(1), ValueError, r"x: got shape \(1, 2, 4, 7\); \[B, 4, \.\.\.\]"),
        (torch.randn(4, 9, dtype=torch.float64), ValueError, r"x: got shape \(4, 9\); \[B, 4, \.\.\.\]"),
        (inputs(3), ValueError, r"x: got shape \(2, 4, 7, 6, 5\); \[B, 4, \.\.\.\] with 2 more dimensions"),
        (inputs(2)[..., :2], ValueError, r"x: got shape \(2, 4, 7, 2\), which is smaller than a kernel of \(3, 3\)"),
        (inputs(2, dtype=torch.float32), TypeError, "x: dtype torch.float32, but weight is torch.float64"),
        (torch.ones(2, 4, 7, 6, dtype=torch.int64), TypeError, "x: got dtype torch.int64"),
    ],
    ids=["channels", "a row without a batch", "a matrix", "volumes", "too small", "dtype", "integers"],
)
def test_a_refused_input_changes_nothing(x: Tensor, error: Any, message: str) -> None:
    layer = analog(2, everything())
    before = copy.deepcopy([*layer.parameters(), *layer.buffers()])
    with pytest.raises(error, match=message):
        layer(x)
    assert all(map(torch.equal, before, [*layer.parameters(), *layer.buffers()]))


# ---- Memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adc", [False, True], ids=["no ADC", "ADC"])
@pytest.mark.parametrize(
    ("kernel", "saved", "share"),
    [
        *((3, saved, 1.01) for saved in SavedInput),  # nine integers for each input would be more than the input
        (4, SavedInput.FULL, 1.01),
        (4, SavedInput.INT8, 0.65),  # one integer for each
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_backward_keeps_the_input_not_its_patches(
    groups: int, kernel: int, saved: SavedInput, share: float, adc: bool
) -> None:
    config = without_noise()
    config.mapping.max_input_size, config.forward.save_input = 128, saved
    config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL_PER_CHANNEL, 0.02
    if not adc:
        config.forward.out_bound = config.forward.out_res = 0.0
    options = {"stride": 1, "padding": 1} if kernel == 3 else {"stride": 4}
    layer = AnalogConv2d(32, 128, kernel, **options, groups=groups, dtype=torch.bfloat16, rpu_config=config)
    layer.rpu_config.pre_post.input_range.init_from_data = 0
    x = torch.randn(4, 32, 32, 32, dtype=torch.bfloat16, requires_grad=True)
    kept = kept_bytes(saved_for_backward(layer, x), layer)
    rows = layer(x).numel() // 128
    masks = layer.slices * rows * 128 * groups // 8 if adc else 0  # words serve 128 columns, a group has fewer
    assert kept <= share * x.numel() * 2 + masks


# ---- Weights ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [WeightClipType.LAYER_GAUSSIAN, WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL])
@all_ranks
def test_the_gaussian_clip_clamps_the_weight(rank: int, kind: WeightClipType) -> None:
    """Of every rank; the deviation is that of the whole weight or of an output channel, whatever the groups."""
    config = ideal()
    config.clip.type, config.clip.sigma = kind, 1.0
    layer = analog(rank, config, groups=2)
    rows = layer.weight.detach().flatten(1).clone()
    bound = rows.std(1, keepdim=True) if kind is WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL else rows.std()
    opt = AnalogOptimizer(torch.optim.SGD, layer.analog_layers, layer.parameters(), lr=0.0)
    layer(inputs(rank)).sum().backward()
    opt.step()
    torch.testing.assert_close(layer.weight.flatten(1), rows.clamp(-bound, bound))
    assert not torch.equal(layer.weight.flatten(1), rows)


@pytest.mark.parametrize(
    ("kind", "learned"),
    [
        (WeightQuantizationType.DISCRETIZE, False),
        (WeightQuantizationType.DISCRETIZE_PER_CHANNEL, False),
        (WeightQuantizationType.DISCRETIZE_PER_CHANNEL, True),
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_quantized_weights_compute_what_the_layer_did(groups: int, kind: WeightQuantizationType, learned: bool) -> None:
    config = learned_clip() if learned else tiled()
    config.modifier.quantization_type, config.modifier.res = kind, 6
    layer, x = analog(2, config, groups=groups).eval(), inputs(2)
    before, weight = layer(x), layer.weight.detach().clone()
    layer.quantize_weights()
    assert not torch.equal(layer.weight, weight)
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, groups=groups))
    assert layer.rpu_config.modifier.quantization_type is WeightQuantizationType.NONE
    assert layer.rpu_config.clip.type is WeightClipType.NONE


def test_a_shared_weight_is_quantized_for_each_way_of_grouping_it() -> None:
    config = ideal()
    config.modifier.quantization_type, config.modifier.res = WeightQuantizationType.DISCRETIZE, 6
    whole, grouped, again = (analog(1, config, size, 4, 3, groups=size // 2) for size in (2, 4, 2))
    grouped.weight = again.weight = whole.weight
    whole.set_weights(whole.weight.detach() * torch.tensor([1.0, 2, 3, 4]).view(-1, 1, 1))
    one, other = (copy.deepcopy(layer) for layer in (whole, grouped))
    one.quantize_weights()
    other.set_weights(one.weight)
    other.quantize_weights()
    AnalogSequential(whole, grouped, again).quantize_weights()
    assert torch.equal(whole.weight, other.weight)
    assert not torch.equal(whole.weight, one.weight)


@all_ranks
def test_a_learned_clip_follows_weights_that_are_set(rank: int) -> None:
    layer = analog(rank, learned_clip())
    clip, weight = layer.learnable_weight_clip, layer.weight
    layer.set_weights(3 * layer.weight.detach())
    assert layer.learnable_weight_clip is clip
    assert layer.weight is weight
    assert torch.equal(clip, reference.absmax(weight.detach().flatten(1), layer.slices))
    with pytest.raises(ValueError, match=r"weight: got shape \(6, \d+\); \(6, 4, 3.*\) is needed"):
        layer.set_weights(weight.detach().flatten(1))


# ---- State --------------------------------------------------------------------------------------------------------------


@all_ranks
def test_torchs_state_dict_loads_and_a_learned_clip_follows_it(rank: int) -> None:
    twin = DIGITAL[rank](4, 6, 3, groups=2, dtype=torch.float64)
    twin.weight.data *= 5
    layer = analog(rank, learned_clip(), groups=2)
    missing = layer.load_state_dict(twin.state_dict(), strict=False)
    assert missing.missing_keys == ["learnable_weight_clip"]
    assert torch.equal(layer.learnable_weight_clip, reference.absmax(twin.weight.detach().flatten(1), layer.slices))
    x = inputs(rank)
    torch.testing.assert_close(layer(x), twin(x))


@all_ranks
def test_the_weights_of_a_state_dict_are_torchs(rank: int) -> None:
    layer, twin = analog(rank, everything(), groups=2), DIGITAL[rank](4, 6, 3, groups=2, dtype=torch.float64)
    state = layer.state_dict()
    assert {name: state[name].shape for name in twin.state_dict()} == {
        name: value.shape for name, value in twin.state_dict().items()
    }
    twin.load_state_dict(state, strict=False)
    assert torch.equal(twin.weight, layer.weight)


def test_state_and_config_travel_through_a_file_wherever_a_layer_is_nested() -> None:
    model = nn.ModuleDict({"deep": nn.Sequential(analog(1, everything()), nn.Sequential(analog(2, everything())))})
    for layer, x in ((model["deep"][0], inputs(1)), (model["deep"][1][0], inputs(2))):
        layer(x)
        layer.rpu_config.forward.inp_res = 126
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    other = nn.ModuleDict({"deep": nn.Sequential(analog(1, tiled()), nn.Sequential(analog(2, tiled())))})
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for (name, own), value in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(own, value), name
    assert other["deep"][1][0].rpu_config.forward.inp_res == 126
    x = inputs(1)
    assert torch.equal(model.eval()["deep"][0](x), other.eval()["deep"][0](x))


def test_a_one_dimensional_layer_leaves_the_state_of_its_neighbours_alone() -> None:
    model = nn.ModuleDict(
        {
            "conv": AnalogConv1d(2, 3, 2, rpu_config=tiled()),
            "conv2": nn.Conv2d(2, 3, (1, 2)),
            "my_conv": nn.Conv2d(2, 3, (1, 2)),
        }
    )
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    state = model.state_dict()
    assert state["conv.weight"].shape == (3, 2, 2)
    assert state["conv2.weight"].shape == state["my_conv.weight"].shape == (3, 2, 1, 2)
    other.load_state_dict(state)
    for one, value in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, value)


@all_ranks
def test_copies_and_pickles_compute_the_same(rank: int) -> None:
    layer, x = analog(rank, everything(), groups=2, padding="same"), inputs(rank)
    layer(x)
    layer.eval()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is ANALOG[rank]
        assert torch.equal(other(x), layer(x))
        assert other.input_range_update_idx.tolist() == [1] * len(layer.input_range)


# ---- Conversion ---------------------------------------------------------------------------------------------------------


@all_ranks
def test_one_layer_converts_with_its_very_parameters_and_back(rank: int) -> None:
    digital = DIGITAL[rank](4, 8, 3, 2, 2, 2, 4, padding_mode="replicate", dtype=torch.float64).eval()
    digital.bias.requires_grad_(False)
    layer = ANALOG[rank].from_digital(digital, everything())
    back = ANALOG[rank].to_digital(layer)
    assert type(layer) is ANALOG[rank]
    assert type(back) is DIGITAL[rank]
    for one in (layer, back):
        assert one.weight is digital.weight
        assert one.bias is digital.bias
        assert not one.training
    assert repr(back) == repr(digital)
    assert vars(back).keys() == vars(digital).keys()
    x = inputs(rank)
    torch.testing.assert_close(back(x), digital(x))
    torch.testing.assert_close(ANALOG[rank].from_digital(digital, tiled())(x), digital(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_little_network_converts_computes_the_same_and_comes_back(inplace: bool) -> None:
    digital, x = little_net(dtype=torch.float64).eval(), images(dtype=torch.float64)
    digital[0].weight.requires_grad_(False)
    expected = digital(x)
    parameters = list(digital.parameters())
    state = copy.deepcopy(digital.state_dict())
    model = convert_to_analog(digital, tiled(), inplace=inplace)
    assert [type(layer) for layer in model.analog_layers()] == [
        *(AnalogConv2d, AnalogConv2d, AnalogConv1d, AnalogConv3d, AnalogLinear),
    ]
    assert not model[2].training
    torch.testing.assert_close(model(x), expected)
    if inplace:
        assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in parameters]
    back = convert_to_digital(model, inplace=inplace)
    assert type(back) is nn.Sequential
    assert [type(layer) for layer in back] == [type(layer) for layer in little_net()]
    assert [parameter.requires_grad for parameter in back.parameters()] == [False, *[True] * 9]
    assert back.state_dict().keys() == state.keys()
    torch.testing.assert_close(back(x), expected)


def test_lazy_and_transposed_convolutions_stay_digital_and_are_named() -> None:
    net = nn.ModuleDict({"lazy": nn.LazyConv1d(2, 1), "up": nn.ConvTranspose2d(1, 1, 1), "found": nn.LazyConv2d(2, 1)})
    net["found"](torch.randn(1, 3, 2, 2))
    with pytest.warns(
        UserWarning, match=r"left 2 module.*lazy: LazyConv1d has no weight yet; run .* first|once"
    ) as caught:
        model = convert_to_analog(net, tiled())
    assert "up: no analog class for ConvTranspose2d" in str(caught[0].message)
    assert type(model["found"]) is AnalogConv2d
    assert type(model["lazy"]) is nn.LazyConv1d


def test_another_digital_layer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"module: got Conv2d; a torch\.nn\.Conv1d is needed"):
        AnalogConv1d.from_digital(nn.Conv2d(1, 1, 1), ideal())
    with pytest.raises(TypeError, match=r"module: got ConvTranspose2d; a torch\.nn\.Conv2d is needed"):
        AnalogConv2d.from_digital(nn.ConvTranspose2d(1, 1, 1), ideal())


# ---- Arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels: got 0; a tile needs at least 1"),
        ({"out_channels": 0}, "out_channels: got 0; a tile needs at least 1"),
        ({"groups": 0}, "groups: got 0; a number >= 1 that divides in_channels, 4"),
        ({"groups": 3}, "groups: got 3; a number >= 1 that divides in_channels, 4"),
        ({"groups": 4}, "groups: got 4; a number >= 1 that divides out_channels, 6"),
        ({"kernel_size": 0}, "kernel_size: got 0; an int >= 1 or a tuple of 2"),
        ({"kernel_size": (3,)}, r"kernel_size: got \(3,\); an int >= 1 or a tuple of 2"),
        ({"kernel_size": 2.0}, r"kernel_size: got 2\.0; an int >= 1 or a tuple of 2"),
        ({"stride": 0}, "stride: got 0; an int >= 1"),
        ({"dilation": (1, 0)}, r"dilation: got \(1, 0\); an int >= 1"),
        ({"padding": -1}, "padding: got -1; an int >= 0"),
        ({"padding": "some"}, "[Pp]adding string 'some'.*'same'"),
        ({"padding": "same", "stride": 2}, "padding='same' is not supported for strided convolutions"),
        ({"padding_mode": "mirror"}, "padding_mode must be one of .*'reflect'.* but got padding_mode='mirror'"),
    ],
)
def test_a_wrong_argument_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnalogConv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options}, rpu_config=ideal())


def test_a_missing_or_invalid_config_is_an_error() -> None:
    with pytest.raises(ConfigError, match="rpu_config: got nothing; pass a config object"):
        AnalogConv1d(4, 6, 3)
    config = ideal()
    config.forward.inp_res = 254
    with pytest.raises(ConfigError, match=r"forward\.inp_res"):
        AnalogConv3d(4, 6, 3, rpu_config=config)


def test_the_printed_layer_says_what_it_simulates() -> None:
    text = repr(AnalogConv2d(4, 6, 3, padding="same", groups=2, rpu_config=ranged()))
    for part in ("AnalogConv2d(4, 6, kernel_size=(3, 3)", "padding=same", "groups=2", "slices=[9, 9]", "rpu_config: "):
        assert part in text


# ---- Compiled -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["one size", "any size"])
@pytest.mark.parametrize("options", ["padding", "groups", "reflect", "same"])
def test_a_compiled_layer_is_one_graph_that_stays_and_computes_the_same(options: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    layer = AnalogConv2d(4, 6, **{"kernel_size": 3, **OPTIONS[options]}, rpu_config=everything())
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 6, 7):
            x = torch.randn(rows if dynamic else 5, 4, 7, 6 + (rows if dynamic else 0))
            for model in (compiled, twin):
                torch.manual_seed(rows)
                model(x).square().sum().backward()
    assert_same_gradients(layer, twin)
    for own, other in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(own, other)
