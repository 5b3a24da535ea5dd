"""Largest magnitude per slice and row: the weights' ``wmax`` and the dynamic input range (SEMANTICS 8).

``out[s, n] = max over k in slice s of |x[n, k]|``
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

import triton_analog.reference as reference
from triton_analog.launch import aligned, block, cdiv, launch
from triton_analog.launch.lookup import choose
from triton_analog.launch.space import POWERS, Problem, Space, tile_fits
from triton_analog.ops import _checks as check
from triton_analog.ops._columns import column_masks, load_tile, slice_span
from triton_analog.ops._operator import Operator

MAX_PROGRAMS = 1024
"""Where their maxima are wanted too: enough to fill a GPU."""


@dataclass(frozen=True)
class AbsmaxConfig:
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4


def default_config(problem: Problem) -> AbsmaxConfig:
    """A tile of 8192 numbers: each of 128 threads then waits for eight 16-byte loads of bf16 at once.

    Rows that are no multiple of 16 numbers are loaded one number at a time, with an address for each: 2048 then.
    """
    (rows, width), (wide_loads,) = problem.sizes, problem.flags
    block_k = block(width, 1024)
    return AbsmaxConfig(BLOCK_N=block(rows, (8192 if wide_loads else 2048) // block_k, smallest=1), BLOCK_K=block_k)


def _fits(problem: Problem, config: AbsmaxConfig) -> bool:
    return tile_fits(problem, config.BLOCK_N, config.BLOCK_K, least=2048, most=16384)


SPACE = Space(
    "absmax", AbsmaxConfig, sizes=("rows", "width"), flags=("wide_loads",), formula=default_config, fits=_fits,
    values={"BLOCK_N": POWERS[:10], "BLOCK_K": POWERS[4:11], "num_warps": (4, 8)},
)  # fmt: skip


def _choose(x: Tensor, slices: int) -> AbsmaxConfig:
    rows, features = x.shape
    return choose(SPACE, x.device, x.dtype, (rows, cdiv(features, slices)), (features % 16 == 0,))


@triton.jit
def magnitude_bits(x):
    """The bits of ``|x|`` in fp32: integers in the order of the magnitudes, NaN largest, so that a maximum keeps it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest_magnitude(x, inside):
    """:func:`magnitude_bits` of the largest number in every row of ``x [N, K]``, of the columns ``inside [K]``."""
    return tl.max(tl.where(inside[None, :], magnitude_bits(x), 0), axis=1)


@triton.jit
def absmax_of_rows(
    x_ptr, n, N, origin, start, end, K, stride_n, stride_k,
    ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """:func:`magnitude_bits` of the largest number of each row ``n`` in the columns ``start .. end``; 0 past row ``N``."""
    largest = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(origin, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        loaded, inside = column_masks(k, start, end, K, ALIGNED)
        x = load_tile(x_ptr, n, k, stride_n, stride_k, N, loaded)
        largest = tl.maximum(largest, largest_magnitude(x, inside))
    return largest


@triton.jit(do_not_specialize=["N"])
def absmax_kernel(
    x_ptr, out_ptr, maxima_ptr, N, K, S, stride_n, stride_k,
    ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out [S, N]``; and, if asked for, the largest of the rows that each of the ``P`` programs of a slice took, ``[S, P]``."""
    s = tl.program_id(0) % S
    part, P = tl.program_id(0) // S, tl.num_programs(0) // S
    origin, start, end = slice_span(s, K, S, ALIGNED)
    largest = tl.zeros((BLOCK_N,), tl.int32)
    for tile in range(part, tl.cdiv(N, BLOCK_N), P):
        n = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        bits = absmax_of_rows(x_ptr, n, N, origin, start, end, K, stride_n, stride_k, ALIGNED, BLOCK_N, BLOCK_K)
        tl.store(out_ptr + s.to(tl.int64) * N + n, bits.to(tl.float32, bitcast=True), mask=n < N)
        largest = tl.maximum(largest, bits)
    if maxima_ptr is not None:
        tl.store(maxima_ptr + s * P + part, tl.max(largest).to(tl.float32, bitcast=True))


def _launch(x: Tensor, slices: int, programs: int, maxima: Tensor | None, config: AbsmaxConfig) -> Tensor:
    N, K = x.shape
    out = torch.empty(slices, N, dtype=torch.float32, device=x.device)
    launch(
        absmax_kernel, (programs * slices,), x.device, x, out, maxima, N, K, slices, *x.stride(),
        ALIGNED=aligned(K, slices), **vars(config),
    )  # fmt: skip
    return out


def launch_absmax(x: Tensor, slices: int, config: AbsmaxConfig | None = None) -> Tensor:
    config = config or _choose(x, slices)
    return _launch(x, slices, cdiv(x.shape[0], config.BLOCK_N), None, config)


def launch_absmax_and_maxima(x: Tensor, slices: int, config: AbsmaxConfig | None = None) -> tuple[Tensor, Tensor]:
    """:func:`absmax` and maxima ``[S, P]`` of its rows, few enough for every program of the next kernel to reduce."""
    config = config or _choose(x, slices)
    programs = min(cdiv(x.shape[0], config.BLOCK_N), max(1, MAX_PROGRAMS // slices))
    maxima = torch.empty(slices, programs, dtype=torch.float32, device=x.device)
    return _launch(x, slices, programs, maxima, config), maxima


def _fake(x: Tensor, slices: int) -> Tensor:
    return x.new_empty(slices, x.shape[0], dtype=check.wide_dtype(x))


_absmax = Operator("absmax", launch_absmax, reference.absmax, _fake)


def absmax(x: Tensor, slices: int) -> Tensor:
    """Largest magnitude of every row of ``x [N, K]`` within every slice: ``[S, N]``, fp32 (fp64 for fp64).

    Not differentiable: a range or scale found from data is a constant of the backward. NaN propagates.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: ``x`` is not a matrix, or ``slices`` is not in ``1 .. K``.
    """
    check.matrix("x", x)
    check.slice_count(x.shape[1], slices)
    return _absmax(x.detach(), slices)
