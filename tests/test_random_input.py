"""SEMANTICS 3.2: stochastic rounding of the input converter, and input noise behind it."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from helpers import all_dtypes, needs_interpreter, randn, seed_of, tensor
from test_noise import philox

from triton_analog import ops, reference
from triton_analog.config import ConfigError, IOParameters, TorchInferenceRPUConfig, WeightQuantizationType
from triton_analog.functional import analog_linear
from triton_analog.inference import PCMLikeNoiseModel, program
from triton_analog.lang import uniform_at, uniform_tile
from triton_analog.nn import AnalogLinear, AnalogRNN, AnalogVanillaRNNCell
from triton_analog.ops.dac import DacConfig, launch_dac, launch_dac_steps
from triton_analog.ops.matmul import MatmulConfig, launch_matmul
from triton_analog.reference.noise import INPUT_STREAM, ROUNDING_STREAM, noise, uniform

ROWS, FEATURES, COLUMNS, SLICES = 19, 50, 21, 3
RANDOM = [{"inp_sto_round": True}, {"inp_noise": 0.1}, {"inp_noise": 0.1, "inp_sto_round": True}]
all_random = pytest.mark.parametrize("random", RANDOM, ids=lambda random: "+".join(random))
both_ranges = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


@pytest.fixture
def operands(device):
    x, weight = randn(ROWS, FEATURES, device=device), randn(COLUMNS, FEATURES, device=device)
    return x, weight / FEATURES**0.5, tensor([0.5, -1.0, 2.0], device), seed_of(77, device)


def ranges_of(x, r, dynamic):
    return ops.absmax(x, SLICES) if dynamic else r


# ---- The uniform field ------------------------------------------------------------------------------------------------


def element(seed, m, n, stream, plane):
    """Element ``(m, n)``, from the documented counter, word and half."""
    counter = (8 * (m // 16) + m % 8, 4 * (n // 16) + n % 8 // 2, plane, stream)
    word = philox(counter, (seed % 2**32, seed // 2**32 % 2**32))[2 * (n // 8 % 2) + n % 2]
    return ((word >> 16 if m // 8 % 2 else word % 2**16) + 0.5) / 2**16


@triton.jit
def uniform_kernel(seed_ptr, tile_ptr, at_ptr, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    m, n = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    seed = tl.load(seed_ptr)
    tl.store(tile_ptr + m * COLS + n, uniform_tile(seed, row, col, 3, 5, ROWS, COLS))
    tl.store(at_ptr + m * COLS + n, uniform_at(seed, row + m, col + n, 3 + n * 0, 5))


@needs_interpreter
@pytest.mark.parametrize("seed", [0, -1, 0x0123456789ABCDEF])
@pytest.mark.parametrize(("rows", "row"), [(2, 24), (32, 48)])
def test_kernels_and_reference_have_the_documented_uniform_field(rows, row, seed, device):
    tile, at = torch.full((2, rows, 32), torch.nan, device=device)
    uniform_kernel[(1,)](seed_of(seed, device), tile, at, row, 16, ROWS=rows, COLS=32)
    expected = torch.tensor([[element(seed, row + m, 16 + n, 5, 3) for n in range(32)] for m in range(rows)])
    field = uniform(seed_of(seed), 81, 50, stream=5, plane=3)
    for found in (tile.cpu(), at.cpu(), field[row : row + rows, 16:48]):
        assert torch.equal(found, expected)


def test_the_uniform_field_is_uniform_and_its_lanes_are_uncorrelated():
    u = uniform(seed_of(42), 1024, 1024, stream=ROUNDING_STREAM).double()
    parts = torch.histc(u, 64, 0, 1) / u.numel()
    assert (parts - 1 / 64).abs().max() < 5 * math.sqrt(1 / 64 / u.numel())
    groups = (u - 0.5).reshape(64, 16, 64, 16)
    lanes = torch.stack([groups[:, m, :, n].flatten() for m in (0, 1, 8) for n in (0, 1, 2, 8, 9)]) * math.sqrt(12)
    correlation = lanes @ lanes.T / lanes.shape[1]
    assert (correlation - torch.eye(15)).triu(1).abs().max() < 5 / math.sqrt(lanes.shape[1])


# ---- The converter ----------------------------------------------------------------------------------------------------


def test_it_rounds_up_with_the_probability_of_the_fraction(backend, device):
    """Whole steps and the range itself stay; the mean of all others is what was to be converted."""
    values = tensor([0.0, 0.25, -0.25, 3.5, -7.9, 126.01, 127.0, -127.0, 500.0, 9.0], device)
    x = values.expand(1000, -1)
    out = ops.dac(x, tensor([127.0], device), 1, 254, inp_sto_round=True, seed=seed_of(5, device))
    values = values.clamp(-127, 127)
    down, up = values.floor(), values.ceil()
    assert ((out == down) | (out == up)).all()
    fraction = values - down
    error = (out.mean(0) - values).abs()
    assert (error <= 4.5 * (fraction * (1 - fraction) / len(x)).sqrt() + 2**-17).all()


@both_ranges
@pytest.mark.parametrize("res", [-1, 254])
def test_noise_is_normal_in_units_of_the_range_and_not_clamped(res, dynamic, backend, device):
    x = randn(20, device=device).expand(500, -1)
    r = ops.absmax(x, 2) if dynamic else tensor([0.3, -1.5], device)
    clean = ops.dac(x, r, 2, res)
    out = ops.dac(x, r, 2, res, inp_noise=0.05, seed=seed_of(6, device))
    size = r.abs().T if dynamic else r.abs().expand(500, 2)
    z = (out - clean) / (0.05 * size.repeat_interleave(10, dim=1))
    assert abs(z.mean()) < 5 / z.numel() ** 0.5
    assert abs(z.square().mean() - 1) < 5 * (2 / z.numel()) ** 0.5
    assert (out.abs() > size.repeat_interleave(10, dim=1)).any()
    assert torch.unique(z, dim=0).shape == z.shape


@both_ranges
@all_dtypes
@all_random
def test_the_formula_element_by_element(random, dtype, dynamic, backend, device, operands):
    x, _, r, seed = operands
    x = x.to(dtype)
    r, parts = ranges_of(x, r, dynamic), []
    for s, part in enumerate(torch.tensor_split(x.double().cpu(), SLICES, dim=1)):
        size = r[s].double().cpu().abs()
        size = size[:, None] if dynamic else size
        steps = (part * (127 / size)).clamp(-127, 127)
        q, u = steps.round(), uniform(seed, *part.shape, stream=ROUNDING_STREAM, plane=s)
        if "inp_sto_round" in random:
            q = steps.floor() + (u.cpu() < steps - steps.floor())
        q = q + 127 * random.get("inp_noise", 0) * noise(seed, *part.shape, stream=INPUT_STREAM, plane=s).cpu()
        parts.append(q * size / 127)
    expected = torch.cat(parts, 1)
    off = (ops.dac(x, r, SLICES, 254, seed=seed, **random).double().cpu() - expected).abs()
    slack = 3e-4 if device.type == "cuda" else 4e-6
    close = off <= slack + expected.abs() * torch.finfo(dtype).eps
    assert (~close).sum() <= (1 if dtype == torch.float32 else x.numel() // 25)  # a fraction that ties with its number
    steps = expected.abs().max() / 100
    assert off.max() <= steps


@all_random
def test_zeros_nan_and_empty_batches(random, backend, device):
    x, seed = randn(3, 40, device=device), seed_of(3, device)
    assert not ops.dac(x, tensor([0.0, 0.0], device), 2, 254, seed=seed, **random).any()
    x[1] = 0
    assert not ops.dac(x, ops.absmax(x, 2), 2, 254, seed=seed, **random)[1].any()
    x[2, 4] = torch.nan
    assert torch.equal(ops.dac(x, tensor([1.0, 1.0], device), 2, 254, seed=seed, **random).isnan(), x.isnan())
    assert ops.dac(x[:0], tensor([1.0, 1.0], device), 2, 254, seed=seed, **random).shape == (0, 40)


def test_steps_for_the_backward_are_rounded_alike(backend, device, operands):
    x, _, r, seed = operands
    for ranges in (r, ops.absmax(x, SLICES)):
        steps, _ = ops.dac_steps(x, ranges, SLICES, 254, inp_sto_round=True, seed=seed)
        values = launch_dac if backend == "kernel" else ops.dac
        out = values(x, ranges, SLICES, 254, inp_sto_round=True, seed=seed)
        size = ranges.abs() if ranges.ndim == 1 else ranges.T
        widths = tensor(reference.split_sizes(FEATURES, 17), device, torch.int64)
        unit = size.repeat_interleave(widths, dim=-1) / 127
        assert torch.equal(steps.float(), (out / unit).round())


@needs_interpreter
@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("config", [DacConfig(4, 32), DacConfig(16, 32), DacConfig(64, 64)])
def test_blocks_do_not_change_the_result(config, backend, device, operands):
    x, _, r, seed = operands
    random = RANDOM[2] | {"seed": seed}
    assert torch.equal(*[launch_dac(x, r, 3, 254, **random, config=c) for c in (None, config)])
    found, expected = ([*launch_dac_steps(x, r, 3, 254, True, seed, config=c)] for c in (None, config))
    assert torch.equal(found[0], expected[0])


# ---- The product and its gradients ------------------------------------------------------------------------------------


@both_ranges
@all_random
@pytest.mark.parametrize("res", [254, -1])
def test_the_product_is_that_of_the_converted_input(res, random, dynamic, backend, device, operands):
    if res < 0 and "inp_sto_round" in random:
        return
    x, weight, r, seed = operands
    r = ranges_of(x, r, dynamic)
    converted = ops.dac(x, r, SLICES, res, seed=seed, **random)
    y, _ = ops.matmul(x, weight, None, r, SLICES, inp_res=res, seed=seed, **random)
    torch.testing.assert_close(y, converted @ weight.T, rtol=1e-4, atol=2e-5)
    wmax = ops.absmax(weight, SLICES)
    adc = {"out_bound": 1.5, "bound_wmax": wmax}
    y, mask = ops.matmul(x, weight, None, r, SLICES, inp_res=res, seed=seed, **random, **adc)
    bound = 1.5 * wmax[:, None] * (r[..., None] if dynamic else r.abs()[:, None, None])
    parts = [
        (a @ b.T).clamp(-limit, limit)
        for a, b, limit in zip(*(torch.tensor_split(v, SLICES, 1) for v in (converted, weight)), bound, strict=True)
    ]
    torch.testing.assert_close(y, sum(parts), rtol=1e-4, atol=3e-5)
    assert mask.any()


@needs_interpreter
@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
def test_every_configuration_multiplies_the_same_input(backend, device, operands):
    """Also one that would convert in the loop, and one whose blocks reach beyond a slice, where noise must not."""
    x, weight, r, seed = operands
    options = {"inp_res": 254.0, "out_noise": 0.0, "noise_wmax": None, "out_bound": 0.0, "bound_wmax": None}
    options |= {"out_res": -1.0, "seed": seed} | RANDOM[2]
    expected, _ = reference.matmul(x, weight, None, r, SLICES, inp_res=254, seed=seed, **RANDOM[2])
    for config in (
        MatmulConfig(32, 64, 16, DESCRIPTORS=False),
        MatmulConfig(32, 64, 64, DESCRIPTORS=False),
        MatmulConfig(32, 64, 16, PREPARED=False, DESCRIPTORS=False),
    ):
        y, _ = launch_matmul(x, weight, None, r, SLICES, **options, config=config)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=2e-5)


def test_int8_products_round_alike_and_have_no_noise(backend, device, operands):
    x, weight, r, seed = operands
    int8, wmax = ops.weight(weight, SLICES, quantization="per_channel", res=254, dtype=torch.int8)
    float_, _ = ops.weight(weight, SLICES, quantization="per_channel", res=254)
    options = {"inp_res": 254, "inp_sto_round": True, "seed": seed}
    y, _ = ops.matmul(x, int8, None, r, SLICES, weight_wmax=wmax, weight_res=254, **options)
    torch.testing.assert_close(y, ops.matmul(x, float_, None, r, SLICES, **options)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"inp_noise: got 0\.1, but int8 inputs are whole steps"):
        ops.matmul(x, int8, None, r, SLICES, weight_wmax=wmax, weight_res=254, **options, inp_noise=0.1)


@both_ranges
@all_random
@pytest.mark.parametrize("save_input", ["full", "int8"])
def test_the_backward_sees_the_forwards_input(save_input, random, dynamic, backend, device, operands):
    """The weight's gradient has it; those of input and range are what they are without chance."""
    x, weight, r, seed = operands
    grad = randn(ROWS, COLUMNS, device=device)

    def gradients(**random):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        leaves += [] if dynamic else [r.clone().requires_grad_()]
        ranges = {"dynamic_input_range": True} if dynamic else {"input_range": leaves[2]}
        options = {"max_input_size": 17, "inp_res": 254, "range_decay": 0.0, "save_input": save_input}
        analog_linear(leaves[0], leaves[1], **ranges, **options, **random, seed=seed).backward(grad)
        return [leaf.grad for leaf in leaves]

    found, plain = gradients(**random), gradients()
    converted = ops.dac(x, ranges_of(x, r, dynamic), SLICES, 254, seed=seed, **random)
    torch.testing.assert_close(found[1], grad.T @ converted, rtol=1e-4, atol=1e-4)
    for index in (0, *([] if dynamic else [2])):
        torch.testing.assert_close(found[index], plain[index], rtol=1e-4, atol=1e-5)
    assert (found[1] - plain[1]).abs().max() > 1e-3


