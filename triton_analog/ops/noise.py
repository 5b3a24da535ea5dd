"""The normal field: element ``(m, n)`` of a seed's stream is the same number whatever the launch (SEMANTICS 9)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

import triton_analog.reference as reference
from triton_analog.lang import load_seed, normal_tile
from triton_analog.launch import block, cdiv, launch
from triton_analog.launch.lookup import choose
from triton_analog.launch.space import POWERS, Problem, Space, tile_fits
from triton_analog.ops import _checks as check
from triton_analog.ops._operator import Operator
from triton_analog.reference.noise import USER_STREAM, is_placed


@dataclass(frozen=True)
class NoiseConfig:
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int = 4


def default_config(problem: Problem) -> NoiseConfig:
    rows, columns = problem.sizes
    return NoiseConfig(BLOCK_M=block(rows, 32), BLOCK_N=block(columns, 64))


def _fits(problem: Problem, config: NoiseConfig) -> bool:
    return tile_fits(problem, config.BLOCK_M, config.BLOCK_N, least=512, most=2048 * config.num_warps, smallest=16)


SPACE = Space(
    "noise", NoiseConfig, sizes=("rows", "columns"), formula=default_config, fits=_fits,
    values={"BLOCK_M": POWERS[4:8], "BLOCK_N": POWERS[4:9], "num_warps": (4, 8)},
)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "plane"])
def noise_kernel(
    seed_ptr, out_ptr, rows, cols, plane,
    STREAM: tl.constexpr, PLACED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M
    col = tl.program_id(1).to(tl.int64) * BLOCK_N
    seed, first_row, first_col, first_plane = load_seed(seed_ptr, PLACED)
    z = normal_tile(seed, first_row + row, first_col + col, first_plane + plane, STREAM, BLOCK_M, BLOCK_N)
    m = row + tl.arange(0, BLOCK_M)[:, None]
    n = col + tl.arange(0, BLOCK_N)[None, :]
    tl.store(out_ptr + m * cols + n, z, mask=(m < rows) & (n < cols))


def launch_noise(
    seed: Tensor, rows: int, cols: int, stream: int, plane: int, config: NoiseConfig | None = None
) -> Tensor:
    config = config or choose(SPACE, seed.device, torch.float32, (rows, cols))
    out = torch.empty(rows, cols, dtype=torch.float32, device=seed.device)
    grid = (cdiv(rows, config.BLOCK_M), cdiv(cols, config.BLOCK_N))
    launch(
        noise_kernel, grid, seed.device, seed, out, rows, cols, plane, STREAM=stream, PLACED=is_placed(seed), **vars(config)
    )  # fmt: skip
    return out


def _fake(seed: Tensor, rows: int, cols: int) -> Tensor:
    return seed.new_empty(rows, cols, dtype=torch.float32)


_noise = Operator("noise", launch_noise, reference.noise, _fake)


def noise(seed: Tensor, rows: int, cols: int, *, stream: int = USER_STREAM, plane: int = 0) -> Tensor:
    """Standard normals ``[rows, cols]``, fp32, on the device of ``seed``.

    Philox-4x32-7 keyed by ``seed`` and counted by the element, then Box-Muller; values reach 5.26. Equal seeds give equal
    fields on every backend, to fp32 rounding, and a larger field contains the smaller one.

    Args:
        seed: int64 tensor with one element, or that of a part of the field (:func:`triton_analog.seeds.placed`); it stays on its
            device.
        rows: Number of rows, at most 2**33.
        cols: Number of columns, at most 2**34.
        stream: Independent stream in ``0 .. 2**32 - 1``; 0 is the library's weight noise, 1 its output noise, and from
            ``2**30 - 2`` on are its other fields.
        plane: Independent field within the stream, in ``0 .. 2**31 - 1``; output noise uses the slice.

    Raises:
        TypeError: ``seed`` is not one int64 number.
        ValueError: a size, stream or plane out of range.
    """
    check.seed_given(seed, True, "noise")
    check.require(0 <= rows <= 2**33, lambda: f"rows: got {rows}; allowed are 0 to 2**33")
    check.require(0 <= cols <= 2**34, lambda: f"cols: got {cols}; allowed are 0 to 2**34")
    check.require(0 <= stream < 2**32, lambda: f"stream: got {stream}; allowed are 0 to 2**32 - 1")
    check.require(0 <= plane < 2**31, lambda: f"plane: got {plane}; allowed are 0 to 2**31 - 1")
    return _noise(seed, rows, cols, stream, plane)
