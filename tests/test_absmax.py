"""SEMANTICS 8: largest magnitude per slice and row."""

import sys

import pytest
import torch
from helpers import DTYPES, all_dtypes, all_views, cut, randn, viewed

from triton_analog import ops
from triton_analog.ops.absmax import AbsmaxConfig, launch_absmax, launch_absmax_and_maxima

SHAPES = [(1, 1, 1), (1, 17, 17), (3, 129, 1), (5, 257, 3), (17, 131, 2), (33, 40, 7)]


def formula(x, slices):
    return torch.stack([part.abs().amax(-1) for part in cut(x, slices)]).float()


@all_dtypes
@pytest.mark.parametrize(("rows", "features", "slices"), SHAPES)
def test_is_the_largest_magnitude(rows, features, slices, dtype, backend, device):
    x = randn(rows, features, device=device, dtype=dtype)
    out = ops.absmax(x, slices)
    assert out.dtype == torch.float32
    assert torch.equal(out, formula(x, slices))


@all_views
def test_any_memory_layout(view, backend, device):
    x = randn(7, 45, device=device)
    assert torch.equal(ops.absmax(viewed(x, view), 2), formula(x, 2))


def test_expanded_input(backend, device):
    row = randn(1, 45, device=device)
    assert torch.equal(ops.absmax(row.expand(5, 45), 2), formula(row, 2).expand(2, 5))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("column", [0, 16, 44])
def test_inf_and_nan_propagate_in_their_row_and_slice(value, column, backend, device):
    x = randn(5, 45, device=device)
    x[2, column] = value
    torch.testing.assert_close(ops.absmax(x, 2), formula(x, 2), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("config", [AbsmaxConfig(1, 16), AbsmaxConfig(16, 32), AbsmaxConfig(64, 512)])
def test_blocks_do_not_change_the_result(config, backend, device):
    x = randn(21, 100, device=device)
    assert torch.equal(launch_absmax(x, 3, config), formula(x, 3))


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
@pytest.mark.parametrize("config", [None, AbsmaxConfig(1, 16), AbsmaxConfig(4, 32)])
@pytest.mark.parametrize("programs", [2, 1000])
def test_the_maxima_cover_all_rows(config, programs, backend, device, monkeypatch):
    monkeypatch.setattr(sys.modules[launch_absmax.__module__], "MAX_PROGRAMS", 3 * programs)
    x = randn(21, 100, device=device)
    x[3, 80] = torch.nan
    out, maxima = launch_absmax_and_maxima(x, 3, config)
    torch.testing.assert_close(out, formula(x, 3), rtol=0, atol=0, equal_nan=True)
    assert maxima.shape[1] <= programs
    torch.testing.assert_close(maxima.amax(1), formula(x, 3).amax(1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_no_rows(dtype, backend, device):
    out = ops.absmax(torch.empty(0, 5, device=device, dtype=dtype), 2)
    assert out.shape == (2, 0)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
