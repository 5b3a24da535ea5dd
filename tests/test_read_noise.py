"""Read noise of weights, new in each forward: of the configs (``forward.w_noise``), and of the devices of a chip."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from helpers import needs_interpreter
from torch import Tensor, nn

import triton_analog.ops as ops
from triton_analog import TorchInferenceRPUConfig, convert_to_analog, launch
from triton_analog.config import ConfigError, WeightClipType, WeightNoiseType, WeightQuantizationType
from triton_analog.inference import (
    AdditivePerChannelNoiseModel,
    PCMLikeNoiseModel,
    PolynomialNoiseModel,
    evaluate,
    program,
)
from triton_analog.nn import AnalogLinear

DAY = 86400.0
PCM = PCMLikeNoiseModel()
QUIET = PolynomialNoiseModel(prog_coeff=(0.0,))
READ = PolynomialNoiseModel(prog_coeff=(0.0,), drift_mean_coeff=(0.05,), read_coeff=(0.01,))
"""Devices that all drift alike, and whose reading misses by a share of what they hold."""
SAMPLES = 2000
KINDS = [WeightNoiseType.ADDITIVE_CONSTANT, WeightNoiseType.PCM_READ]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def config(kind: WeightNoiseType = WeightNoiseType.PCM_READ, std: float = 0.02, **fields: Any) -> Any:
    made = TorchInferenceRPUConfig()
    made.forward.w_noise, made.forward.w_noise_type = std, kind
    made.mapping.max_input_size = 16
    for path, value in fields.items():
        section, _, name = path.partition("__")
        setattr(getattr(made, section), name, value)
    return made


def read(layer: nn.Module, features: int, forwards: int = 1) -> Tensor:
    """What forwards see of a weight: ``[forwards, N, K]``."""
    with torch.no_grad():
        return torch.stack([layer(torch.eye(features)).T for _ in range(forwards)])


def layer_of(rows: Tensor, made: Any) -> AnalogLinear:
    """Its weight has each of ``rows`` SAMPLES times, so that a forward reads each as often."""
    layer = AnalogLinear(rows.shape[1], len(rows) * SAMPLES, bias=False, rpu_config=made).eval()
    with torch.no_grad():
        layer.weight.copy_(rows.repeat(SAMPLES, 1))
    return layer


def samples_of(model: nn.Module, rows: Tensor) -> Tensor:
    """What one forward sees of each of the rows of :func:`layer_of`: ``[SAMPLES, rows, K]``."""
    return read(model, rows.shape[1])[0].unflatten(0, (SAMPLES, len(rows)))


def errors(samples: Tensor, std: Tensor) -> Tensor:
    """How many standard errors the deviations of many samples are from ``std``."""
    return (samples.var(0).sqrt() / std - 1) * math.sqrt(2 * len(samples))


# ---- Of the config ---------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("clip", [WeightClipType.NONE, WeightClipType.LAYER_GAUSSIAN_PER_CHANNEL])
def test_every_forward_reads_with_the_stated_deviation(kind, clip):
    """One scale for a slice, or one for each of its outputs, as the output converter's."""
    w = torch.randn(5, 24)
    samples = samples_of(layer_of(w, config(kind, clip__type=clip, clip__sigma=2.5)), w)
    wmax = torch.stack([part.abs().amax(1) for part in w.split(12, 1)])
    if clip is WeightClipType.NONE:
        wmax = wmax.amax(1, keepdim=True).expand(2, 5)
    scale = wmax.T.repeat_interleave(12, 1)
    std = 0.02 * (scale if kind is WeightNoiseType.ADDITIVE_CONSTANT else (scale * w.abs()).sqrt())
    assert errors(samples, std).abs().max() < 5
    assert ((samples.mean(0) - w) / std * math.sqrt(SAMPLES)).abs().max() < 5


