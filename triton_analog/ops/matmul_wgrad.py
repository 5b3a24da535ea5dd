"""Gradient of the analog product in its weight and bias (SEMANTICS 6).

``dW_s = (g where slice s did not saturate)^T @ x_q``, with a static range as ``unit_s * (g^T @ q)`` on the converter's
integers, which lie ready: :mod:`matmul_dgrad` leaves them, or a pass of the converter does. ``db = sum of g over the rows``
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

import triton_analog.ops.hopper.matmul_wgrad as pipeline
import triton_analog.reference as reference
from triton_analog.lang import cast, dot, slice_bounds, step_of
from triton_analog.launch import (
    aligned,
    block,
    cdiv,
    describable,
    hardware,
    has_wide_tiles,
    input_precision,
    launch,
    slices_describable,
)
from triton_analog.launch.lookup import choose
from triton_analog.launch.space import Problem, Space, covers, large_enough, operands_fit
from triton_analog.ops import _checks as check
from triton_analog.ops._gradients import can_be_pipelined, multiply_passed, pipelines_gradients
from triton_analog.ops._operator import Operator
from triton_analog.ops._parts import launch_column_sums
from triton_analog.ops._tiles import descriptor, grouped, load_plane, load_tile
from triton_analog.ops.dac import launch_dac
from triton_analog.reference.grid import half_steps

BIAS_COLUMNS = tl.constexpr(32)
"""Columns of the gradient that one program sums."""


@dataclass(frozen=True)
class MatmulWgradConfig:
    """``DESCRIPTORS``: load through tensor descriptors where the operands' layout allows it. ``PIPELINED``: as for
    :class:`triton_analog.ops.matmul_dgrad.MatmulDgradConfig`, with ``GROUP_N``."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_N: int = 16
    DESCRIPTORS: bool = True
    PIPELINED: bool = False
    num_warps: int = 8
    num_stages: int = 3


PIPELINED = MatmulWgradConfig(64, 128, 256, GROUP_N=8, PIPELINED=True, num_warps=4, num_stages=4)


def _should_be_pipelined(problem: Problem) -> bool:
    """Where there are rows enough, and not half of the last tile's columns lie beyond a slice. (Found on an H200.)"""
    rows, columns, width = problem.sizes
    tiles = cdiv(width, PIPELINED.BLOCK_K) * PIPELINED.BLOCK_K
    # Between powers of two the answer is the same, as the configuration has to be.
    enough = triton.next_power_of_2(rows) >= 1024 and columns >= 256 and 2 * width > tiles
    return pipelines_gradients(problem) and enough


def default_config(problem: Problem) -> MatmulWgradConfig:
    return PIPELINED if _should_be_pipelined(problem) else _plain_config(problem)


def _plain_config(problem: Problem) -> MatmulWgradConfig:
    rows, columns, width = problem.sizes
    if not has_wide_tiles(problem.hardware.capability) or problem.dtype == torch.float32:
        return MatmulWgradConfig(
            block(rows, 32 if problem.dtype == torch.float32 else 64), block(columns, 64), block(width, 128),
            DESCRIPTORS=False,
        )  # fmt: skip
    return MatmulWgradConfig(block(rows, 64), block(columns, 128), block(width, 256 if columns > 64 else 128))


def _fits(problem: Problem, config: MatmulWgradConfig) -> bool:
    if config.PIPELINED:
        return _should_be_pipelined(problem) and config in (PIPELINED, replace(PIPELINED, GROUP_N=16))
    rows, columns, width = problem.sizes
    hardware, row_bytes = problem.hardware, config.BLOCK_M * problem.dtype.itemsize
    outputs = config.BLOCK_N * config.BLOCK_K // (32 * config.num_warps)
    return (
        covers(config.BLOCK_M, rows)
        and covers(config.BLOCK_N, columns)
        and covers(config.BLOCK_K, width)
        and (row_bytes in (64, 128) or config.BLOCK_M >= rows)
        and operands_fit(hardware, config.BLOCK_N + config.BLOCK_K, row_bytes, config.num_stages)
        and outputs <= 128
        and config.DESCRIPTORS is (has_wide_tiles(hardware.capability) and problem.dtype != torch.float32)
        and large_enough(config.BLOCK_N, config.BLOCK_K, columns, width)
    )


SPACE = Space(
    "matmul_wgrad", MatmulWgradConfig, sizes=("rows", "columns", "width"), formula=default_config, fits=_fits,
    values={
        "BLOCK_M": (16, 32, 64), "BLOCK_N": (16, 32, 64, 128, 256), "BLOCK_K": (16, 32, 64, 128, 256), "GROUP_N": (8, 16),
        "DESCRIPTORS": (True, False), "PIPELINED": (False, True), "num_warps": (4, 8), "num_stages": (3, 4),
    },
    others=(pipeline,),
)  # fmt: skip


