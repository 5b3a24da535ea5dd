"""A part of a tensor has that part of the whole's noise, bit for bit, in every operation that draws (SEMANTICS 9)."""

from __future__ import annotations

import pytest
import torch
from helpers import randn, seed_of, tensor

from triton_analog import ops
from triton_analog.calls import seeds_of
from triton_analog.functional import analog_linear, modified_weight
from triton_analog.seeds import placed

ROW, COLUMN, SLICE = 16, 32, 1
"""Where the part begins: its first token or row, its first column, its first slice."""
ROWS, COLUMNS, SLICES, WIDTH = 37, 70, 3, 16
FEATURES = SLICES * WIDTH
TOKENS, FROM_SLICE = slice(ROW, None), slice(SLICE * WIDTH, None)

RANGED = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
BOUND = pytest.mark.parametrize("bound", [2.0, 0.0], ids=["converter", "folded"])


@pytest.fixture
def seed(device):
    return seed_of(0x0123456789ABCDEF, device)


@pytest.fixture
def x(device):
    return randn(ROWS, FEATURES, device=device)


@pytest.fixture
def r(device):
    return tensor([0.5, 1.0, 2.0], device)


def range_of(x, r, dynamic):
    return ops.absmax(x, SLICES) if dynamic else r


def part_of_range(r):
    return r[SLICE:] if r.ndim == 1 else r[SLICE:, ROW:]


def test_a_field(backend, device, seed):
    whole = ops.noise(seed, ROWS, COLUMNS, stream=5, plane=SLICE + 2)
    part = ops.noise(placed(seed, ROW, COLUMN, SLICE), ROWS - ROW, COLUMNS - COLUMN, stream=5, plane=2)
    assert torch.equal(part, whole[ROW:, COLUMN:])


@pytest.mark.parametrize("kind", ["per_channel", "per_tensor"])
def test_a_weight(kind, backend, device, seed):
    weight = randn(ROWS, FEATURES, device=device)
    weight[ROW] = 9.0  # the largest of the whole is in the part
    options = {"noise_type": kind, "std_dev": 0.1, "quantization": "per_channel", "res": 30}
    whole, _ = ops.weight(weight, SLICES, seed=seed, **options)
    part, _ = ops.weight(
        weight[ROW:, FROM_SLICE], SLICES - SLICE, seed=placed(seed, ROW, SLICE * WIDTH), **options
    )  # fmt: skip
    assert torch.equal(part, whole[ROW:, FROM_SLICE])


@BOUND
def test_an_output_converter(bound, backend, device, seed):
    y, wmax, r = randn(ROWS, COLUMNS, device=device), randn(COLUMNS, device=device).abs(), tensor([1.5], device)
    options = {"out_noise": 0.3, "out_bound": bound, "out_res": 254 if bound > 0 else -1}
    whole = ops.adc(y, r, noise_wmax=wmax, bound_wmax=wmax, seed=seed, plane=SLICE, **options)
    wmax, at = wmax[COLUMN:], placed(seed, ROW, COLUMN, SLICE)
    part = ops.adc(y[ROW:, COLUMN:], r, noise_wmax=wmax, bound_wmax=wmax, seed=at, **options)
    assert torch.equal(part, whole[ROW:, COLUMN:])


@RANGED
@pytest.mark.parametrize("random", [{"inp_sto_round": True}, {"inp_noise": 0.1}], ids=lambda random: next(iter(random)))
def test_an_input_converter(random, dynamic, backend, device, seed, x, r):
    """The column of the place is that of the outputs, and so changes nothing here."""
    r, at = range_of(x, r, dynamic), placed(seed, ROW, COLUMN, SLICE)
    whole = ops.dac(x, r, SLICES, 254, seed=seed, **random)
    part = ops.dac(x[TOKENS, FROM_SLICE], part_of_range(r), SLICES - SLICE, 254, seed=at, **random)
    assert torch.equal(part, whole[TOKENS, FROM_SLICE])
    assert not torch.equal(
        part, ops.dac(x[TOKENS, FROM_SLICE], part_of_range(r), SLICES - SLICE, 254, seed=seed, **random)
    )