@every_kind
def test_an_output_has_the_deviation_that_aihwkit_gives_it(kind):
    """AIHWKIT adds ``w_noise * norm(x)``, or ``w_noise * sqrt(abs(W) @ x**2)`` for PCM, at the output of a tile of weights
    in -1 .. 1."""
    x, w = torch.randn(1, 16), torch.randn(6, 16)
    w /= w.abs().max()
    with torch.no_grad():
        samples = layer_of(w, config(kind))(x).view(SAMPLES, 6)
    std = x.norm().expand(6) if kind is WeightNoiseType.ADDITIVE_CONSTANT else (w.abs() @ x[0] ** 2).sqrt()
    assert errors(samples, 0.02 * std).abs().max() < 5


def test_each_forward_is_another_reading_and_torchs_seed_repeats_it():
    layer = AnalogLinear(20, 8, rpu_config=config()).eval()
    torch.manual_seed(3)
    first, second = read(layer, 20, 2)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(read(layer, 20)[0], first)


def test_the_stored_weight_and_training_have_none_of_it():
    layer, exact = (AnalogLinear(20, 8, rpu_config=config(std=std)) for std in (0.02, 0.0))
    exact.load_state_dict(layer.state_dict() | {"_extra_state": exact.state_dict()["_extra_state"]})
    before = layer.weight.detach().clone()
    assert torch.equal(read(layer, 20), read(exact, 20))
    assert not torch.equal(read(layer.eval(), 20), read(exact.eval(), 20))
    assert torch.equal(layer.weight, before)


@needs_interpreter
@every_kind
def test_a_seed_is_the_same_reading_on_every_backend(kind):
    layer = AnalogLinear(20, 8, rpu_config=config(kind)).eval()
    found = []
    for backend in ("kernel", "reference"):
        torch.manual_seed(1)
        with launch.backend(backend):
            found.append(read(layer, 20))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_gradients_in_evaluation_are_of_what_was_read():
    layer, x = AnalogLinear(20, 8, bias=False, rpu_config=config()).eval(), torch.randn(6, 20, requires_grad=True)
    y = layer(x)
    rows = [torch.autograd.grad(y[0, n], x, retain_graph=True)[0][0] for n in range(8)]
    torch.testing.assert_close(x.detach() @ torch.stack(rows).T, y.detach(), rtol=1e-5, atol=1e-6)
    y.sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.detach().sum(0).expand(8, 20))


SETTINGS = {
    "converters": {"forward__inp_res": 254, "forward__out_res": 254, "forward__out_bound": 10.0},
    "quantized": {"modifier__quantization_type": WeightQuantizationType.DISCRETIZE_PER_CHANNEL, "modifier__res": 30},
    "learned clip": {"clip__type": WeightClipType.LEARNABLE_PER_CHANNEL},
}


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)
def test_it_is_added_to_what_the_tiles_hold(fields):
    made = config(**fields)
    made.pre_post.input_range.enable = True
    noisy = AnalogLinear(20, 8, rpu_config=made).eval()
    exact = copy.deepcopy(noisy)
    exact.rpu_config.forward.w_noise_type, exact.rpu_config.forward.w_noise = WeightNoiseType.NONE, 0.0
    off = (read(noisy, 20) - read(exact, 20)).norm() / read(exact, 20).norm()
    assert 5e-3 < off < 0.1


