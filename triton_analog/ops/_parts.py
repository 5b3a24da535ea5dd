"""Sums that several programs worked on: each leaves its part, and the parts are added in their order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_analog.lang import cast
from triton_analog.launch import block, cdiv, launch

COLUMNS = 64
ROWS = 256


@triton.jit(do_not_specialize=["P"])
def add_parts_kernel(parts_ptr, out_ptr, P, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(P):
        total += tl.load(parts_ptr + part * size + i, mask=i < size, other=0.0)
    tl.store(out_ptr + i, cast(total, out_ptr.dtype.element_ty), mask=i < size)


def launch_add_parts(parts: Tensor, out: Tensor) -> None:
    """Fill ``out``, contiguous, with the sum of the fp32 ``parts [P, *out.shape]``."""
    size = out.numel()
    width = block(size, 1024)
    launch(add_parts_kernel, (cdiv(size, width),), out.device, parts, out, len(parts), size, BLOCK=width, num_warps=4)


@triton.jit(do_not_specialize=["M"])
def column_sums_kernel(x_ptr, parts_ptr, M, N, rows, stride_m, stride_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    part = tl.program_id(1)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    end = tl.minimum((part + 1) * rows, M)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(part * rows, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M).to(tl.int64)
        inside = (m < end)[:, None] & (n < N)[None, :]
        total += tl.load(x_ptr + m[:, None] * stride_m + n[None, :] * stride_n, mask=inside, other=0.0).to(tl.float32)
    tl.store(parts_ptr + part * N + n, tl.sum(total, axis=0), mask=n < N)


def launch_column_sums(x: Tensor, out: Tensor) -> None:
    """Fill ``out [N]`` with the sums over the rows of ``x [M, N]``."""
    M, N = x.shape
    parts = x.new_empty(max(1, min(16, cdiv(M, ROWS))), N, dtype=torch.float32)
    rows = cdiv(cdiv(M, len(parts)), ROWS) * ROWS
    launch(
        column_sums_kernel, (cdiv(N, COLUMNS), len(parts)), x.device, x, parts, M, N, rows, *x.stride(), BLOCK_M=ROWS,
        BLOCK_N=COLUMNS, num_warps=8,
    )  # fmt: skip
    launch_add_parts(parts, out)
