"""Models on simulated chips: what programming, time and compensation do to a whole model, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from helpers import needs_interpreter
from test_nn_experts import analog as stacked_experts
from torch import Tensor, nn

from triton_analog import (
    AnalogOptimizer,
    InputRangeCalibrationType,
    TorchInferenceRPUConfig,
    calibrate_input_ranges,
    convert_to_analog,
    convert_to_digital,
    export_to_aihwkit,
    launch,
)
from triton_analog.config import WeightClipType, WeightQuantizationType
from triton_analog.inference import (
    AdditivePerChannelNoiseModel,
    PCMLikeNoiseModel,
    PolynomialNoiseModel,
    ReRamCMONoiseModel,
    ReRamWan2022NoiseModel,
    evaluate,
    evaluation,
    program,
)
from triton_analog.nn import AnalogLinear

DAY = 86400.0
PCM = PCMLikeNoiseModel()
QUIET = PolynomialNoiseModel(prog_coeff=(0.0,))
"""Devices that hold just what is wanted."""
DECAY = PolynomialNoiseModel(prog_coeff=(0.0,), drift_mean_coeff=(0.1,))
"""Devices that all drift alike."""


def config(**kinds) -> TorchInferenceRPUConfig:
    made = TorchInferenceRPUConfig()
    made.mapping.max_input_size = 16
    made.forward.inp_res = made.forward.out_res = 254
    made.forward.out_bound = 10.0
    made.pre_post.input_range.enable = True
    made.pre_post.input_range.init_from_data = 0
    for path, value in kinds.items():
        section, _, name = path.partition("__")
        setattr(getattr(made, section), name, value)
    return made


def network(**kinds) -> nn.Module:
    digital = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 10))
    return convert_to_analog(digital, config(**kinds)).eval()


def inputs() -> Tensor:
    return torch.randn(32, 24)


def off(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


# ---- The chip ------------------------------------------------------------------------------------------------------


KINDS = {
    "plain": {},
    "learned clip": {"clip__type": WeightClipType.LEARNABLE_PER_CHANNEL},
    "quantized": {"modifier__quantization_type": WeightQuantizationType.DISCRETIZE_PER_CHANNEL, "modifier__res": 30},
    "clip per channel": {"clip__type": WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL, "clip__sigma": 2.5},
}


@pytest.mark.parametrize("compensation", ["none", "global", "per_column"])
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_devices_without_noise_compute_as_the_model_does(kinds, compensation):
    model, x = network(**kinds), inputs()
    chip = program(model, QUIET, compensation=compensation)
    torch.testing.assert_close(chip(x), model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(chip.drift_to(DAY)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compensation", ["global", "per_column"])
def test_drift_that_all_devices_share_is_compensated_whole(compensation):
    model, x = network(forward__out_res=-1, forward__out_bound=0.0), inputs()
    assert off(program(model, DECAY, compensation="none").drift_to(DAY)(x), model(x)) > 0.3
    assert off(program(model, DECAY, compensation=compensation).drift_to(DAY)(x), model(x)) < 1e-5


def test_compensation_scales_what_the_converter_gave():
    layer = AnalogLinear(12, 8, bias=False, rpu_config=config()).eval()
    x = torch.randn(5, 12)
    bare, compensated = (program(layer, DECAY, compensation=kind).drift_to(DAY)(x) for kind in ("none", "global"))
    torch.testing.assert_close(compensated, bare * ((DAY + 20) / 20) ** 0.1)


def test_drift_without_compensation_scales_the_product():
    layer = AnalogLinear(8, 4, bias=False, rpu_config=TorchInferenceRPUConfig()).eval()
    x = torch.randn(5, 8)
    chip = program(layer, DECAY, compensation="none").drift_to(DAY)
    torch.testing.assert_close(chip(x), layer(x) * ((DAY + 20) / 20) ** -0.1)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("kind", [WeightQuantizationType.DISCRETIZE, WeightQuantizationType.DISCRETIZE_PER_CHANNEL])
def test_quantized_weights_are_programmed_whole(kind, per_channel):
    """One step for a whole tile may lift a column's largest weight above what it was."""
    layer = AnalogLinear(64, 48, bias=False, rpu_config=quantized(kind)).eval()
    with torch.no_grad():
        layer.weight *= torch.linspace(0.1, 1, 48)[:, None]
    x = torch.randn(8, 64)
    torch.testing.assert_close(program(layer, QUIET, per_channel=per_channel)(x), layer(x), rtol=1e-5, atol=1e-5)