@all_random
def test_gradients_of_the_single_product_and_of_a_frozen_input(random, backend, device, operands):
    x, weight, r, seed = operands
    weight.requires_grad_()
    y, _ = ops.matmul(x, weight, None, r, SLICES, inp_res=254, seed=seed, **random)
    y.sum().backward()
    converted = ops.dac(x, r, SLICES, 254, seed=seed, **random)
    torch.testing.assert_close(weight.grad, converted.sum(0).expand_as(weight), rtol=1e-4, atol=1e-4)


def test_both_converters_gradients_pass_straight_through(backend, device, operands):
    x, _, r, seed = operands
    grad = torch.randn_like(x)

    def of(**random):
        leaf, ranges = x.clone().requires_grad_(), r.clone().requires_grad_()
        ops.dac(leaf, ranges, SLICES, 254, seed=seed, **random).backward(grad)
        return leaf.grad, ranges.grad

    for one, other in zip(of(**RANDOM[2]), of(), strict=True):
        assert torch.equal(one, other)


# ---- Functions and layers ---------------------------------------------------------------------------------------------


def config_of(**values):
    config = TorchInferenceRPUConfig()
    config.pre_post.input_range.enable, config.pre_post.input_range.init_from_data = True, 0
    config.mapping.max_input_size, config.forward.inp_res = 17, 254
    for name, value in values.items():
        setattr(config.forward, name, value)
    return config