@pytest.mark.parametrize(
    ("build", "shape", "products"),
    [
        (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5), 1),
        (lambda: nn.LSTM(6, 5), (7, 2, 6), 2),
        (lambda: nn.GRU(6, 5, bidirectional=True), (7, 2, 6), 4),
    ],
    ids=["groups", "lstm", "gru"],
)
@pytest.mark.parametrize("on_chip", [False, True])
def test_a_forward_reads_each_weight_once(build, shape, products, on_chip, monkeypatch):
    model, x = convert_to_analog(build(), config()).eval(), torch.randn(shape)
    model = program(model, READ, read_noise="forward").drift_to(DAY) if on_chip else model
    readings, of_operation = [], ops.program

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        readings.append(args)
        return of_operation(*args, **kwargs)

    monkeypatch.setattr(ops, "program", counted)
    with torch.no_grad():
        model(x)
    assert len(readings) == products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_and_autocast(dtype):
    layer = AnalogLinear(20, 8, rpu_config=config()).eval()
    exact = layer.weight.detach()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert 5e-3 < (layer(torch.eye(20)) - layer.bias - exact.T).float().norm() / exact.norm() < 0.05
    layer = layer.to(dtype)
    with torch.no_grad():
        found = layer(torch.eye(20, dtype=dtype)).float() - layer.bias.float()
    assert 5e-3 < (found - exact.T).norm() / exact.norm() < 0.05


def test_a_compiled_layer_reads_as_an_eager_one_does():
    layer, x = AnalogLinear(20, 8, rpu_config=config()).eval(), torch.randn(4, 20)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    found = []
    for each in (layer, compiled):
        torch.manual_seed(5)
        found.append(each(x))
    assert torch.equal(*found)
    assert not torch.equal(compiled(x), found[0])


def test_a_negative_deviation_is_refused_also_later():
    with pytest.raises(ConfigError, match=r"forward\.w_noise: got -0\.1; must be >= 0"):
        AnalogLinear(4, 2, rpu_config=config(std=-0.1))
    layer = AnalogLinear(4, 2, rpu_config=config()).eval()
    layer.rpu_config.forward.w_noise = -0.1
    with pytest.raises(ConfigError, match=r"forward\.w_noise: got -0\.1; must be >= 0"):
        layer(torch.randn(2, 4))


# ---- Of a chip -------------------------------------------------------------------------------------------------------


def bare(**fields: Any) -> AnalogLinear:
    return AnalogLinear(16, 6, bias=False, rpu_config=config(WeightNoiseType.NONE, 0.0, **fields)).eval()


def test_devices_keep_their_conductance_and_are_read_anew():
    """A reading misses by a share of what a device holds; the mean is what it holds."""
    w = torch.randn(6, 16)
    layer = layer_of(w, config(WeightNoiseType.NONE, 0.0))
    chip = program(layer, READ, compensation="none", read_noise="forward").drift_to(DAY)
    samples, held = samples_of(chip, w), w * ((DAY + 20) / 20) ** -0.05
    std = held.abs() * 0.01 * math.sqrt(math.log((DAY + 20 + 250e-9) / 500e-9))
    assert errors(samples, std).abs().max() < 5
    assert ((samples.mean(0) - held) / std * math.sqrt(SAMPLES)).abs().max() < 5


@pytest.mark.parametrize("compensation", ["global", "per_column"])
def test_compensation_is_that_of_the_time(compensation):
    layer = bare()
    once, anew = (
        program(layer, PCM, compensation=compensation, read_noise=kind).drift_to(DAY) for kind in ("time", "forward")
    )
    still = program(layer, PCMLikeNoiseModel(read_noise_scale=0.0), compensation=compensation).drift_to(DAY)
    mean = read(anew, 16, 60).mean(0)
    assert (mean - read(still, 16)[0]).norm() < 0.5 * (read(once, 16)[0] - read(still, 16)[0]).norm()


def test_right_after_programming_nothing_has_been_read():
    layer = bare()
    found = read(program(layer, PCM, read_noise="forward"), 16, 2)
    assert torch.equal(*found)
    assert torch.equal(found[0], read(program(layer, PCM), 16)[0])


@every_kind
def test_the_noise_of_the_config_is_of_the_largest_conductance(kind):
    w = torch.randn(6, 16)
    samples = samples_of(program(layer_of(w, config(kind)), QUIET), w)
    # Each output's largest weight has the largest conductance.
    scale = w.abs().amax(1, keepdim=True).expand_as(w)
    std = 0.02 * (scale if kind is WeightNoiseType.ADDITIVE_CONSTANT else (scale * w.abs()).sqrt())
    assert errors(samples, std).abs().max() < 5


