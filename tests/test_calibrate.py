"""Calibration: what every kind finds, what it leaves alone, and that a calibrated model evaluates, trains and travels."""

from __future__ import annotations

import copy
import io
import sys
import warnings
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import cut
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

from triton_analog import InputRangeCalibrationType, calibrate_input_ranges, convert_to_analog, launch, range_statistics
from triton_analog.config import (
    ConfigError,
    SavedInput,
    TorchInferenceRPUConfig,
    WeightClipType,
    WeightNoiseInjectionType,
    WeightQuantizationType,
)
from triton_analog.nn import AnalogLinear, AnalogSequential
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.optim import AnalogOptimizer

MAX = InputRangeCalibrationType.MAX
MOVING_STD = InputRangeCalibrationType.MOVING_STD
MOVING_QUANTILE = InputRangeCalibrationType.MOVING_QUANTILE
CACHE_QUANTILE = InputRangeCalibrationType.CACHE_QUANTILE
all_kinds = pytest.mark.parametrize(
    "kind", [MAX, MOVING_STD, MOVING_QUANTILE, CACHE_QUANTILE], ids=lambda kind: kind.name
)

Change = Callable[[TorchInferenceRPUConfig], None]


def tiles(change: Change | None = None) -> TorchInferenceRPUConfig:
    """Tiles of 10 inputs: slices of 9, 8 and 8 of 25 inputs, and of 9 and 8 of 17."""
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 10
    if change is not None:
        change(config)
    return config


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(25, 17), nn.Tanh(), nn.Sequential(nn.Linear(17, 4))).to(dtype).eval()


