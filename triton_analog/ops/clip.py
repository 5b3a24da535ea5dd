"""The Gaussian clip of many weights at once (SEMANTICS 4): each clamped in place to a number of its own deviations.

``w <- clamp(w, -sigma * std, sigma * std)``, with the unbiased deviation of every channel, or of the whole weight

Kernels find the weights by a table of addresses, as a stack of them would be a copy. An entry is what one program does: some
channels of a weight, whose first tile stays in registers, so that a channel no longer than a tile is read once; or a part of
a weight with one deviation, which takes a launch for the moments of all parts and one that merges them and clamps. Most
numbers stay as they are and are not written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import triton_analog.reference as reference
from triton_analog.lang import cast
from triton_analog.launch import block, cdiv, launch, runs_kernel
from triton_analog.ops import _checks as check
from triton_analog.ops._transforms import in_place, is_transforming
from triton_analog.ops.std import merge, merge_all, unbiased_std

PROGRAM = 2**16
"""About so many numbers a program takes: enough to hide what reading its entry costs."""
TILE = 2**12
"""Numbers in a tile: 16 for each of 256 threads."""
LONGEST = 2**13
"""Numbers of one channel that stay in registers, of twice as many threads."""
COLUMNS = 64
"""Channels of a tile whose channels are neighbours in memory: 128 bytes of 16-bit numbers."""

ENTRY = tl.constexpr(5)
"""Numbers of an entry: an address; channels (of a part: the first part of its weight); numbers in each channel (in the part);
their distance (the parts of the weight); the bits of sigma in fp32."""


@dataclass(frozen=True)
class ClipConfig:
    """How a kernel runs over weights of one kind. Weights of equal configurations share a launch.

    Nothing in it is worth a search: a weight is read once, and one launch has weights of many shapes.
    """

    WHOLE: bool
    """One deviation for the whole weight."""
    ACROSS: bool
    """The channels are neighbours in memory, not the numbers of one."""
    ALIGNED: bool
    """Loads of 16 bytes are possible."""
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int


class _Layout(NamedTuple):
    """A weight in memory."""

    channels: int
    width: int
    """Numbers in each channel."""
    stride: int
    """From one channel to the next; ``across``: from one number of a channel to the next. The other distance is 1."""
    across: bool


def _joined(weight: Tensor, dims: Sequence[int]) -> tuple[int, int] | None:
    """Size and stride of ``dims`` as a single one, in any order; None where they cannot be one."""
    strides = sorted((weight.stride(dim), weight.shape[dim]) for dim in dims if weight.shape[dim] != 1)
    step, total = strides[0][0] if strides else 1, 1
    for stride, size in strides:
        if stride != step * total:
            return None
        total *= size
    return total, step


def _layout(weight: Tensor, channel_dim: int | None) -> _Layout | None:
    """None where a kernel cannot run over it, or nothing is to be done."""
    joined = _joined(weight, [dim for dim in range(weight.ndim) if dim != channel_dim])
    if joined is None or joined[0] < 2:
        return None
    width, step = joined
    channels, stride = (1, width) if channel_dim is None else (weight.shape[channel_dim], weight.stride(channel_dim))
    if step == 1 and (stride >= width or channels == 1):
        return _Layout(channels, width, stride, False)
    if stride == 1 and step >= channels:
        return _Layout(channels, width, step, True)
    return None


def _config(weight: Tensor, layout: _Layout, whole: bool) -> ClipConfig:
    _, width, stride, across = layout
    even = layout.channels if across else width
    aligned = weight.data_ptr() % 16 == 0 and even % 16 == 0 and stride % 16 == 0
    if whole:
        return ClipConfig(True, False, aligned, BLOCK_N=1, BLOCK_K=TILE, num_warps=8)
    if across:
        # Half a tile: every row of one has an address of its own, in registers too.
        return ClipConfig(False, True, aligned, COLUMNS, BLOCK_K=block(width, TILE // COLUMNS // 2), num_warps=8)
    block_k = block(width, LONGEST)
    block_n = max(1, min(32, TILE // block_k))
    return ClipConfig(False, False, aligned, block_n, block_k, num_warps=16 if block_k == LONGEST else 8)


@triton.jit
def read_entry(table_ptr, like_ptr, ACROSS: tl.constexpr, ALIGNED: tl.constexpr):
    """What this program does, as :data:`ENTRY` says."""
    entry = table_ptr + tl.program_id(0).to(tl.int64) * ENTRY
    x_ptr, stride = tl.load(entry).to(like_ptr.dtype), tl.load(entry + 3)
    N, K = tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
    if ALIGNED:
        x_ptr, stride = tl.multiple_of(x_ptr, 16), tl.multiple_of(stride, 16)
        if ACROSS:
            N = tl.multiple_of(N, 16)
        else:
            K = tl.multiple_of(K, 16)
    sigma = tl.load(entry + 4).to(tl.int32).to(tl.float32, bitcast=True)
    return x_ptr, N, K, stride, sigma


@triton.jit
def tile_of(x_ptr, n, k, N, K, stride, ACROSS: tl.constexpr):
    """Addresses of the numbers ``k`` of the channels ``n``, and which of them there are."""
    if ACROSS:
        offset = k[None, :].to(tl.int64) * stride + n[:, None]
    else:
        offset = n[:, None].to(tl.int64) * stride + k[None, :]
    return x_ptr + offset, (n < N)[:, None] & (k < K)[None, :]


@triton.jit
def moments_of_tile(x, inside, count):
    """Mean and squared deviations of each row, which has ``count`` numbers ``inside``; the others are 0."""
    mean = tl.sum(x, axis=1) / count
    distance = tl.where(inside, x - mean[:, None], 0.0)
    return mean, tl.sum(distance * distance, axis=1)


@triton.jit
def moments_of_channels(x_ptr, first, inside, n, N, K, stride, ACROSS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Count, mean and squared deviations of the channels ``n``, whose ``first`` tile is there already."""
    count = tl.minimum(K, BLOCK_K).to(tl.float32)
    mean, m2 = moments_of_tile(first, inside, count)
    for start in range(BLOCK_K, K, BLOCK_K):
        address, inside = tile_of(x_ptr, n, start + tl.arange(0, BLOCK_K), N, K, stride, ACROSS)
        count_b = tl.minimum(K - start, BLOCK_K).to(tl.float32)
        x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        mean_b, m2_b = moments_of_tile(x, inside, count_b)
        count, mean, m2 = merge(count, mean, m2, count_b, mean_b, m2_b)
    return count, mean, m2