@triton.jit
def sum_columns(grad_ptr, out_ptr, first_n, M, N, stride_m, stride_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    n = (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_m in range(0, M, 4 * BLOCK_M):
        for i in tl.static_range(4):  # four loads on their way at a time
            m = first_m + i * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
            inside = (m < M)[:, None] & (n < N)[None, :]
            total += tl.load(grad_ptr + m[:, None] * stride_m + n[None, :] * stride_n, mask=inside, other=0.0).to(
                tl.float32
            )
    tl.store(out_ptr + n, cast(tl.sum(total, axis=0), out_ptr.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["M", "first_slice", "count"])
def matmul_wgrad_kernel(
    grad, x, all_ptr, range_ptr, dw_ptr, dbias_ptr, M, N, K, S, first_slice, count,
    stride_gs, stride_gm, stride_gn, stride_am, stride_an, stride_xm, stride_xk, in_q_max,
    SCALE: tl.constexpr, SLICED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_N: tl.constexpr,
):  # fmt: skip
    """``count`` slices, each with a gradient of its own if ``SLICED``. With ``BIAS`` the first programs sum columns of the
    whole gradient at ``all_ptr``."""
    program, blocks_n = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    if BIAS:
        programs = tl.cdiv(N, BIAS_COLUMNS)
        if program < programs:
            sum_columns(all_ptr, dbias_ptr, program * BIAS_COLUMNS, M, N, stride_am, stride_an, 256, BIAS_COLUMNS)
            return
        program -= programs
    blocks_k = tl.cdiv(tl.cdiv(K, S), BLOCK_K)
    block_n, block_k = grouped(program, blocks_n, count * blocks_k, GROUP_N)
    plane = block_k // blocks_k if SLICED else 0
    s = first_slice + block_k // blocks_k
    start, slice_width = slice_bounds(s, K, S, ALIGNED)
    first_n, first_column = block_n * BLOCK_N, block_k % blocks_k * BLOCK_K
    first_k, k_end = start + first_column, start + slice_width

    dw = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first_m in range(0, M, BLOCK_M):
        g = load_plane(
            grad, plane, first_m, first_n, stride_gs, stride_gm, stride_gn, M, N, DESCRIPTORS, BLOCK_M, BLOCK_N
        )
        b = load_tile(x, first_m, first_k, stride_xm, stride_xk, M, k_end, DESCRIPTORS, BLOCK_M, BLOCK_K)
        dw = dot(tl.trans(g), b, dw, PRECISION)
    if SCALE:
        dw *= step_of(tl.abs(tl.load(range_ptr + s + tl.zeros((1, 1), tl.int32)).to(tl.float32)), in_q_max)
    n = (first_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    column = first_column + tl.arange(0, BLOCK_K)
    inside = (n < N)[:, None] & (column < slice_width)[None, :]
    address = dw_ptr + n[:, None] * K + (start + column).to(tl.int64)[None, :]
    tl.store(address, cast(dw, dw_ptr.dtype.element_ty), mask=inside)


class MatmulWgrad:
    """The launches of one :func:`matmul_wgrad`, a few slices at a time, and what they write."""

    def __init__(
        self,
        grad: Tensor,
        x: Tensor,
        input_range: Tensor | None,
        slices: int,
        mask: Tensor | None,
        inp_res: float,
        dtype: torch.dtype,
        converted: bool = False,
        bias_dtype: torch.dtype | None = None,
        config: MatmulWgradConfig | None = None,
        inp_noise: float = 0.0,
        inp_sto_round: bool = False,
        seed: Tensor | None = None,
    ) -> None:
        (M, K), N = x.shape, grad.shape[1]
        self.q_max = half_steps(inp_res)
        static = input_range is not None and input_range.ndim == 1
        if input_range is not None and not (converted and static and x.dtype == grad.dtype and inp_noise <= 0):
            if converted and static and inp_noise <= 0:
                x = x.to(grad.dtype)
            else:  # the step of a dynamic range differs from row to row, so it cannot wait for the end
                x = launch_dac(
                    x, input_range, slices, inp_res, dtype=grad.dtype, values=not static, converted=converted,
                    inp_noise=inp_noise, inp_sto_round=inp_sto_round, seed=seed,
                )  # fmt: skip
        self.grad, self.x, self.slices = grad, x, slices
        self.scales = static and self.q_max > 0
        self.input_range = None if input_range is None else input_range.contiguous()
        sizes = M, N, cdiv(K, slices)
        config = config or choose(SPACE, x.device, grad.dtype, sizes)
        if config.PIPELINED and not can_be_pipelined(grad, x, slices, mask):
            config = _plain_config(Problem(hardware(x.device), grad.dtype, sizes))
        self.config, self.takes_mask = config, config.PIPELINED
        self.dw = torch.empty(N, K, dtype=dtype, device=x.device)
        self.dbias = torch.empty(0 if bias_dtype is None else N, dtype=bias_dtype or dtype, device=x.device)

    def launch(self, first: int, count: int, passed: Tensor) -> None:
        """``count`` slices from ``first`` on, whose ADCs let ``passed [count or 1, M, N]`` through; with the first ones the
        bias's gradient."""
        config, grad, x, slices = self.config, self.grad, self.x, self.slices
        (M, K), N = x.shape, grad.shape[1]
        descriptors = config.DESCRIPTORS and describable(passed, x) and slices_describable(x, slices)
        blocks_n, blocks_k = cdiv(N, config.BLOCK_N), cdiv(cdiv(K, slices), config.BLOCK_K)
        sums = first == 0 and self.dbias.numel() > 0
        programs = blocks_n * count * blocks_k + (cdiv(N, BIAS_COLUMNS.value) if sums else 0)
        options = vars(config) | {"DESCRIPTORS": descriptors}
        del options["PIPELINED"]
        launch(
            matmul_wgrad_kernel, (programs,), x.device,
            descriptor(passed, config.BLOCK_M, config.BLOCK_N, descriptors),
            descriptor(x, config.BLOCK_M, config.BLOCK_K, descriptors), grad, self.input_range, self.dw, self.dbias,
            M, N, K, slices, first, count, *passed.stride(), *grad.stride(), *x.stride(), self.q_max,
            SCALE=self.scales, SLICED=len(passed) > 1, BIAS=sums, PRECISION=input_precision(), ALIGNED=aligned(K, slices),
            **options,
        )  # fmt: skip

    def launch_masked(self, grad: Tensor, mask: Tensor | None) -> None:
        """All slices at once, if this ``takes_mask``."""
        input_range = self.input_range if self.scales else None
        pipeline.launch_wgrad(grad, self.x, input_range, mask, self.dw, self.slices, self.q_max, self.config.GROUP_N)
        if self.dbias.numel() > 0:
            launch_column_sums(grad, self.dbias)


def launch_matmul_wgrad(
    grad: Tensor,
    x: Tensor,
    input_range: Tensor | None,
    slices: int,
    mask: Tensor | None,
    inp_res: float,
    dtype: torch.dtype,
    converted: bool = False,
    bias_dtype: torch.dtype | None = None,
    inp_noise: float = 0.0,
    inp_sto_round: bool = False,
    seed: Tensor | None = None,
    config: MatmulWgradConfig | None = None,
) -> tuple[Tensor, Tensor]:
    if input_range is None and mask is None:  # then slices make no difference
        slices = 1
    wgrad = MatmulWgrad(
        grad, x, input_range, slices, mask, inp_res, dtype, converted, bias_dtype, config, inp_noise, inp_sto_round, seed
    )  # fmt: skip
    multiply_passed(grad, mask, slices, wgrad)
    return wgrad.dw, wgrad.dbias


def _fake(grad: Tensor, x: Tensor, dtype: torch.dtype, bias_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    dw = grad.new_empty(grad.shape[1], x.shape[1], dtype=dtype)
    return dw, grad.new_empty(0 if bias_dtype is None else grad.shape[1], dtype=bias_dtype or dtype)


_matmul_wgrad = Operator("matmul_wgrad", launch_matmul_wgrad, reference.matmul_wgrad, _fake)


def matmul_wgrad(
    grad: Tensor,
    x: Tensor,
    input_range: Tensor | None,
    slices: int,
    mask: Tensor | None = None,
    *,
    inp_res: float = -1.0,
    dtype: torch.dtype | None = None,
    converted: bool = False,
    bias_dtype: torch.dtype | None = None,
    inp_noise: float = 0.0,
    inp_sto_round: bool = False,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`triton_analog.ops.matmul` in its weight, ``[N, K]``, and bias, ``[N]``, accumulated in fp32.

    Args:
        grad: Gradient ``[M, N]`` of the product, any strides.
        x: Inputs ``[M, K]`` of the forward, as they were before the converter unless ``converted``.
        input_range: ``[S]``, ``[S, M]`` or None, as in the forward.
        slices: Number of slices of the columns.
        mask: As in :func:`triton_analog.ops.matmul_dgrad`.
        inp_res: The input converter's resolution, as in the forward.
        dtype: Of the weight's gradient; default that of ``grad``.
        converted: ``x`` holds numbers of steps: those of :func:`triton_analog.ops.matmul_dgrad` in the dtype of ``grad``, or
            of :func:`triton_analog.ops.dac_steps` in int8.
        bias_dtype: Of the bias's gradient; None leaves it out (no elements).
        inp_noise, inp_sto_round, seed: As in the forward. Steps that are ``converted`` are rounded already, and without noise.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.matrix("x", x, integers=converted)
    check.slice_count(x.shape[1], slices)
    check.matrix("grad", grad)
    check.product_grad(grad, x, grad.shape[1], slices, mask)
    check.range_kind(input_range, slices, x.shape[0])
    check.together("x", x, input_range=input_range, seed=seed)
    check.input_converter(inp_res, input_range, grad)
    check.random_input(inp_noise, inp_sto_round, inp_res, input_range, seed)
    check.require(
        not converted or inp_res > 0,
        lambda: f"converted: x holds steps, but inp_res is {inp_res}; give the converter's resolution",
    )
    return _matmul_wgrad(
        grad, x, input_range, slices, mask, float(inp_res), dtype or grad.dtype, converted, bias_dtype, inp_noise,
        inp_sto_round, seed,
    )  # fmt: skip