def quantized(kind: WeightQuantizationType) -> TorchInferenceRPUConfig:
    made = TorchInferenceRPUConfig()
    made.modifier.quantization_type, made.modifier.res = kind, 30
    return made


def test_times_go_back_and_forth_on_one_chip():
    chip, x = program(network(), PCM, seed=3), inputs()
    programmed = chip(x)
    assert chip.time is None
    first, second = chip.drift_to(1.0)(x), chip.drift_to(DAY)(x)
    assert chip.time == DAY
    assert torch.equal(chip.drift_to(1.0)(x), first)
    assert torch.equal(chip.drift_to(DAY)(x), second)
    assert not torch.equal(first, second)
    assert not torch.equal(first, programmed)


def test_a_seed_is_a_chip():
    model, x = network(), inputs()
    same = [program(model, PCM, seed=seed).drift_to(DAY)(x) for seed in (1, 1, 2)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


@needs_interpreter
def test_a_seed_is_the_same_chip_on_every_backend():
    model, x = network(), inputs()
    found = []
    for backend in ("kernel", "reference"):
        with launch.backend(backend):
            found.append(program(model, PCM, seed=1).drift_to(DAY)(x))
    assert off(*found) < 5e-3  # steps of converters apart


def test_layers_differ():
    twins = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    twins[1].load_state_dict(twins[0].state_dict())
    chip = program(convert_to_analog(twins, TorchInferenceRPUConfig()), PCM)
    x = torch.randn(4, 16)
    assert not torch.equal(chip.model[0](x), chip.model[1](x))


def test_layers_that_share_a_weight_share_its_tile():
    twins = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    twins[2].weight = twins[0].weight
    chip = program(convert_to_analog(twins, TorchInferenceRPUConfig()), PCM)
    assert chip.model[0].programmed is chip.model[2].programmed


def test_the_model_stays_as_it_was():
    model, x = network().train(), inputs()
    before, outputs = copy.deepcopy(model.state_dict()), model.eval()(x)
    model.train()
    chip = program(model, PCM).drift_to(DAY)
    chip(x)
    assert model.training
    assert not chip.training
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(model.eval()(x), outputs)
    pairs = list(zip(chip.model.parameters(), model.parameters(), strict=True))
    assert all((a.data_ptr() == b.data_ptr()) == (b.ndim > 1) for a, b in pairs)  # matrices are in the same memory
    assert not any(a.requires_grad for a, _ in pairs)


DONE_TO_A_CHIP = {
    "half": lambda chip: chip.model.half(),
    "double": lambda chip: chip.model.double(),
    "set_input_range": lambda chip: chip.model[0].set_input_range(chip.model[0].input_range * 2),
    "a bias": lambda chip: chip.model[0].bias.data.zero_(),
    "backward": lambda chip: chip(inputs().requires_grad_()).sum().backward(),
}


@pytest.mark.parametrize("name", DONE_TO_A_CHIP)
def test_what_is_done_to_the_model_on_a_chip_does_not_reach_the_one_it_was_made_of(name):
    model, x = network(), inputs()
    before, output = copy.deepcopy(model.state_dict()), model(x)
    DONE_TO_A_CHIP[name](program(model, PCM).drift_to(DAY))
    after = model.state_dict()
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(x), output)


def test_what_is_done_to_the_model_does_not_reach_its_chip():
    model, x = network(), inputs()
    chip = program(model, PCM).drift_to(DAY)
    output = chip(x)
    with torch.no_grad():
        model[0].bias.fill_(7.0)
        model[0].input_range.fill_(0.1)
    model.double()
    assert torch.equal(chip(x), output)
    assert torch.equal(chip.drift_to(1.0).drift_to(DAY)(x), output)