def test_compensation_also_lifts_the_noise_of_the_config():
    w, drift = torch.randn(6, 16), PolynomialNoiseModel(prog_coeff=(0.0,), drift_mean_coeff=(0.1,))
    samples = samples_of(program(layer_of(w, config(WeightNoiseType.ADDITIVE_CONSTANT)), drift).drift_to(DAY), w)
    std = 0.02 * w.abs().amax(1, keepdim=True).expand(6, 16) * ((DAY + 20) / 20) ** 0.1
    assert errors(samples, std).abs().max() < 5


def test_copies_pickles_and_compiled_chips_read_alike():
    chip, x = program(bare(), PCM, read_noise="forward").drift_to(DAY), torch.randn(3, 16)

    def reading(one: Any) -> Tensor:
        torch.manual_seed(2)
        return one(x)

    expected = reading(chip)
    for other in (
        copy.deepcopy(chip),
        pickle.loads(pickle.dumps(chip)),
        torch.compile(chip, backend="eager", fullgraph=True),
    ):
        assert torch.equal(reading(other), expected)
        assert not torch.equal(other(x), expected)


def test_an_evaluation_reads_anew_and_torchs_seed_repeats_it():
    layer, x = bare(), torch.randn(8, 16)

    def spread(model: Any) -> Tensor:
        return (model(x) - model(x)).norm()

    def values(**options: Any) -> Any:
        torch.manual_seed(0)
        return evaluate(layer, spread, noise_model=PCM, times=(1.0, DAY), seeds=2, verbose=False, **options).values

    assert values() == ((0, 0), (0, 0))
    found = values(read_noise="forward")
    assert all(value > 0 for row in found for value in row)
    assert values(read_noise="forward") == found


REFUSED = [
    ({"read_noise": "each"}, r"read_noise: got 'each'; allowed are 'time', 'forward'"),
    (
        {"read_noise": "forward", "noise_model": AdditivePerChannelNoiseModel(std=0.05)},
        "AdditivePerChannelNoiseModel has no read noise; take 'time', .* forward.w_noise",
    ),
    ({"read_noise": "forward", "noise_model": PCMLikeNoiseModel(read_noise_scale=0.0)}, "has no read noise"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_read_anew_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        program(bare(), **({"noise_model": PCM} | given))


# ---- Beside AIHWKIT --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("g", [0.0, 0.5, 10.0, 25.0])
def test_two_readings_of_a_device_differ_as_in_aihwkit(g, aihwkit):
    """Programmed once, with one exponent: what is left between two readings at a time is read noise."""
    side = 1024
    layer = AnalogLinear(side, side, bias=False, rpu_config=TorchInferenceRPUConfig()).eval()
    with torch.no_grad():
        layer.weight.fill_(g / 25)
        layer.weight[:, 0] = 1.0  # each output's largest conductance
    chip = program(layer, PCM, compensation="none", read_noise="forward").drift_to(DAY)
    one, other = (chip.model.programmed.as_(torch.float32, False)[0][:, 1:] * 25 for _ in range(2))
    found = (one - other).double()

    theirs = aihwkit.inference.noise.pcm.PCMLikeNoiseModel()
    wanted = 0.0
    for target in (torch.full((side * side,), g), torch.zeros(side * side)):  # the two devices of the pair
        held, nu = theirs.apply_programming_noise_to_conductance(target), theirs.generate_drift_coefficients(target)
        first, second = (theirs.apply_drift_noise_to_conductance(held, nu, DAY).double() for _ in range(2))
        wanted = wanted + first - second
    squares = [(x - x.mean()) ** 2 for x in (found, wanted)]
    error = math.sqrt(sum(float(s.var()) / s.numel() for s in squares))
    assert abs(squares[0].mean() - squares[1].mean()) <= 5 * error