@all_random
@pytest.mark.parametrize("training", [True, False])
def test_layers_draw_anew_in_each_forward_also_in_evaluation(training, random, device):
    x, layer = randn(7, 50, device=device), AnalogLinear(50, 9, rpu_config=config_of(**random)).to(device)
    layer.train(training)
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))
        torch.manual_seed(1)
        first = layer(x)
        torch.manual_seed(1)
        assert torch.equal(layer(x), first)


def test_quantized_weights_meet_noise_in_evaluation(backend, device):
    """Where they would otherwise be multiplied as int8."""
    config = config_of(inp_noise=0.05)
    config.modifier.quantization_type, config.modifier.res = WeightQuantizationType.DISCRETIZE_PER_CHANNEL, 254
    layer, x = AnalogLinear(50, 9, rpu_config=config).to(device).eval(), randn(50, device=device).expand(500, 50)
    with torch.no_grad():
        noise = (
            0.05
            * layer.input_range.abs()[:, None]
            * torch.stack([w.norm(dim=1) for w in layer.weight.split([17, 17, 16], 1)])
        )
        torch.testing.assert_close(layer(x).std(0), noise.norm(dim=0), rtol=0.2, atol=0)


def test_a_chip_has_them_and_stays_what_it_holds(device):
    layer = AnalogLinear(50, 9, rpu_config=config_of(inp_noise=0.05, inp_sto_round=True)).to(device)
    chip, x = program(layer, PCMLikeNoiseModel(), seed=1), randn(4, 50, device=device)
    with torch.no_grad():
        assert not torch.equal(chip(x), chip(x))
        assert torch.equal(
            chip.model.programmed.as_(torch.float32, False)[0],
            program(layer, PCMLikeNoiseModel(), seed=1).model.programmed.as_(torch.float32, False)[0],
        )