@pytest.mark.parametrize("name", ["time", "seed", "noise_model"])
def test_what_a_chip_is_cannot_be_assigned(name):
    chip = program(network(), PCM, seed=np.int64(3))
    assert (chip.time, chip.seed, chip.noise_model) == (None, 3, PCM)
    with pytest.raises(AttributeError):
        setattr(chip, name, 1)


def test_a_model_that_was_made_in_inference_mode():
    with torch.inference_mode():
        model, x = network(), inputs()
        calibrate_input_ranges(model, InputRangeCalibrationType.MAX, [x], verbose=False)
        wanted = program(model, PCM).drift_to(DAY)(x)
        clipped = convert_to_analog(nn.Linear(16, 4), config(clip__type=WeightClipType.LEARNABLE_PER_CHANNEL))
        clipped(x[:, :16])
    with torch.no_grad():
        assert torch.equal(program(model, PCM).drift_to(DAY)(x.clone()), wanted)


def test_a_metric_may_be_infinite_or_no_number_on_some_chips(tmp_path):
    given = iter([1.0, math.inf, 2.0, 3.0, math.nan])
    found = evaluate(network(), lambda model: next(given), noise_model=PCM, times=(1.0, DAY), seeds=2, verbose=False)
    assert found.values[0] == (math.inf, 2.0)
    assert found.values[1][0] == 3.0
    assert found.means == pytest.approx((math.inf, math.nan), nan_ok=True)
    assert all(map(math.isnan, found.deviations))
    assert "after 1 s" in str(found)
    assert "inf +- nan" in str(found)
    read = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert read["values"] == [[None, 2.0], [3.0, None]]
    found.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_times_must_differ():
    with pytest.raises(ValueError, match=r"times: got \(1.0, 1.0\); each must be another"):
        evaluate(network(), lambda model: np.array([1.0]), noise_model=PCM, times=(1.0, 1.0), verbose=False)


def test_the_model_on_a_chip_takes_no_other_weights():
    model = network()
    before = copy.deepcopy(model.state_dict())
    chip = program(model, PCM)
    with pytest.raises(ValueError, match="a chip loads nothing"):
        chip.model.load_state_dict({name: 2 * value for name, value in before.items()})
    with pytest.raises(ValueError, match="on a simulated chip"):
        chip.model[0].reset_parameters()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    model.load_state_dict(before)


def test_a_larger_scale_for_columns_with_small_weights_is_more_exact():
    torch.manual_seed(0)
    layer = AnalogLinear(64, 32, bias=False, rpu_config=TorchInferenceRPUConfig()).eval()
    with torch.no_grad():
        layer.weight[1:] *= 0.05
    x = torch.randn(64, 64)
    errors = {
        per_channel: off(program(layer, PCM, per_channel=per_channel)(x)[:, 1:], layer(x)[:, 1:])
        for per_channel in (True, False)
    }
    assert errors[True] < 0.3 * errors[False]


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
        (lambda: nn.Conv1d(3, 4, 3), (2, 3, 9)),
        (lambda: nn.LSTM(6, 5), (7, 2, 6)),
        (lambda: nn.GRU(6, 5, bidirectional=True), (7, 2, 6)),
    ],
    ids=["groups", "conv1d", "lstm", "gru"],
)
def test_every_kind_of_layer(build, shape):
    model, x = convert_to_analog(build(), config()).eval(), torch.randn(shape)

    def output(module: nn.Module) -> Tensor:
        y = module(x)
        return y[0] if isinstance(y, tuple) else y

    assert off(output(program(model, QUIET)), output(model)) < 1e-3
    assert 1e-3 < off(output(program(model, PCM).drift_to(DAY)), output(model)) < 1


def test_experts_each_have_their_tiles():
    model, x = stacked_experts(config()).eval(), torch.randn(6, 6)
    assert off(program(model, QUIET)(x), model(x)) < 1e-3
    assert off(program(model, PCM).drift_to(DAY)(x), model(x)) > 1e-3