@RANGED
def test_the_converter_s_steps(dynamic, backend, device, seed, x, r):
    r, at = range_of(x, r, dynamic), placed(seed, ROW, COLUMN, SLICE)
    whole, _ = ops.dac_steps(x, r, SLICES, 254, inp_sto_round=True, seed=seed)
    part, _ = ops.dac_steps(
        x[TOKENS, FROM_SLICE], part_of_range(r), SLICES - SLICE, 254, inp_sto_round=True, seed=at
    )  # fmt: skip
    assert torch.equal(part, whole[TOKENS, FROM_SLICE])


@RANGED
@BOUND
def test_the_output_noise_of_a_product(bound, dynamic, backend, device, seed, x, r):
    """Nothing comes in, so all that comes out is noise; in the whole there is none of the slices that the part has not."""
    r, wmax = range_of(x, r, dynamic), randn(SLICES, COLUMNS, device=device).abs()
    wmax[:SLICE] = 0
    weight = torch.zeros(COLUMNS, FEATURES, device=device)
    options = {"out_bound": bound, "out_res": 254 if bound > 0 else -1}
    whole, _ = ops.matmul(
        x, weight, None, r, SLICES, out_noise=0.3 * SLICES**0.5, noise_wmax=wmax, bound_wmax=wmax, seed=seed, **options
    )  # fmt: skip
    plane = SLICE if bound > 0 else 0  # all slices have one field without a converter
    wmax = wmax[SLICE:, COLUMN:]
    part, _ = ops.matmul(
        x[TOKENS, FROM_SLICE], weight[COLUMN:, FROM_SLICE], None, part_of_range(r), SLICES - SLICE,
        out_noise=0.3 * (SLICES - SLICE) ** 0.5, noise_wmax=wmax, bound_wmax=wmax,
        seed=placed(seed, ROW, COLUMN, plane), **options,
    )  # fmt: skip
    assert whole.any()
    torch.testing.assert_close(part, whole[ROW:, COLUMN:], atol=0, rtol=2**-22)


def test_parts_of_the_slices_without_a_converter_have_noise_of_their_own(backend, device, seed, x, r):
    weight, wmax = torch.zeros(COLUMNS, FEATURES, device=device), torch.ones(SLICES, COLUMNS, device=device)
    first, second = (
        ops.matmul(x, weight, None, r, SLICES, out_noise=0.3, noise_wmax=wmax, seed=placed(seed, 0, 0, plane))[0]
        for plane in (0, SLICES)
    )
    assert torch.equal(first, ops.matmul(x, weight, None, r, SLICES, out_noise=0.3, noise_wmax=wmax, seed=seed)[0])
    assert (first != second).float().mean() > 0.99


@RANGED
@pytest.mark.parametrize("random", [{"inp_sto_round": True}, {"inp_noise": 0.1}], ids=lambda random: next(iter(random)))
def test_the_converted_inputs_of_a_product_and_of_its_backward(random, dynamic, backend, device, seed, x, r):
    """Each output, and each row of the weight's gradient, is one input."""
    r, at = range_of(x, r, dynamic), placed(seed, ROW, COLUMN, SLICE)
    expected = ops.dac(x, r, SLICES, 254, seed=seed, **random)[TOKENS, FROM_SLICE]
    x, r, slices = x[TOKENS, FROM_SLICE], part_of_range(r), SLICES - SLICE
    y, _ = ops.matmul(x, torch.eye(x.shape[1], device=device), None, r, slices, inp_res=254, seed=at, **random)
    torch.testing.assert_close(y, expected, atol=0, rtol=2**-22)
    grad = torch.eye(len(x), device=device)
    dw, _ = ops.matmul_wgrad(grad, x, r, slices, inp_res=254, seed=at, **random)
    torch.testing.assert_close(dw, expected, atol=0, rtol=2**-22)


