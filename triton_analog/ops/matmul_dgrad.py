"""Gradient of the analog product in its input, with the input range's gradient on the way out (SEMANTICS 6).

``dx_raw = (g where slice s did not saturate) @ W'_s``, ``dx = dx_raw where |x| <= r_s``, and ``dr_s`` of ``input_range.py``
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

import triton_analog.ops.hopper.matmul_dgrad as pipeline
import triton_analog.reference as reference
from triton_analog.lang import cast, dot, slice_bounds, to_steps
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
from triton_analog.ops._tiles import column_parts, descriptor, grouped, load_plane, load_tile
from triton_analog.ops.input_range import empty_range_grad, launch_range_grad, range_grad_sums
from triton_analog.reference.grid import half_steps


@dataclass(frozen=True)
class MatmulDgradConfig:
    """``PARTS``: column parts (1, 2 or 4) of a tile that are finished one after the other, to keep fewer registers in use.
    ``DESCRIPTORS``: load through tensor descriptors where the operands' layout allows it. ``PIPELINED``: the kernel of
    ``ops/hopper`` where descriptors apply, which takes the mask as it is; of the rest only ``GROUP_M`` matters then."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int = 16
    PARTS: int = 1
    DESCRIPTORS: bool = True
    PIPELINED: bool = False
    num_warps: int = 8
    num_stages: int = 3


PIPELINED = MatmulDgradConfig(128, 64, 256, GROUP_M=8, PARTS=2, PIPELINED=True, num_warps=4, num_stages=4)


def _should_be_pipelined(problem: Problem) -> bool:
    """Where there are rows enough, and not half of the last tile's columns lie beyond a slice. (Found on an H200.)"""
    rows, columns, width = problem.sizes
    tiles = cdiv(width, PIPELINED.BLOCK_K) * PIPELINED.BLOCK_K
    # Between powers of two the answer is the same, as the configuration has to be.
    enough = triton.next_power_of_2(rows) >= 1024 and columns >= 256 and 2 * width > tiles
    return pipelines_gradients(problem) and enough


def default_config(problem: Problem) -> MatmulDgradConfig:
    return PIPELINED if _should_be_pipelined(problem) else _plain_config(problem)


def _plain_config(problem: Problem) -> MatmulDgradConfig:
    rows, columns, width = problem.sizes
    if not has_wide_tiles(problem.hardware.capability) or problem.dtype == torch.float32:
        return MatmulDgradConfig(
            block(rows, 64), block(columns, 32 if problem.dtype == torch.float32 else 64), block(width, 128),
            PARTS=4, DESCRIPTORS=False,
        )  # fmt: skip
    return MatmulDgradConfig(block(rows, 128), block(columns, 64), block(width, 128), PARTS=2, num_stages=4)


def _fits(problem: Problem, config: MatmulDgradConfig) -> bool:
    if config.PIPELINED:
        return _should_be_pipelined(problem) and config in (PIPELINED, replace(PIPELINED, GROUP_M=16))
    rows, columns, width = problem.sizes
    hardware, row_bytes = problem.hardware, config.BLOCK_N * problem.dtype.itemsize
    outputs = config.BLOCK_M * config.BLOCK_K // (32 * config.num_warps)
    return (
        covers(config.BLOCK_M, rows)
        and covers(config.BLOCK_N, columns)
        and covers(config.BLOCK_K, width)
        and (row_bytes in (64, 128) or config.BLOCK_N >= columns)
        and operands_fit(hardware, config.BLOCK_M + config.BLOCK_K, row_bytes, config.num_stages)
        and outputs <= 128
        and config.DESCRIPTORS is (has_wide_tiles(hardware.capability) and problem.dtype != torch.float32)
        and large_enough(config.BLOCK_M, config.BLOCK_K, rows, width)
    )


SPACE = Space(
    "matmul_dgrad", MatmulDgradConfig, sizes=("rows", "columns", "width"), flags=("range",),
    formula=default_config, fits=_fits,
    values={
        "BLOCK_M": (16, 32, 64, 128, 256), "BLOCK_N": (16, 32, 64), "BLOCK_K": (16, 32, 64, 128, 256), "GROUP_M": (8, 16),
        "PARTS": (2, 4), "DESCRIPTORS": (True, False), "PIPELINED": (False, True), "num_warps": (4, 8), "num_stages": (3, 4),
    },
    others=(pipeline,),
)  # fmt: skip