def test_narrow_dtypes_and_autocast():
    model, x = network(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = program(model, PCM)(x)
        assert y.dtype == torch.bfloat16
        assert 1e-3 < off(y.float(), model(x).float()) < 0.5
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    assert off(program(narrow, PCM).drift_to(DAY)(x.bfloat16()).float(), model(x)) < 0.5


def test_autocast_leaves_the_chip_as_it_was():
    chip, x = program(network(), PCM), inputs()
    before = chip(x)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = chip(x)
    assert torch.equal(chip(x), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chip(x), narrow)


def test_a_compiled_model_is_the_same_chip():
    model, x = network(), inputs()
    assert torch.equal(program(torch.compile(model, backend="eager"), PCM)(x), program(model, PCM)(x))


def test_a_chip_that_was_made_under_inference_mode_works_outside():
    model, x = network(), inputs()
    with torch.inference_mode():
        chip = program(model, PCM).drift_to(1.0)
    assert torch.equal(chip(x), program(model, PCM).drift_to(1.0)(x))


def test_a_chip_has_what_its_model_has():
    model = network()
    model.vocabulary = 7
    chip = program(model, PCM)
    assert chip.vocabulary == 7
    assert len(list(chip.analog_layers())) == 2
    with pytest.raises(AttributeError, match="nothing"):
        _ = chip.nothing


def test_copies_and_pickles_are_the_same_chip():
    chip, x = program(network(), PCM).drift_to(DAY), inputs()
    for other in (copy.deepcopy(chip), pickle.loads(pickle.dumps(chip))):
        assert torch.equal(other(x), chip(x))
        assert torch.equal(other.drift_to(1.0)(x), chip.drift_to(1.0)(x))
        chip.drift_to(DAY)


def test_a_compiled_chip_drifts():
    chip, x = program(network(), PCM), inputs()
    compiled = torch.compile(chip, backend="eager", fullgraph=True)
    for time in (1.0, DAY):
        chip.drift_to(time)
        assert torch.equal(compiled(x), chip(x))


# ---- Refusals ------------------------------------------------------------------------------------------------------


def test_a_chip_is_not_trained():
    chip = program(network(), PCM)
    with pytest.raises(ValueError, match="mode: a chip is for evaluation"):
        chip.train()
    chip.model.train()
    with pytest.raises(ValueError, match="training: a layer on a simulated chip only evaluates"):
        chip.model(inputs())


def test_weights_that_changed_since_are_noticed():
    model = network()
    chip = program(model, PCM)
    first = [layer.programmed.as_(torch.float32, False)[0] for layer in chip.analog_layers()]
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(ValueError, match="the weight of '2' was changed since it was programmed"):
        chip.drift_to(1.0)
    after = [layer.programmed.as_(torch.float32, False)[0] for layer in chip.analog_layers()]
    assert all(a is b for a, b in zip(first, after, strict=True))  # none has moved


SHARED = [
    (lambda chip: chip.bfloat16(), "a chip stays where it was made"),
    (lambda chip: chip.load_state_dict({}), "a chip loads nothing"),
    (lambda chip: chip.requires_grad_(False), "its parameters are those of the model"),
    (
        lambda chip: calibrate_input_ranges(chip, InputRangeCalibrationType.MAX, [inputs()]),
        "which calibration would not touch",
    ),
    (lambda chip: convert_to_digital(chip), "which a conversion would not touch"),
    (lambda chip: convert_to_analog(chip, config()), "which a conversion would not touch"),
    (lambda chip: export_to_aihwkit(chip.model), "which an export would not touch"),
    (lambda chip: chip.model[0].set_weights(torch.zeros(20, 24)), "which a change of the weight would not touch"),
    (lambda chip: AnalogOptimizer(torch.optim.SGD, chip.analog_layers, chip.parameters(), lr=0.1), "an optimizer"),
]


@pytest.mark.parametrize(("act", "message"), SHARED, ids=[message for _, message in SHARED])
def test_what_would_change_the_model_instead_of_the_chip_is_refused(act, message):
    if "export" in message:
        pytest.importorskip("aihwkit", reason="aihwkit is an optional peer")
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        act(program(model, PCM))
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def released():
    chip = program(network(), PCM)
    chip.release()
    return chip


BAD = [
    (lambda: program(nn.Linear(2, 2), PCM), ValueError, "has no analog layers"),
    (lambda: program("model", PCM), TypeError, "model: got str"),
    (lambda: program(network(), PCMLikeNoiseModel), TypeError, "noise_model: got <class"),
    (lambda: program(network(), PCM, seed=0.5), TypeError, r"seed: got 0\.5"),
    (lambda: program(network(), PCM, compensation="column"), ValueError, "compensation: got 'column'"),
    (lambda: program(program(network(), PCM), PCM), ValueError, "on a chip already"),
    (lambda: released()(inputs()), ValueError, "it was released"),
    (lambda: released().drift_to(1.0), ValueError, "it was released"),
    (lambda: program(network(), PCM).drift_to(-1.0), ValueError, r"time: got -1\.0"),
    (lambda: program(network(), PCM).drift_to(math.inf), ValueError, "time: got inf"),
    (
        lambda: program(network(), ReRamWan2022NoiseModel()).drift_to(5.0),
        ValueError,
        "was measured at 1, 86400, 172800 s",
    ),
]


@pytest.mark.parametrize(("act", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_what_makes_no_sense_is_refused_by_name(act, error, message):
    with pytest.raises(error, match=message):
        act()


# ---- Evaluation ----------------------------------------------------------------------------------------------------


def test_evaluation_over_chips_and_times(tmp_path):
    model, x = network(), inputs()
    y = model(x)

    def error(candidate: nn.Module) -> Tensor:
        return (candidate(x) - y).norm() / y.norm()

    model.train()
    found = evaluate(model, error, noise_model=PCM, times=(1.0, DAY), seeds=(4, 7, 9), verbose=False)
    assert model.training
    assert found.ideal == 0
    expected = [[float(error(program(model, PCM, seed).drift_to(t))) for t in (1.0, DAY)] for seed in (4, 7, 9)]
    assert found.values == tuple(map(tuple, expected))
    torch.testing.assert_close(torch.tensor(found.means), torch.tensor(expected).mean(0))
    torch.testing.assert_close(torch.tensor(found.deviations), torch.tensor(expected).std(0))
    assert found.means[1] > found.means[0]
    assert json.loads(found.to_json())["values"] == expected
    lines = str(found).splitlines()
    assert lines[0] == "error on 3 chips"
    assert lines[1].split() == ["without", "a", "chip", "0"]
    assert lines[3].startswith("after 1 day")
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "time.png")
    assert (tmp_path / "time.png").stat().st_size > 1000


REFUSED = [
    ({"metric": lambda model: "good"}, TypeError, "metric: it gave 'good'"),
    ({"metric": lambda model: torch.ones(2)}, TypeError, "metric: it gave tensor"),
    ({"metric": None}, TypeError, "metric: got NoneType"),
    ({"times": ()}, ValueError, "times: none given"),
    ({"times": (1.0, -2.0)}, ValueError, r"time: got -2\.0"),
    ({"seeds": 0}, ValueError, "seeds: got 0"),
    ({"seeds": 1.5}, ValueError, r"seeds: got 1\.5"),
    ({"seeds": (1, 2, 1)}, ValueError, r"seeds: got \(1, 2, 1\); each must be another"),
    ({"seeds": None}, ValueError, "seeds: got None"),
    ({"times": 3600.0}, TypeError, r"times: got 3600\.0"),
    ({"per_channel": "no"}, TypeError, "per_channel: got 'no'"),
    ({"noise_model": ReRamWan2022NoiseModel()}, ValueError, "was measured at"),
    ({"model": nn.Linear(2, 2)}, ValueError, "has no analog layers"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_an_evaluation_that_cannot_be_is_refused_before_any_chip_is_made(change, error, message, monkeypatch):
    monkeypatch.setattr(evaluation, "program", lambda *args, **kwargs: pytest.fail("a chip was made"))
    given = {"model": network(), "metric": lambda model: 1.0, "noise_model": PCM} | change
    with pytest.raises(error, match=message):
        evaluate(given.pop("model"), given.pop("metric"), verbose=False, **given)


@pytest.mark.parametrize(
    "kind", [ReRamCMONoiseModel(), AdditivePerChannelNoiseModel(std=0.05)], ids=lambda k: type(k).__name__
)
def test_cells_of_one_device(kind):
    model, x = network(), inputs()
    chip = program(model, kind)
    assert off(chip(x), model(x)) < 0.3
    assert off(chip.drift_to(DAY)(x), model(x)) < 0.5