def test_a_layer_s_call(backend, device, seed):
    """Some tokens and some outputs, with everything that is random. The numbers are so that every sum is exact but for noise."""
    x, weight = randn(ROWS, FEATURES, device=device), randn(COLUMNS, FEATURES, device=device)
    settings = {
        "input_range": tensor([1.0, 1.5, 2.0], device), "max_input_size": WIDTH, "inp_res": 254, "inp_noise": 0.02,
        "inp_sto_round": True, "out_noise": 0.1, "out_noise_per_channel": True, "out_bound": 4.0,
        "out_bound_per_channel": True, "weight_noise": "per_channel", "weight_noise_std": 0.05,
    }  # fmt: skip

    def run(x, weight, **seeds):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = analog_linear(*leaves, **settings, **seeds)
        y.backward(torch.ones_like(y))
        return y.detach(), leaves[1].grad

    whole, dw = run(x, weight, seed=seed)
    seeds = {"seed": placed(seed, 0, COLUMN), "weight_seed": placed(seed, COLUMN)}
    part, part_dw = run(x, weight[COLUMN:], **seeds)
    torch.testing.assert_close(part, whole[:, COLUMN:])
    torch.testing.assert_close(part_dw, dw[COLUMN:])
    part, _ = run(x[TOKENS], weight, seed=placed(seed, ROW), weight_seed=seed)
    torch.testing.assert_close(part, whole[TOKENS])


def test_groups_add_to_the_seed_alone(seed, device):
    at = placed(seed, ROW, COLUMN, SLICE)
    assert [s.tolist() for s in seeds_of(at, 3)] == [[int(seed) + group, ROW, COLUMN, SLICE] for group in range(3)]
    weight = randn(2 * ROWS, FEATURES, device=device)
    options = {"weight_noise": "per_channel", "weight_noise_std": 0.1, "groups": 2}
    whole, _ = modified_weight(weight, seed=placed(seed), **options)
    assert torch.equal(whole, modified_weight(weight, seed=seed, **options)[0])


# ---- What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "names"),
    [
        ((8, 0, 0), "first_row: got 8; allowed are multiples of 16"),
        ((0, 24, 0), "first_column: got 24; allowed are multiples of 16"),
        ((-16, 0, 0), "first_row: got -16"),
        ((2**33, 0, 0), r"first_row: got 8589934592; .* below 2\*\*33"),
        ((0, 2**34, 0), r"first_column: got 17179869184; .* below 2\*\*34"),
        ((0, 0, 2**31), r"first_plane: got 2147483648; allowed are 0 to 2\*\*31 - 1"),
    ],
)
def test_places_that_no_field_has(place, names):
    with pytest.raises(ValueError, match=names):
        placed(seed_of(1), *place)


def test_only_a_seed_can_be_placed_and_only_once():
    for wrong in (torch.ones(1), placed(seed_of(1))):
        with pytest.raises(TypeError, match=r"seed: got .*int64 of shape \(1,\) is needed"):
            placed(wrong)


def test_operations_take_one_number_or_four(device):
    for wrong in (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(4)):
        with pytest.raises(TypeError, match=r"seed: got .* or the four of triton_analog.seeds.placed, is needed"):
            ops.noise(wrong.to(device), 3, 3)


def test_a_chip_is_a_whole(device):
    weight, wmax = randn(4, 16, device=device), torch.ones(1, 4, device=device)
    with pytest.raises(TypeError, match=r"seed: got .* an int64 tensor with one element is needed"):
        ops.program(weight, wmax, placed(seed_of(1, device)), torch.zeros(2, 4, device=device))


def test_the_place_of_a_product_is_not_that_of_its_weight(device):
    x, weight, at = randn(4, 16, device=device), randn(4, 16, device=device), placed(seed_of(1, device), 16)
    noisy = {"weight_noise": "per_channel", "weight_noise_std": 0.1}
    with pytest.raises(ValueError, match=r"weight_seed: missing, .* pass triton_analog\.seeds\.placed"):
        analog_linear(x, weight, seed=at, **noisy)
    analog_linear(x, weight, seed=at, training=False, **noisy)
    analog_linear(x, weight, seed=at, weight_seed=at, **noisy)