def test_groups_have_numbers_of_their_own(backend, device):
    x, weight = randn(5, 8, device=device).repeat(1, 2), randn(3, 8, device=device).repeat(2, 1)
    options = {"input_range": tensor([1.0, 1.0], device), "inp_res": 254, "seed": seed_of(1, device), "groups": 2}
    y = analog_linear(x, weight, **options)
    assert torch.equal(y[:, :3], y[:, 3:])
    for random in RANDOM:
        y = analog_linear(x, weight, **options, **random)
        assert not torch.equal(y[:, :3], y[:, 3:])


def test_every_step_of_a_sequence_is_converted_anew(device):
    config = config_of(inp_sto_round=True, inp_noise=0.05)
    rnn = AnalogRNN(AnalogVanillaRNNCell, 4, 6, rpu_config=config).to(device)
    x = randn(1, 2, 4, device=device).expand(5, 2, 4)
    for training in (True, False):
        out = rnn.train(training)(x.clone())[0]
        out.sum().backward()
        assert out.isfinite().all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inp_noise": -0.1}, "inp_noise: got -0.1"),
        ({"inp_noise": math.nan}, "inp_noise: got nan"),
        ({"inp_noise": 0.1}, "seed: missing, but inp_noise > 0 draws"),
        ({"inp_sto_round": True}, "seed: missing, but inp_sto_round draws"),
        ({"inp_sto_round": True, "inp_res": -1}, "inp_sto_round: True, but inp_res is -1"),
        ({"inp_noise": 0.1, "input_range": None, "inp_res": -1}, "inp_noise: got 0.1 without input_range"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, said):
    arguments = {"input_range": torch.ones(1), "inp_res": 254} | options
    with pytest.raises(ValueError, match=said):
        ops.matmul(torch.ones(2, 3), torch.ones(4, 3), None, arguments.pop("input_range"), 1, **arguments)


def test_the_functional_layer_refuses_noise_without_a_range_and_warns_of_rounding_without_a_grid():
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"inp_noise: got 0\.1 without an input range"):
        analog_linear(x, w, inp_noise=0.1)
    with pytest.warns(UserWarning, match="inp_sto_round: got True, which has no effect as inp_res is off"):
        analog_linear(x, w, inp_sto_round=True)


def test_bound_management_is_refused_with_the_reason():
    with pytest.raises(AttributeError, match=r"bound_management.*up to ten products"):
        IOParameters().bound_management = "ITERATIVE"
    with pytest.raises(TypeError, match=r"bound_management.*up to ten products"):
        IOParameters(bound_management="ITERATIVE")
    with pytest.raises(ConfigError, match=r"bound_management.*up to ten products"):
        TorchInferenceRPUConfig.from_dict({"forward": {"bound_management": "ITERATIVE"}})