@triton.jit
def clip_flags(x_ptr, clipped_ptr, range_ptr, s, m, k, M, K, stride_m, stride_k, inside, INT8: tl.constexpr):
    """A tile of the input, and where it is at or beyond the range on either side, and within it.

    The input is as it was, or int8 numbers of steps with these flags kept as bits (``dac_steps``).
    """
    x = tl.load(x_ptr + m[:, None] * stride_m + k[None, :] * stride_k, mask=inside, other=0).to(tl.float32)
    if INT8:
        row_bytes = tl.cdiv(K, 8)
        at = clipped_ptr + m[:, None] * row_bytes + k[None, :] // 8
        bit = (k % 8).to(tl.int32)[None, :]
        touches = (tl.load(at, mask=inside, other=0).to(tl.int32) >> bit) & 1 != 0
        passes = (tl.load(at + M.to(tl.int64) * row_bytes, mask=inside, other=0).to(tl.int32) >> bit) & 1 != 0
        return x, touches & (x >= 0), touches & (x <= 0), passes & inside
    else:
        r = tl.abs(tl.load(range_ptr + s).to(tl.float32))
        return x, inside & (x >= r), inside & (x <= -r), inside & (tl.abs(x) <= r)


@triton.jit
def finish_part(
    dx, x_ptr, clipped_ptr, range_ptr, dx_ptr, steps_ptr, s, m, start, first_column, width, M, K, stride_xm, stride_xk,
    in_q_max, CLIP: tl.constexpr, FAST: tl.constexpr, STEPS: tl.constexpr, INT8: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store columns of ``dx`` where the input was not clipped; their share of the range's gradient."""
    column = first_column + tl.arange(0, COLUMNS)
    k = (start + column).to(tl.int64)
    inside = (m < M)[:, None] & (column < width)[None, :]
    widen, unclipped = 0.0, 0.0
    if CLIP:
        x, above, below, passes = clip_flags(
            x_ptr, clipped_ptr, range_ptr, s, m, k, M, K, stride_xm, stride_xk, inside, INT8
        )
        widen, unclipped = range_grad_sums(dx, above, below, passes, FAST)
        dx = tl.where(passes, dx, 0.0)
        if STEPS:  # the tile is at hand: the weight's gradient needs it converted
            if not INT8:
                x = to_steps(x, tl.abs(tl.load(range_ptr + s).to(tl.float32)), in_q_max)
            tl.store(steps_ptr + m[:, None] * K + k[None, :], cast(x, steps_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + m[:, None] * K + k[None, :], cast(dx, dx_ptr.dtype.element_ty), mask=inside)
    return widen, unclipped


@triton.jit(do_not_specialize=["M", "first_slice", "count"])
def matmul_dgrad_kernel(
    grad, w, x_ptr, clipped_ptr, range_ptr, dx_ptr, steps_ptr, parts_ptr, M, N, K, S, first_slice, count,
    stride_gs, stride_gm, stride_gn, stride_wn, stride_wk, stride_xm, stride_xk, width, in_q_max,
    CLIP: tl.constexpr, FAST: tl.constexpr, SLICED: tl.constexpr, STEPS: tl.constexpr, INT8: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr, DESCRIPTORS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``count`` slices, each with a gradient of its own if ``SLICED``. ``width`` is that of a slice in whole blocks."""
    blocks_m, blocks_k = tl.cdiv(M, BLOCK_M), width // BLOCK_K
    block_m, block_k = grouped(tl.program_id(0), blocks_m, count * blocks_k, GROUP_M)
    plane = block_k // blocks_k if SLICED else 0
    s = first_slice + block_k // blocks_k
    start, slice_width = slice_bounds(s, K, S, ALIGNED)
    first_m, first_column = block_m * BLOCK_M, block_k % blocks_k * BLOCK_K
    first_k, k_end = start + first_column, start + slice_width
    m = first_m + tl.arange(0, BLOCK_M).to(tl.int64)

    dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first_n in range(0, N, BLOCK_N):
        g = load_plane(
            grad, plane, first_m, first_n, stride_gs, stride_gm, stride_gn, M, N, DESCRIPTORS, BLOCK_M, BLOCK_N
        )
        b = load_tile(w, first_n, first_k, stride_wn, stride_wk, N, k_end, DESCRIPTORS, BLOCK_N, BLOCK_K)
        dx = dot(g, b, dx, PRECISION)

    COLUMNS: tl.constexpr = BLOCK_K // PARTS
    parts = column_parts(dx, PARTS, BLOCK_M, BLOCK_K)
    widen, unclipped = 0.0, 0.0
    for i in tl.static_range(PARTS):
        if i - PARTS < M:
            sums = finish_part(
                parts[i], x_ptr, clipped_ptr, range_ptr, dx_ptr, steps_ptr, s, m, start, first_column + i * COLUMNS,
                slice_width, M, K, stride_xm, stride_xk, in_q_max, CLIP, FAST, STEPS, INT8, COLUMNS,
            )  # fmt: skip
            widen += sums[0]
            unclipped += sums[1]
    if CLIP:
        part = (s * blocks_m + block_m) * blocks_k + block_k % blocks_k
        tl.store(parts_ptr + part * 2, widen)
        tl.store(parts_ptr + part * 2 + 1, unclipped)


class MatmulDgrad:
    """The launches of one :func:`matmul_dgrad`, a few slices at a time, and what they write."""

    def __init__(
        self,
        grad: Tensor,
        weight: Tensor,
        x: Tensor,
        clipped: Tensor | None,
        input_range: Tensor | None,
        slices: int,
        mask: Tensor | None,
        decay: float,
        input_min_percentage: float,
        fast_mode: bool,
        inp_res: float = -1.0,
        needs_steps: bool = False,
        config: MatmulDgradConfig | None = None,
    ) -> None:
        (M, K), N = x.shape, weight.shape[0]
        clip = input_range is not None
        sizes = M, N, cdiv(K, slices)
        config = config or choose(SPACE, x.device, grad.dtype, sizes, (clip,))
        is_at_hand = not clip or (x.dtype == grad.dtype and describable(x))
        if config.PIPELINED and not (is_at_hand and can_be_pipelined(grad, weight, slices, mask)):
            config = _plain_config(Problem(hardware(x.device), grad.dtype, sizes, (clip,)))
        self.config, self.takes_mask = config, config.PIPELINED
        self.blocks_m = cdiv(M, config.BLOCK_M)
        self.blocks_k = cdiv(cdiv(K, slices), config.BLOCK_K)
        shares = pipeline.dgrad_parts(M, cdiv(K, slices)) if config.PIPELINED else self.blocks_m * self.blocks_k
        self.weight, self.x, self.clipped, self.slices = weight, x, clipped, slices
        self.input_range = None if input_range is None else input_range.contiguous()
        self.rule = decay, input_min_percentage, fast_mode
        self.inp_res = inp_res
        self.dx = torch.empty(M, K, dtype=grad.dtype, device=x.device)
        self.parts = torch.empty(slices, shares if clip else 0, 2, dtype=torch.float32, device=x.device)
        self.steps = torch.empty(M if needs_steps else 0, K, dtype=grad.dtype, device=x.device)

    def launch(self, first: int, count: int, passed: Tensor) -> None:
        """``count`` slices from ``first`` on, whose ADCs let ``passed [count or 1, M, N]`` through."""
        config, weight, x, slices = self.config, self.weight, self.x, self.slices
        (M, K), N = x.shape, weight.shape[0]
        descriptors = config.DESCRIPTORS and describable(passed, weight) and slices_describable(weight, slices)
        options = vars(config) | {"DESCRIPTORS": descriptors}
        del options["PIPELINED"]
        launch(
            matmul_dgrad_kernel, (self.blocks_m * count * self.blocks_k,), x.device,
            descriptor(passed, config.BLOCK_M, config.BLOCK_N, descriptors),
            descriptor(weight, config.BLOCK_N, config.BLOCK_K, descriptors), x, self.clipped, self.input_range, self.dx,
            self.steps, self.parts, M, N, K, slices, first, count, *passed.stride(), *weight.stride(), *x.stride(),
            self.blocks_k * config.BLOCK_K, half_steps(self.inp_res), CLIP=self.input_range is not None, FAST=self.rule[2],
            SLICED=len(passed) > 1, STEPS=self.steps.numel() > 0, INT8=x.dtype == torch.int8, PRECISION=input_precision(),
            ALIGNED=aligned(K, slices), **options,
        )  # fmt: skip

    def launch_masked(self, grad: Tensor, mask: Tensor | None) -> None:
        """All slices at once, if this ``takes_mask``."""
        pipeline.launch_dgrad(
            grad, self.weight, self.x, self.input_range, mask, self.dx, self.steps, self.parts, self.slices,
            half_steps(self.inp_res), self.rule[2], self.config.GROUP_M,
        )  # fmt: skip

    def range_grad(self) -> Tensor:
        """What :func:`launch_range_grad` gives, once all slices were launched."""
        if self.input_range is None:
            return self.parts.new_empty(0)
        M, K = self.x.shape
        return launch_range_grad(self.parts, self.input_range, M, K, *self.rule, self.input_range.dtype)


def launch_matmul_dgrad(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    clipped: Tensor | None,
    input_range: Tensor | None,
    slices: int,
    mask: Tensor | None,
    decay: float,
    input_min_percentage: float,
    fast_mode: bool,
    inp_res: float = -1.0,
    needs_steps: bool = False,
    config: MatmulDgradConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if input_range is None and mask is None:  # then slices make no difference
        slices = 1
    dgrad = MatmulDgrad(
        grad, weight, x, clipped, input_range, slices, mask, decay, input_min_percentage, fast_mode, inp_res, needs_steps, config
    )  # fmt: skip
    multiply_passed(grad, mask, slices, dgrad)
    return dgrad.dx, dgrad.range_grad(), dgrad.steps


def _fake(
    grad: Tensor, x: Tensor, input_range: Tensor | None, decay: float, needs_steps: bool
) -> tuple[Tensor, Tensor, Tensor]:
    M, K = x.shape
    dr = (
        empty_range_grad(input_range, decay)
        if input_range is not None
        else grad.new_empty(0, dtype=check.wide_dtype(grad))
    )
    return grad.new_empty(M, K), dr, grad.new_empty(M if needs_steps else 0, K)


_matmul_dgrad = Operator("matmul_dgrad", launch_matmul_dgrad, reference.matmul_dgrad, _fake)


def matmul_dgrad(
    grad: Tensor,
    weight: Tensor,
    x: Tensor,
    input_range: Tensor | None,
    slices: int,
    mask: Tensor | None = None,
    *,
    clipped: Tensor | None = None,
    decay: float = 0.0,
    input_min_percentage: float = 0.95,
    fast_mode: bool = False,
    inp_res: float = -1.0,
    needs_steps: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`triton_analog.ops.matmul` in ``x [M, K]`` and in a static ``input_range [S]``.

    Args:
        grad: Gradient ``[M, N]`` of the product, any strides.
        weight: ``[N, K]``, the weight of the forward.
        x: Inputs ``[M, K]`` of the forward, or what :func:`triton_analog.ops.dac_steps` kept of them (int8).
        input_range: ``[S]``, or None where nothing clips (no range or a dynamic one); its gradient is then empty.
        slices: Number of slices of the columns.
        mask: The forward's saturation mask, or what it lets pass of ``grad`` (:func:`triton_analog.ops.adc_grad`), which
            spares the second of the two gradients a pass; or None without a bound.
        clipped: The flags of :func:`triton_analog.ops.dac_steps`, needed with an int8 ``x`` and a range.
        decay: Pull of the range towards 0 where almost nothing clips; 0 is off.
        input_min_percentage: Share of unclipped inputs above which ``decay`` acts.
        fast_mode: The plain gradient of a clamp instead of the learned-range rule.
        inp_res: The input converter's resolution, for ``needs_steps``.
        needs_steps: Also return the converted input as numbers of steps, which costs little here and saves
            :func:`triton_analog.ops.matmul_wgrad` a pass. Needs ``input_range`` and ``inp_res``.

    Returns:
        ``dx [M, K]`` in the dtype of ``grad``, ``dr [S]`` in that of ``input_range``, and the steps ``[M, K]`` in the dtype of
        ``grad`` (or no rows).

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or numbers outside the above.
    """
    check.product_operands(x, weight, slices)
    check.product_grad(grad, x, weight.shape[0], slices, mask)
    check.same_dtype("grad", grad, weight=weight)
    if input_range is not None:
        check.static_range(input_range, slices)
        check.together("x", x, input_range=input_range)
        check.clip_bits(x, clipped)
    check.range_rule(decay, input_min_percentage)
    check.resolution("inp_res", inp_res)
    check.require(
        not needs_steps or (input_range is not None and inp_res > 0),
        lambda: "needs_steps: asked for without an input converter; give input_range and inp_res > 0",
    )
    return _matmul_dgrad(
        grad, weight, x, clipped, input_range, slices, mask, decay, input_min_percentage, fast_mode, float(inp_res),
        needs_steps,
    )  # fmt: skip
