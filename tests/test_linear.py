"""The layer's two operations are the single ones composed, on every backend."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, needs_interpreter, randn, seed_of

from triton_analog import ops
from triton_analog.ops.linear import linear_backward, linear_forward

pytestmark = needs_interpreter
ROWS, FEATURES, COLUMNS, SLICES = 7, 50, 20, 3


def operands(device, dtype=torch.float32):
    x, weight = randn(ROWS, FEATURES, device=device, dtype=dtype), randn(COLUMNS, FEATURES, device=device, dtype=dtype)
    bias = randn(COLUMNS, device=device, dtype=dtype)
    ranges = torch.tensor([0.5, 1.0, 2.0], device=device, dtype=dtype)
    return x, weight, bias, ranges, seed_of(3, device), seed_of(5, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_channel", [True, False])
def test_the_forward_is_weight_and_product(dtype, per_channel, backend, device):
    x, weight, bias, r, seed, weight_seed = operands(device, dtype)
    numbers = (
        SLICES,
        False,
        254.0,
        0.05,
        True,
        0.1,
        per_channel,
        1.0,
        per_channel,
        254.0,
        "none",
        0.0,
        "per_channel",
        0.1,
    )
    y, mask = linear_forward(x, weight, bias, r, None, seed, weight_seed, *[None] * 3, *numbers, "full", None, True)
    tile, wmax = ops.weight(weight, SLICES, noise_type="per_channel", std_dev=0.1, seed=weight_seed)
    scale = wmax if per_channel else wmax.amax(1, keepdim=True)
    product, own_mask = ops.matmul(
        x, tile, bias, r, SLICES, inp_res=254, out_noise=0.1, noise_wmax=scale, out_bound=1.0, bound_wmax=scale,
        out_res=254, seed=seed, inp_noise=0.05, inp_sto_round=True,
    )  # fmt: skip
    assert torch.equal(y, product)
    assert torch.equal(mask, own_mask)
    assert mask.any()


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
def test_the_backward_makes_the_noisy_weight_again(wanted, backend, device):
    x, weight, bias, r, seed, weight_seed = operands(device)
    tile, wmax = ops.weight(weight, SLICES, noise_type="per_channel", std_dev=0.1, seed=weight_seed)
    _, mask = ops.matmul(x, tile, bias, r, SLICES, inp_res=254, out_bound=1.0, bound_wmax=wmax, out_res=254)
    grad = randn(ROWS, COLUMNS, device=device)
    found = linear_backward(
        grad, x, None, weight, r, None, seed, weight_seed, None, None, mask, SLICES, 254.0, 0.05, True, "none", 0.0,
        "per_channel", 0.1, 0.01, 0.9, False, True, None, x.shape, torch.float32, *wanted,
    )  # fmt: skip
    dx, dr, dw, dbias = ops.matmul_backward(
        grad,
        tile,
        x,
        r,
        SLICES,
        mask,
        decay=0.01,
        input_min_percentage=0.9,
        inp_res=254,
        bias_dtype=torch.float32,
        inp_noise=0.05,
        inp_sto_round=True,
        seed=seed,
    )
    expected = [*([dx, dr] if wanted[0] else []), *([dw, dbias] if wanted[1] else [])]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_kept_for_the_backward(backend, device):
    """A mask with a bound, ranges if they are dynamic, and the input as integers where that is asked for; else nothing."""
    x, weight, bias, r, *_ = operands(device)
    off = (0.0, False, 0.0, False, 0.0, False, -1.0, "none", 0.0, "none", 0.0)

    def kept(ranges, dynamic, save, grad):
        out = linear_forward(x, weight, bias, ranges, *[None] * 6, SLICES, dynamic, 254.0, *off, save, None, grad)
        return [(t.dtype, tuple(t.shape)) for t in out[1:]]

    steps = [(torch.int8, (ROWS, FEATURES)), (torch.uint8, (2, ROWS, 7))]
    assert kept(r, False, "full", True) == []
    assert kept(r, False, "int8", True) == steps
    assert kept(r, False, "int8", False) == []
    assert kept(None, True, "full", True) == [(torch.float32, (SLICES, ROWS))]