def samples(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Batches of several sizes and shapes."""
    return [torch.randn(*shape, 25, dtype=dtype) for shape in [(40,), (3, 7), (1,)]]


def analog(digital: nn.Module, change: Change | None = None) -> Any:
    return convert_to_analog(digital, tiles(change))


def calibrate(
    model: nn.Module, kind: InputRangeCalibrationType, batches: Iterable[Any], **options: Any
) -> list[Tensor]:
    """The ranges of the layers."""
    calibrate_input_ranges(model, kind, batches, verbose=False, **options)
    return ranges_of(model)


def ranges_of(model: Any) -> list[Tensor]:
    return [layer.input_range.detach().clone() for layer in model.analog_layers()]


def largest(part: Tensor) -> Tensor:
    return part.abs().max()


def inputs_of(digital: nn.Module, batches: list[Tensor]) -> list[list[Tensor]]:
    """What every linear layer of the digital model sees, per batch as ``[M, K]``."""
    seen: list[list[Tensor]] = []
    for layer in (module for module in digital.modules() if isinstance(module, nn.Linear)):
        inputs: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, -2)))
        with torch.no_grad():
            for batch in batches:
                digital(batch)
        handle.remove()
        seen.append(inputs)
    return seen


def per_slice(x: Tensor, estimate: Callable[[Tensor], Any]) -> Tensor:
    """``estimate`` of each slice of ``x [M, K]`` for tiles of 10 inputs, in fp64."""
    return torch.stack([torch.as_tensor(estimate(part.double())) for part in cut(x, -(-x.shape[1] // 10))])


def mean_over(inputs: list[Tensor], estimate: Callable[[Tensor], Any]) -> Tensor:
    return torch.stack([per_slice(x, estimate) for x in inputs]).mean(0)


def quantile_of(part: Tensor, q: float) -> Tensor:
    return torch.quantile(part.abs().flatten(), q)


def assert_ranges(actual: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))


# ---- What is found ------------------------------------------------------------------------------------------------------


def test_max_is_the_largest_magnitude_of_every_slice(backend: str, device: torch.device) -> None:
    digital, batches = network().to(device), [batch.to(device) for batch in samples()]
    found = calibrate(analog(digital), MAX, batches)
    assert_ranges(found, [per_slice(torch.cat(x), lambda part: part.abs().max()) for x in inputs_of(digital, batches)])


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_moving_std_is_the_mean_of_the_deviations_of_the_batches(
    backend: str, device: torch.device, alpha: float | None
) -> None:
    """``std_alpha`` of them; without it, ``init_std_alpha`` of the config."""

    def four(config: TorchInferenceRPUConfig) -> None:
        config.pre_post.input_range.init_std_alpha = 4.0

    digital, batches = network().to(device), [batch.to(device) for batch in samples()]
    found = calibrate(analog(digital, four), MOVING_STD, batches, std_alpha=alpha)
    assert_ranges(found, [mean_over(x, lambda part: (alpha or 4.0) * part.std()) for x in inputs_of(digital, batches)])


@pytest.mark.parametrize("q", [0.3, 0.9, 0.99995, 1.0])
def test_moving_quantile_is_the_mean_of_the_quantiles_of_the_batches(q: float) -> None:
    digital, batches = network(), samples()
    found = calibrate(analog(digital), MOVING_QUANTILE, batches, quantile=q)
    assert_ranges(found, [mean_over(x, lambda part: quantile_of(part, q)) for x in inputs_of(digital, batches)])


@pytest.mark.parametrize("q", [0.3, 0.9, 0.99995, 1.0])
def test_cache_quantile_is_the_quantile_of_all_rows_while_they_fit(q: float) -> None:
    digital, batches = network(), samples()
    found = calibrate(analog(digital), CACHE_QUANTILE, batches, quantile=q, max_samples=62)
    assert_ranges(
        found, [per_slice(torch.cat(x), lambda part: quantile_of(part, q)) for x in inputs_of(digital, batches)]
    )


def test_more_rows_are_drawn_evenly_from_the_whole_stream_in_bounded_memory() -> None:
    sizes, kept, runs = [1, 300, 2, 97, 600], 50, 400
    rows = torch.arange(float(sum(sizes)))[:, None]
    times_kept = torch.zeros(len(rows))
    for _ in range(runs):
        drawn = range_statistics.RandomRows(kept, lambda rows: rows)
        for batch in rows.split(sizes):
            drawn.add(batch)
            assert drawn.rows is not None
            assert len(drawn.rows) <= kept
        assert drawn.rows is not None
        assert len(drawn.rows.unique()) == kept  # without replacement
        times_kept[drawn.rows[:, 0].long()] += 1
    share = kept / len(rows)
    for part in times_kept.split(sizes):
        expected = runs * len(part) * share
        assert abs(part.sum() - expected) < 4 * (expected * (1 - share)) ** 0.5


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    model, batches = analog(network()), samples()
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(torch.cat(calibrate(model, CACHE_QUANTILE, batches, max_samples=5)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind", [MOVING_QUANTILE, CACHE_QUANTILE])
def test_quantiles_are_of_magnitudes_and_signed_makes_them_those_of_aihwkit(kind: InputRangeCalibrationType) -> None:
    layer, x = analog(nn.Linear(25, 4).eval()), -torch.rand(50, 25) - 1
    (found,) = calibrate(layer, kind, [x], quantile=0.9)
    torch.testing.assert_close(found, per_slice(x, lambda part: torch.quantile(-part.flatten(), 0.9)).float())
    (found,) = calibrate(layer, kind, [x], quantile=0.9, signed=True)
    torch.testing.assert_close(found, per_slice(x, lambda part: torch.quantile(part.flatten(), 0.9)).float())
    assert (found < 0).all()


@pytest.mark.parametrize("q", [0.0, 0.25, 0.5, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("numbers", [1, 2, 3, 1000])
def test_a_quantile_is_that_of_torch(numbers: int, q: float) -> None:
    x = torch.randn(numbers, dtype=torch.float64)
    torch.testing.assert_close(range_statistics.quantile(x, q), torch.quantile(x, q))


def test_a_quantile_is_of_any_number_of_elements() -> None:
    x = torch.randn(2**24 + 1000)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x, 0.99995)
    found = range_statistics.quantile(x.view(-1, 8), 0.99995)
    assert found.item() == pytest.approx(np.quantile(x.numpy(), 0.99995), rel=1e-6)


@all_kinds
def test_rows_of_zeros_are_ignored_and_a_batch_of_them_is_no_error(kind: InputRangeCalibrationType) -> None:
    digital, batches = nn.Linear(25, 4).eval(), samples()
    padded = [torch.cat([torch.zeros(30, 25), x.flatten(0, -2)]) for x in batches]
    expected = calibrate(analog(digital), kind, batches, quantile=0.7)
    padded.insert(1, torch.zeros(9, 25))
    padded.append(torch.zeros(0, 25))
    assert_ranges(calibrate(analog(digital), kind, padded, quantile=0.7), expected)


@all_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(kind: InputRangeCalibrationType, dtype: torch.dtype) -> None:
    digital, batches = network(dtype), samples(dtype)
    found = calibrate(analog(digital), kind, batches, quantile=0.9)
    assert {ranges.dtype for ranges in found} == {dtype}
    wide = calibrate(analog(digital.double()), kind, [batch.double() for batch in batches], quantile=0.9)
    assert_ranges(found, wide, rtol=4 * torch.finfo(dtype).eps, atol=0)


# ---- Which layers, and what they see --------------------------------------------------------------------------------------


@all_kinds
def test_a_layer_that_runs_twice_per_batch_takes_both(kind: InputRangeCalibrationType) -> None:
    layer = nn.Linear(25, 25)
    twice = nn.Sequential(layer, nn.Tanh(), layer).eval()
    seen = inputs_of(twice, [x := torch.randn(20, 25)])[0]
    assert len(seen) == 2
    (found,) = calibrate(analog(twice), kind, [x], quantile=0.9, std_alpha=1.0)
    expected = {
        MAX: per_slice(torch.cat(seen), lambda part: part.abs().max()),
        MOVING_STD: mean_over(seen, torch.std),
        MOVING_QUANTILE: mean_over(seen, lambda part: quantile_of(part, 0.9)),
        CACHE_QUANTILE: per_slice(torch.cat(seen), lambda part: quantile_of(part, 0.9)),
    }
    assert_ranges([found], [expected[kind]])


def test_layers_that_share_a_weight_have_ranges_of_their_own() -> None:
    tied = nn.Sequential(nn.Linear(25, 25), nn.Tanh(), nn.Linear(25, 25)).eval()
    tied[2].weight = tied[0].weight
    model, batches = analog(tied), samples()
    found = calibrate(model, MAX, batches)
    assert model[0].weight is model[2].weight
    assert_ranges(found, [per_slice(torch.cat(x), lambda part: part.abs().max()) for x in inputs_of(tied, batches)])


class Windows(AnalogLinear):
    """Multiplies all windows of its input, as a convolution does."""

    def forward(self, input: Tensor) -> Tensor:
        return self.analog_matmul(input.unfold(-1, self.in_features, 1))


def test_the_range_is_of_what_a_layer_multiplies_not_of_what_it_is_given() -> None:
    layer = Windows(12, 3, rpu_config=tiles()).eval()
    x = torch.linspace(-1, 2, 20)[None]
    windows = x.unfold(-1, 12, 1).flatten(0, -2)
    (found,) = calibrate(layer, MAX, [x])
    assert_ranges([found], [per_slice(windows, lambda part: part.abs().max())])
    assert found[0] != found[1]


def test_groups_of_tiles_have_ranges_of_their_own() -> None:
    x = torch.randn(20, 50)
    largest = range_statistics.each_group(lambda rows: range_statistics.slice_maxima(rows, slices=3), 25)(x)
    assert_ranges([largest], [torch.cat([per_slice(part, lambda part: part.abs().max()) for part in x.split(25, 1)])])


class Grown(AnalogLinear):
    """Its product takes an input that stands for longer rows, as that of a convolution stands for its patches."""

    def tile_rows(self, x: Tensor) -> Tensor:
        return x.unfold(-1, self.in_features, 1).flatten(0, -2)

    def analog_matmul(self, x: Tensor, *shared: Any) -> Tensor:
        return super().analog_matmul(self.tile_rows(x), *shared)


def test_the_range_is_of_the_rows_that_a_layer_makes_of_its_input() -> None:
    x = torch.linspace(-1, 2, 20)[None]
    (found,) = calibrate(Grown(12, 3, rpu_config=tiles()).eval(), MAX, [x])
    assert_ranges([found], [per_slice(x.unfold(-1, 12, 1).flatten(0, -2), lambda part: part.abs().max())])


def test_a_stored_range_does_not_clip_what_later_layers_see() -> None:
    def tight(config: TorchInferenceRPUConfig) -> None:
        config.pre_post.input_range.enable = True
        config.pre_post.input_range.init_value = 0.01

    digital, batches = network(), samples()
    assert_ranges(calibrate(analog(digital, tight), MAX, batches), calibrate(analog(digital), MAX, batches))


def test_noise_and_converters_are_off_meanwhile() -> None:
    def noisy(config: TorchInferenceRPUConfig) -> None:
        config.pre_post.input_range.enable = True
        config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.5
        config.forward.out_noise, config.forward.out_bound, config.forward.out_res = 0.5, 0.1, 4

    digital, batches = network(), samples()
    model = analog(digital, noisy)
    assert_ranges(calibrate(model, MAX, batches), calibrate(analog(digital), MAX, batches))
    assert [layer.rpu_config for layer in model.analog_layers()] == [tiles(noisy)] * 2


def test_weights_are_quantized_meanwhile_as_in_any_evaluation() -> None:
    def coarse(config: TorchInferenceRPUConfig) -> None:
        config.modifier.quantization_type, config.modifier.res = WeightQuantizationType.DISCRETIZE_PER_CHANNEL, 4

    digital, batches = network(), samples()
    found = calibrate(analog(digital, coarse), MAX, batches)
    baked = analog(digital, coarse)
    baked.quantize_weights()
    assert_ranges(found, calibrate(baked, MAX, batches))
    assert not torch.allclose(found[1], calibrate(analog(digital), MAX, batches)[1])


def test_a_compiled_model_is_calibrated_and_then_runs_with_its_ranges() -> None:
    digital, batches = network(), samples()
    model = analog(digital)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(batches[0])
    calibrate_input_ranges(compiled, MAX, batches, verbose=False)
    assert_ranges(ranges_of(model), calibrate(analog(digital), MAX, batches))
    outlier = 10 * batches[0]
    with torch.no_grad():
        torch.testing.assert_close(compiled(outlier), model(outlier))
        assert not torch.allclose(compiled(outlier), digital(outlier))


# ---- What is left alone -----------------------------------------------------------------------------------------------------


def ranged(config: TorchInferenceRPUConfig) -> None:
    config.pre_post.input_range.enable = True
    config.forward.out_noise = 0.1


FORWARDS_LEAVE = ("_checked", "_of_modes", "_numbers_of", "was_called")
"""What any forward may set: the config that was checked last, a cache, and that there was one."""


def everything_of(model: nn.Module) -> list[Any]:
    """All that a calibration could change, of every module: what it holds, by identity, and a copy of the values."""
    held = [{**vars(module), **module._parameters, **module._buffers} for module in model.modules()]
    hooks = [[len(value) for key, value in vars(module).items() if key.endswith("hooks")] for module in model.modules()]
    values = [(name, value.tolist()) for name, value in model.state_dict().items()]
    configs = [layer.rpu_config.to_dict() for layer in model.modules() if isinstance(layer, AnalogMatrixLayer)]
    identities = [{name: id(value) for name, value in own.items() if name not in FORWARDS_LEAVE} for own in held]
    return [identities, hooks, values, configs]


def failing(batches: list[Tensor], error: BaseException) -> Iterator[Tensor]:
    yield from batches
    raise error


@all_kinds
@pytest.mark.parametrize("change", [None, ranged], ids=["without ranges", "with ranges"])
def test_an_error_leaves_everything_as_it_was(kind: InputRangeCalibrationType, change: Change | None) -> None:
    model = analog(network(), change)
    before = everything_of(model)
    good, wrong, infinite = torch.randn(5, 25), torch.randn(5, 24), torch.full((5, 25), torch.inf)
    for batches, error in (
        (failing([good], KeyboardInterrupt()), KeyboardInterrupt),
        ([good, wrong], ValueError),
        ([good, infinite], ValueError),
        ([good, "text"], TypeError),
        ([], ValueError),
    ):
        with pytest.raises(error):
            calibrate(model, kind, batches)
        assert everything_of(model) == before
        assert model.state_dict().keys() == analog(network(), change).state_dict().keys()


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.spare = nn.Linear(25, 25), nn.Linear(25, 4), nn.Linear(25, 4)

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:
        return (self.spare if spare else self.head)(self.body(x))


def test_layers_that_saw_no_data_are_named_once_and_stay_as_they_were() -> None:
    model = analog(TwoHeads().eval())
    before = everything_of(model.spare)
    with pytest.warns(UserWarning, match=r"left 1 analog layer\(s\) as they were: spare\. No data but zeros") as caught:
        calibrate_input_ranges(model, MAX, samples(), verbose=False)
    assert [warning.filename for warning in caught] == [__file__]
    assert everything_of(model.spare) == before
    assert model.head.input_range is not None
    calibrate(model, MAX, [((x,), {"spare": spare}) for x in samples() for spare in (False, True)])
    assert len(ranges_of(model)) == 3


def test_data_that_reach_no_layer_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"no data but zeros reached the analog layers 0, 2\.0;"):
        calibrate(analog(network()), MAX, [])
    with pytest.raises(ValueError, match="no data but zeros reached the analog layers"):
        calibrate(analog(nn.Linear(25, 4)), MAX, [torch.zeros(5, 25)])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_inputs_that_are_not_finite_are_an_error_that_names_the_layer(value: float) -> None:
    x = torch.randn(5, 25)
    x[3, 7] = value
    with pytest.raises(ValueError, match="layer 0 got inputs that are inf or NaN"):
        calibrate(analog(network()), CACHE_QUANTILE, [x])


def test_a_range_that_its_dtype_cannot_hold_is_an_error() -> None:
    model = analog(nn.Sequential(nn.Linear(25, 4)).half().eval())
    before = everything_of(model)
    with pytest.raises(ValueError, match=r"the ranges of layer 0 exceed what its dtype torch\.float16"):
        calibrate(model, MOVING_STD, [30000 * torch.randn(50, 25).sign().half()])
    assert everything_of(model) == before


def test_a_slice_of_zeros_keeps_the_range_it_had() -> None:
    x = torch.randn(20, 25)
    x[:, 9:17] = 0
    model = analog(nn.Linear(25, 4).eval())
    before = everything_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            calibrate(model, MAX, [x])
    assert everything_of(model) == before
    with pytest.warns(UserWarning, match=r"range of layer .* came out as 0 in slices \[1\]") as caught:
        calibrate_input_ranges(model, MAX, [x], verbose=False)
    assert caught[0].filename == __file__
    (found,) = ranges_of(model)
    assert found[1] == 3.0  # init_value
    assert found[0] == x[:, :9].abs().max()


def test_the_hooks_of_the_user_run_and_stay() -> None:
    model, calls = analog(network()), []
    handle = model[0].register_forward_pre_hook(lambda module, args: calls.append(torch.is_grad_enabled()))
    calibrate(model, MAX, samples())
    assert calls == [False] * 3
    assert list(model[0]._forward_pre_hooks) == [handle.id]
    assert "analog_matmul" not in vars(model[0])


# ---- What is switched off meanwhile -----------------------------------------------------------------------------------------


@all_kinds
def test_a_config_with_everything_on_is_calibrated_as_without_and_back_afterwards(
    kind: InputRangeCalibrationType,
) -> None:
    """In training mode too, and again after it has been trained."""

    def everything(config: TorchInferenceRPUConfig) -> None:
        config.pre_post.input_range.enable = True
        config.forward.inp_res, config.forward.out_res, config.forward.out_bound = 4, 4, 0.5
        config.forward.out_noise, config.forward.save_input = 0.5, SavedInput.INT8
        config.modifier.noise_type, config.modifier.std_dev = WeightNoiseInjectionType.ADD_NORMAL, 0.5

    digital, batches = network(), samples()
    digital.insert(1, nn.Dropout())
    expected = calibrate(analog(digital), kind, batches, quantile=0.9)
    model = analog(digital, everything).train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    config = model[0].rpu_config.to_dict()
    assert_ranges(calibrate(model, kind, batches, quantile=0.9), expected)
    assert [module.training for module in model.modules()] == modes
    assert [layer.rpu_config.to_dict() for layer in model.analog_layers()] == [config] * 2
    model(batches[0]).square().mean().backward()
    assert_ranges(calibrate(model, kind, batches, quantile=0.9), expected)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, kind, failing(batches, KeyboardInterrupt()))
    assert [module.training for module in model.modules()] == modes


def test_a_frozen_model_is_calibrated_and_what_was_frozen_stays_so() -> None:
    model = analog(network(), ranged).requires_grad_(False)
    calibrate(model, MAX, samples())
    assert not any(parameter.requires_grad for parameter in model.parameters())


# ---- What is refused --------------------------------------------------------------------------------------------------------


def second_layer(change: Change) -> Any:
    """A model whose last layer alone has a config with ``change``."""

    def choose(name: str, module: nn.Module, config: TorchInferenceRPUConfig) -> TorchInferenceRPUConfig:
        config.pre_post.input_range.enable = True
        if name == "2.0":
            change(config)
        return config

    return convert_to_analog(network(), tiles(), specific_rpu_config_fun=choose)


def dynamic(config: TorchInferenceRPUConfig) -> None:
    config.pre_post.input_range.dynamic = True
    config.forward.inp_res = 4


def test_dynamic_ranges_everywhere_are_refused_and_those_of_some_layers_stay() -> None:
    def everywhere(config: TorchInferenceRPUConfig) -> None:
        config.pre_post.input_range.enable = True
        dynamic(config)

    model = analog(network(), everywhere)
    with pytest.raises(ConfigError, match=r"input_range\.dynamic: got True in the analog layers 0, 2\.0"):
        calibrate(model, MAX, samples())
    model, batches = second_layer(dynamic), samples()
    before = everything_of(model[2][0])
    with pytest.warns(
        UserWarning, match=r"left 1 analog layer\(s\) as they were: 2\.0\. Pre_post\.input_range\.dynamic"
    ):
        calibrate_input_ranges(model, MAX, batches, verbose=False)
    assert everything_of(model[2][0]) == before
    assert torch.equal(model[0].input_range, per_slice(torch.cat([x.flatten(0, -2) for x in batches]), largest).float())


def test_a_config_that_is_not_valid_is_refused_before_any_data() -> None:
    def negative(config: TorchInferenceRPUConfig) -> None:
        config.forward.out_noise = -0.5

    model = analog(network())
    negative(model[0].rpu_config)
    with pytest.raises(ConfigError, match=r"forward\.out_noise: got -0\.5"):
        calibrate(model, MAX, failing([], AssertionError("data was read")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile": 0.0}, "quantile: got 0.0"),
        ({"quantile": 1.1}, "quantile: got 1.1"),
        ({"max_samples": 0}, "max_samples: got 0"),
        ({"std_alpha": 0.0}, "std_alpha: got 0.0"),
        ({"std_alpha": float("nan")}, "std_alpha: got nan"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(analog(network()), MAX, samples(), **options)


def test_a_kind_that_is_none_or_no_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"calibration_type: got .*NONE, which finds no range; allowed are .*MAX"):
        calibrate(analog(network()), InputRangeCalibrationType.NONE, samples())
    with pytest.raises(TypeError, match="calibration_type: got 'Max'; allowed are"):
        calibrate(analog(network()), "Max", samples())  # type: ignore[arg-type]


def test_a_model_without_analog_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="model: it has no analog layer; convert it with convert_to_analog"):
        calibrate_input_ranges(network(), MAX, samples())
    with pytest.raises(TypeError, match=r"model: got list; a torch\.nn\.Module"):
        calibrate_input_ranges([], MAX, samples())  # type: ignore[arg-type]


# ---- Batches and progress ---------------------------------------------------------------------------------------------------


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(25, 4)

    def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        return self.linear(x + shift)


X, SHIFT = torch.ones(2, 25), torch.full((2, 25), 4.0)


@pytest.mark.parametrize(
    ("batch", "largest"),
    [
        (((X,), {}), 1),
        (((X, SHIFT), {}), 5),
        (([X], {"shift": SHIFT}), 5),
        ([[X], {"shift": SHIFT}], 5),  # what a DataLoader makes of the tuple
        (((), {"x": X}), 1),
        (X, 1),
        ([X], 1),  # what a DataLoader makes of a TensorDataset of one tensor
        ({"x": X, "shift": SHIFT}, 5),
        (UserDict({"x": X}), 1),  # the tokenizers of Hugging Face give such
        ([X, SHIFT], 1),  # labels, as of a TensorDataset
        ((X, torch.tensor([3, 1]), ["a", "b"]), 1),
        (({"x": X, "shift": SHIFT}, torch.tensor([3, 1])), 5),
    ],
)
def test_what_a_batch_may_be(batch: Any, largest: float) -> None:
    model = analog(Sum().eval())
    for batches in ([batch], iter([batch])):
        (found,) = calibrate(model, MAX, batches)
        assert found.tolist() == [largest] * 3


@pytest.mark.parametrize(
    ("batch", "shown"),
    [
        ((X, {"shift": SHIFT}), "tuple of Tensor, dict"),
        (((X, X), SHIFT), "tuple of tuple, Tensor"),
        (("text", SHIFT), "tuple of str, Tensor"),
        ([], "list of "),
        (None, "NoneType"),
        (((X,), {}, {}), "tuple of tuple, dict, dict"),
    ],
)
def test_what_is_no_batch_is_refused(batch: Any, shown: str) -> None:
    with pytest.raises(TypeError, match=rf"dataloader: got a batch that is a {shown}; allowed are .*forward=lambda"):
        calibrate(analog(Sum().eval()), MAX, [batch])


def test_a_function_may_run_the_model() -> None:
    batches = [{"picture": X, "label": 3}, {"picture": 2 * X, "label": 4}]
    (found,) = calibrate(
        analog(Sum().eval()), MAX, batches, forward=lambda model, batch: model(batch["picture"], shift=1.0)
    )
    assert found.tolist() == [3] * 3
    with pytest.raises(TypeError, match=r"forward: got 'model'; a function forward\(model, batch\) is needed"):
        calibrate(analog(Sum()), MAX, batches, forward="model")


def test_a_data_loader_of_torch() -> None:
    x = torch.randn(30, 25)
    (found,) = calibrate(analog(Sum().eval()), MAX, DataLoader(TensorDataset(x), batch_size=8))
    assert_ranges([found], [per_slice(x, lambda part: part.abs().max())])


def test_a_progress_bar_unless_told_not_to(capsys: pytest.CaptureFixture[str]) -> None:
    model = analog(network())
    calibrate_input_ranges(model, MAX, samples())
    assert "calibrating input ranges: 100%" in (shown := capsys.readouterr().err)
    assert "3/3" in shown
    calibrate_input_ranges(model, MAX, samples(), verbose=False)
    assert capsys.readouterr() == ("", "")


def test_without_tqdm_there_is_no_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    calibrate_input_ranges(analog(network()), MAX, samples())
    assert capsys.readouterr() == ("", "")


# ---- Afterwards ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("enabled", [True, False], ids=["range on before", "range off before"])
def test_the_range_is_on_and_a_parameter_that_is_trained_if_the_config_says_so(enabled: bool, learned: bool) -> None:
    def change(config: TorchInferenceRPUConfig) -> None:
        config.pre_post.input_range.enable = enabled
        config.pre_post.input_range.learn_input_range = learned

    model = analog(network(), change)
    before = [layer.input_range for layer in model.analog_layers()]
    calibrate(model, MAX, samples())
    for layer, old in zip(model.analog_layers(), before, strict=True):
        assert layer.rpu_config.pre_post.input_range.enable
        assert isinstance(layer.input_range, nn.Parameter)
        assert layer.input_range.requires_grad == learned
        assert old is None or layer.input_range is old
    assert [name for name, _ in model.named_parameters() if "range" in name] == ["0.input_range", "2.0.input_range"]


def test_outputs_are_clipped_to_the_new_ranges() -> None:
    digital, x = nn.Linear(25, 4).eval(), torch.randn(50, 25)
    model = analog(digital)
    (found,) = calibrate(model, MOVING_STD, [x], std_alpha=1.0)
    clipped = torch.cat([part.clamp(-r, r) for part, r in zip(cut(x, 3), found, strict=True)], 1)
    torch.testing.assert_close(model(x), digital(clipped))


@all_kinds
def test_a_calibrated_model_can_be_trained_with_converters_on(kind: InputRangeCalibrationType) -> None:
    model, batches = analog(network()), samples()
    found = calibrate(model, kind, batches)
    for layer in model.analog_layers():
        layer.rpu_config.forward.inp_res = 254
    model.train()
    optimizer = AnalogOptimizer(torch.optim.SGD, model.analog_layers, model.parameters(), lr=0.01)
    loss = model(batches[0]).square().mean()
    loss.backward()
    assert_ranges(ranges_of(model), found)  # the data of the training forward no longer set them
    for _ in range(5):
        optimizer.step()
        optimizer.zero_grad()
        model(batches[0]).square().mean().backward()
    for layer, old in zip(model.analog_layers(), found, strict=True):
        assert layer.input_range.isfinite().all()
        assert not torch.equal(layer.input_range, old)


def test_a_calibrated_model_round_trips_through_a_state_dict() -> None:
    digital, batches = network(), samples()
    model = analog(digital)
    found = calibrate(model, MOVING_QUANTILE, batches, quantile=0.9)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = analog(network())
    loaded.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(loaded(batches[0]), model(batches[0]))
    loaded.train()
    loaded(batches[0])
    assert_ranges(ranges_of(loaded), found)  # the start-up is over there too


def test_a_calibrated_model_can_be_calibrated_again() -> None:
    model, batches = analog(network()), samples()
    calibrate(model, MAX, [100 * batch for batch in batches])
    assert_ranges(calibrate(model, MAX, batches), calibrate(copy.deepcopy(model), MAX, batches))
    assert ranges_of(model)[0].max() < 10


def test_weights_that_are_computed_from_others() -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    layer = AnalogLinear(25, 4, rpu_config=tiles())
    parametrize.register_parametrization(layer, "weight", Half())
    (found,) = calibrate(AnalogSequential(layer).eval(), MAX, [x := torch.randn(5, 25)])
    assert_ranges([found], [per_slice(x, lambda part: part.abs().max())])


def test_set_input_range_ends_the_start_up_and_refuses_what_does_not_fit() -> None:
    layer = AnalogLinear(25, 4, rpu_config=tiles(ranged))
    layer.set_input_range(torch.tensor([1.0, 2.0, 3.0]))
    layer(torch.randn(5, 25))
    assert layer.input_range is not None
    assert layer.input_range.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match=r"values: got shape \(2,\); \(3,\) is needed"):
        layer.set_input_range(torch.ones(2))
    for bad in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match=r"values: .* finite numbers are needed"):
            layer.set_input_range(torch.tensor([1.0, bad, 3.0]))
    with pytest.raises(TypeError, match=r"values: got list; a torch.Tensor is needed"):
        layer.set_input_range([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"input_range: this layer stores none; .* layer\.reconfigure"):
        AnalogLinear(25, 4, rpu_config=tiles()).set_input_range(torch.ones(3))


# ---- A model from digital training to 8 bits ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Any:
    """A digitally trained network and its data, of the example."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    import digits as example

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the example does: the tensors are too small to be shared between cores
    data, model = example.load_data(), example.network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for images, labels in example.batches(data, 800):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return model.eval(), data


@torch.no_grad()
def accuracy(model: nn.Module, data: Any) -> float:
    """In percent."""
    return (model(data.test_x).argmax(1) == data.test_y).float().mean().item() * 100


def eight_bit_weights(config: TorchInferenceRPUConfig) -> None:
    config.mapping.max_input_size = 32
    config.modifier.quantization_type, config.modifier.res = WeightQuantizationType.DISCRETIZE_PER_CHANNEL, 2**8 - 2
    config.clip.type = WeightClipType.LEARNABLE_PER_CHANNEL


@all_kinds
def test_post_training_quantization_to_8_bits_keeps_the_accuracy(kind: InputRangeCalibrationType, digits: Any) -> None:
    digital, data = digits
    assert accuracy(digital, data) > 95
    model = analog(digital, eight_bit_weights)
    calibrate(model, kind, data.train_x.split(128))
    model.quantize_weights()
    for layer in model.analog_layers():
        layer.rpu_config.forward.inp_res = 2**8 - 2
        for part in cut(layer.weight.detach(), layer.slices):
            assert all(len(channel.unique()) <= 2**8 - 1 for channel in part)
    assert abs(accuracy(model, data) - accuracy(digital, data)) <= 1


def test_an_evaluation_in_int8_gives_the_outputs_of_the_quantized_weights(digits: Any, device: torch.device) -> None:
    """Weights that the config quantizes are multiplied as int8; those that ``quantize_weights`` stored, in their dtype."""
    digital, data = digits
    model = analog(digital, eight_bit_weights)
    calibrate(model, MAX, data.train_x.split(512))
    for layer in model.analog_layers():
        layer.rpu_config.forward.inp_res = 2**8 - 2
    baked = copy.deepcopy(model)
    baked.quantize_weights()
    x = data.test_x[:32].to(device)
    with torch.no_grad(), launch.backend("kernel"):
        outputs = model.to(device)(x)
    torch.testing.assert_close(outputs, baked.to(device)(x).detach(), atol=1e-3, rtol=1e-3)