@triton.jit
def clamp_tile(address, x, inside, bound):
    """Write those of the numbers ``x`` that are beyond ``bound [N]``; all where that is NaN, as torch's clamp does."""
    bound = bound[:, None]
    clamped = tl.where(bound == bound, tl.minimum(tl.maximum(x, -bound), bound), bound)
    tl.store(address, cast(clamped, address.dtype.element_ty), mask=inside & (clamped != x))


@triton.jit
def clamp_rest(x_ptr, n, N, K, stride, bound, first, ACROSS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Clamp the numbers of the channels ``n`` from the number ``first`` on."""
    for start in range(first, K, BLOCK_K):
        address, inside = tile_of(x_ptr, n, start + tl.arange(0, BLOCK_K), N, K, stride, ACROSS)
        clamp_tile(address, tl.load(address, mask=inside, other=0.0).to(tl.float32), inside, bound)


@triton.jit
def clip_channels_kernel(
    table_ptr, like_ptr, ACROSS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Clip the channels of this program's entry in ``table [programs, 5]``; ``like`` has the dtype of the weights."""
    x_ptr, N, K, stride, sigma = read_entry(table_ptr, like_ptr, ACROSS, ALIGNED)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        address, inside = tile_of(x_ptr, n, tl.arange(0, BLOCK_K), N, K, stride, ACROSS)
        x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        count, _, m2 = moments_of_channels(x_ptr, x, inside, n, N, K, stride, ACROSS, BLOCK_K)
        bound = sigma * unbiased_std(count, m2)
        clamp_tile(address, x, inside, bound)
        clamp_rest(x_ptr, n, N, K, stride, bound, BLOCK_K, ACROSS, BLOCK_K)


@triton.jit
def part_moments_kernel(table_ptr, like_ptr, parts_ptr, ALIGNED: tl.constexpr, BLOCK_K: tl.constexpr):
    """``parts [programs, 3]``: count, mean and squared deviations of each part."""
    x_ptr, _, K, _, _ = read_entry(table_ptr, like_ptr, False, ALIGNED)
    n = tl.arange(0, 1)
    address, inside = tile_of(x_ptr, n, tl.arange(0, BLOCK_K), 1, K, 0, False)
    x = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    count, mean, m2 = moments_of_channels(x_ptr, x, inside, n, 1, K, 0, False, BLOCK_K)
    part = parts_ptr + (tl.program_id(0) * 3 + n)
    tl.store(part, tl.zeros((1,), tl.float32) + count)
    tl.store(part + 1, mean)
    tl.store(part + 2, m2)


@triton.jit
def clamp_parts_kernel(
    table_ptr, like_ptr, parts_ptr, ALIGNED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Clip each part by the deviation of its weight, from the moments of all its parts."""
    x_ptr, first, K, parts, sigma = read_entry(table_ptr, like_ptr, False, ALIGNED)
    zeros = tl.zeros((BLOCK_P,), tl.float32)
    count, mean, m2 = zeros, zeros, zeros
    for start in range(0, parts.to(tl.int32), BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        part = parts_ptr + (first + p) * 3
        count_b = tl.load(part, mask=p < parts, other=0.0)
        mean_b = tl.load(part + 1, mask=p < parts, other=0.0)
        m2_b = tl.load(part + 2, mask=p < parts, other=0.0)
        count, mean, m2 = merge(count, mean, m2, count_b, mean_b, m2_b)
    total = tl.sum(count)
    _, m2 = merge_all(total, count, mean, m2)
    bound = sigma * unbiased_std(total, m2) + tl.zeros((1,), tl.float32)
    clamp_rest(x_ptr, tl.arange(0, 1), 1, K, 0, bound, 0, False, BLOCK_K)


def _table(weights: Sequence[Tensor], sigmas: Sequence[float], channel_dim: int | None, config: ClipConfig) -> Tensor:
    """``[programs, 5]`` on the CPU, as :data:`ENTRY` says."""
    rows = []
    for weight in weights:
        layout = _layout(weight, channel_dim)
        assert layout is not None
        channels, width, stride, across = layout
        shared = width if config.WHOLE else channels  # what the programs of a weight share out
        share = PROGRAM if config.WHOLE else COLUMNS if across else max(config.BLOCK_N, PROGRAM // width)
        step = weight.element_size() * (1 if config.WHOLE or across else stride)
        rows.append((weight.data_ptr(), step, shared, share, cdiv(shared, share), width, stride))
    numbers = torch.tensor(rows)
    counts = numbers[:, 4]
    weight_of = torch.repeat_interleave(counts)
    addresses, steps, all_shared, shares, programs, widths, strides = numbers[weight_of].unbind(1)
    bits = torch.tensor(sigmas, dtype=torch.float32).view(torch.int32).long()[weight_of]
    first = (counts.cumsum(0) - counts)[weight_of]
    start = (torch.arange(len(weight_of)) - first) * shares
    taken = torch.minimum(shares, all_shared - start)
    middle = (first, taken, programs) if config.WHOLE else (taken, widths, strides)
    return torch.stack([addresses + start * steps, *middle, bits], dim=1)


def _on_device(table: Tensor, device: torch.device) -> Tensor:
    """Without waiting for the device."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def launch_clip(like: Tensor, channel_dim: int | None, table: Tensor) -> None:
    """One launch, or two for whole weights. ``like``: one of the weights in the ``table``."""
    layout = _layout(like, channel_dim)
    assert layout is not None
    config = _config(like, layout, channel_dim is None)
    grid, aligned = table.shape[:1], config.ALIGNED
    if not config.WHOLE:
        launch(
            clip_channels_kernel, grid, table.device, table, like, ACROSS=config.ACROSS, ALIGNED=aligned,
            BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, num_warps=config.num_warps,
        )  # fmt: skip
        return
    parts = torch.empty(*grid, 3, dtype=torch.float32, device=table.device)
    options = {"ALIGNED": aligned, "BLOCK_K": config.BLOCK_K, "num_warps": config.num_warps}
    launch(part_moments_kernel, grid, table.device, table, like, parts, **options)
    launch(clamp_parts_kernel, grid, table.device, table, like, parts, **options, BLOCK_P=256)


class ClipBatch(NamedTuple):
    """Weights that are clipped together, by :meth:`run`."""

    weights: list[Tensor]
    sigmas: list[float]
    channel_dim: int | None
    table: Tensor | None
    """Where they lie; None for weights that plain torch clips one after the other."""

    def run(self) -> None:
        """Clip them, without waiting for the device. Call it under ``torch.no_grad()``."""
        torch.ops.triton_analog.clip(*self)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def clip_batches(
    weights: Sequence[Tensor], sigmas: Sequence[float], channel_dims: Sequence[int | None]
) -> list[ClipBatch]:
    """What to run, one batch after the other, to clip ``weights``, each with its own ``sigma`` and ``channel_dim``.

    The batches serve as long as memory, shapes, strides and dtypes of the weights stay. Weights that lie in one place are
    clipped in the order given. While a graph is captured no table can be made, so that plain torch clips all of them.
    """
    found: dict[Any, list[tuple[Tensor, float]]] = {}
    times: dict[tuple[torch.device, int], int] = {}
    for weight, sigma, channel_dim in zip(weights, sigmas, channel_dims, strict=True):
        place = weight.device, weight.data_ptr()
        times[place] = times.get(place, 0) + 1
        layout = _layout(weight, channel_dim) if runs_kernel(weight) and not _is_capturing(weight.device) else None
        config = None if layout is None else _config(weight, layout, channel_dim is None)
        key = times[place], weight.device, weight.dtype, channel_dim, config
        found.setdefault(key, []).append((weight, sigma))
    batches = []
    for key in sorted(found, key=lambda key: key[0]):
        *_, device, _, channel_dim, config = key
        together, their_sigmas = (list(column) for column in zip(*found[key], strict=True))
        table = None if config is None else _on_device(_table(together, their_sigmas, channel_dim, config), device)
        batches.append(ClipBatch(together, their_sigmas, channel_dim, table))
    return batches


@torch.library.custom_op("triton_analog::clip", mutates_args=("weights",))
def _clip(weights: list[Tensor], sigmas: list[float], channel_dim: int | None, table: Tensor | None) -> None:
    """``table``: of just these weights, from :func:`clip_batches`; None: it is made here, if one is needed."""
    if not any(map(runs_kernel, weights)):
        reference.clip(weights, sigmas, channel_dim)
    elif table is not None:
        launch_clip(weights[0], channel_dim, table)
    else:
        for batch in clip_batches(weights, sigmas, [channel_dim] * len(weights)):
            if batch.table is None:
                reference.clip(batch.weights, batch.sigmas, channel_dim)
            else:
                launch_clip(batch.weights[0], channel_dim, batch.table)


@_clip.register_fake
def _(weights: list[Tensor], sigmas: list[float], channel_dim: int | None, table: Tensor | None) -> None:
    return None


def clip(weights: Sequence[Tensor], sigmas: Sequence[float], channel_dim: int | None = None) -> None:
    """Clamp every weight in place to ``+- sigma`` times its unbiased standard deviation, in fp32 (fp64 for fp64).

    A weight (or channel) of a single number has no deviation and stays as it is; inf and NaN make NaN of all of it. Nothing
    waits for the device, and no gradient flows. To clip the same weights again and again keep their :func:`clip_batches`.

    Args:
        weights: Tensors of any shape, also of several dtypes and devices. A channel's numbers are best contiguous.
        sigmas: Deviations to clamp to, > 0, one number for each weight.
        channel_dim: Each index of this dimension has a deviation of its own; None: there is one for the whole weight.

    Raises:
        TypeError: a weight is not a floating-point tensor.
        ValueError: not as many ``sigmas`` as ``weights``, one that is not > 0, or a weight without a ``channel_dim``.
    """
    check.require(
        len(weights) == len(sigmas),
        lambda: f"sigmas: got {len(sigmas)} for {len(weights)} weights; one for each weight is needed",
    )
    for weight in weights:
        check.floating("weights", weight)
    check.require(
        all(sigma > 0 for sigma in sigmas),
        lambda: f"sigmas: got {list(sigmas)}; allowed are numbers of standard deviations > 0",
    )
    smallest = min((weight.ndim for weight in weights), default=0)
    check.require(
        channel_dim is None or 0 <= channel_dim < smallest,
        lambda: (
            f"channel_dim: got {channel_dim} for weights of {smallest} dimensions and more; allowed are None and a dimension "
            "that every weight has, counted from 0"
        ),
    )
    if is_transforming():
        raise in_place("clip", ["weights"])
    with torch.no_grad():
        _clip([weight.detach() for weight in weights], [float(sigma) for sigma in sigmas], channel_dim, None)
