"""What the tests of the operations share: inputs, views, the formulas of SEMANTICS, and the comparison with fp64 truth."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
import triton
from packaging.version import Version
from torch import Tensor

from triton_analog import reference
from triton_analog.testing.accuracy import TIE, allowed_error, may_flip, near_tie
from triton_analog.tuning.processes import run_in_processes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
all_views = pytest.mark.parametrize("view", ["contiguous", "transposed", "strided", "column_sliced"])

needs_interpreter = pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and Version(np.__version__) >= Version("2.4"),
    reason="the interpreter of Triton 3.6 fails with NumPy 2.4 and later",
)

# ---- Inputs ---------------------------------------------------------------------------------------------------------


def randn(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Drawn on the CPU, so that every device sees the same numbers."""
    return torch.randn(shape).to(device=device, dtype=dtype)


def tensor(values: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def seed_of(value: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([value], dtype=torch.int64, device=device)


def viewed(x: Tensor, view: str) -> Tensor:
    """The matrix ``x`` again, in another memory layout; NaN lies in the gaps."""
    rows, cols = x.shape
    if view == "transposed":
        return x.T.contiguous().T
    if view == "strided":
        out = x.new_full((2 * rows, 3 * cols), torch.nan)[::2, ::3]
    elif view == "column_sliced":
        out = x.new_full((rows + 2, cols + 5), torch.nan)[1:-1, 3:-2]
    else:
        out = torch.empty_like(x)
    return out.copy_(x)


def padded_rows(x: Tensor) -> Tensor:
    """The matrix (or matrices) ``x`` again, in rows of a multiple of 16 elements, so that tensor descriptors can address it.
    NaN (integers: the largest) lies beyond its last column."""
    *rows, cols = x.shape
    gap = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    return x.new_full((*rows, cols + -cols % 16), gap)[..., :cols].copy_(x)


def cut(x: Tensor, slices: int) -> tuple[Tensor, ...]:
    """The slices of the columns: as equal as possible, the first ones wider (SEMANTICS 1)."""
    return torch.tensor_split(x, slices, dim=-1)


def columns_of_bits() -> np.ndarray:
    """Which of 128 columns each bit ``[word, bit]`` of a mask stands for, as ``reference.pack_bits`` documents it."""
    word, bit = np.meshgrid(np.arange(4), np.arange(32), indexing="ij")
    return 32 * (bit // 8) + 16 * (bit // 4 % 2) + 8 * (bit // 2 % 2) + 2 * word + bit % 2


def unpacked(mask: Tensor, columns: int) -> Tensor:
    """Saturation flags ``[..., M, columns]`` of packed words ``[..., ceil(columns / 128), M, 4]``."""
    assert mask.dtype == torch.int32
    bits = np.unpackbits(mask.cpu().contiguous().numpy().view(np.uint8), axis=-1, bitorder="little")
    *batch, blocks, rows, _ = bits.shape
    flags = np.empty((*batch, blocks, rows, 128), bool)
    flags[..., columns_of_bits().reshape(-1)] = bits
    flags = np.moveaxis(flags, -3, -2).reshape(*batch, rows, 128 * blocks)
    assert not flags[..., columns:].any(), "bits beyond the last column are set"
    return torch.from_numpy(flags[..., :columns].copy()).to(mask.device)


def packed(flags: Tensor) -> Tensor:
    """The inverse of :func:`unpacked`."""
    *batch, rows, columns = flags.shape
    blocks = -(-columns // 128)
    padded = np.zeros((*batch, rows, 128 * blocks), bool)
    padded[..., :columns] = flags.cpu().numpy()
    by_block = np.moveaxis(padded.reshape(*batch, rows, blocks, 128), -2, -3)
    bits = np.ascontiguousarray(by_block[..., columns_of_bits().reshape(-1)])
    words = np.packbits(bits, axis=-1, bitorder="little").view(np.int32)
    return torch.from_numpy(words).to(flags.device)


# ---- Tolerance ------------------------------------------------------------------------------------------------------


def assert_accurate(
    actual: Tensor,
    truth: Tensor,
    plain: Tensor,
    slack: Tensor | float = 0.0,
    size: Tensor | float | None = None,
    terms: int = 16,
) -> None:
    """``actual`` is at most twice as far from the fp64 ``truth`` as plain torch in the same dtype, plus a floor
    (:func:`triton_analog.testing.accuracy.allowed_error`).

    The floor is relative to the largest of ``truth``, or to ``size``: the magnitudes behind a sum whose terms cancel.
    ``terms``: how many of them the sum has where plain torch's is blocked, and the kernel's on a GPU in fp32 is not.
    ``slack`` is what a rounding decided the other way at a tie would move, 0 elsewhere; no more than one element in a
    thousand may need it. NaN is where it is in ``truth``.
    """
    assert actual.shape == truth.shape
    assert actual.dtype == plain.dtype
    assert torch.equal(actual.isnan(), truth.isnan())
    if truth.numel() == 0:
        return
    slack = torch.as_tensor(slack, device=truth.device).expand_as(truth)
    truth, actual, plain = (t.double().nan_to_num(nan=0.0) for t in (truth, actual, plain))
    plain_error = (plain - truth).abs().where(slack == 0, 0.0).max()
    limit = allowed_error(plain_error, truth.abs().max() if size is None else size, terms)
    error = (actual - truth).abs()
    flipped = error > limit
    assert (error <= limit + slack * (1 + 2.0**-8)).all(), f"error {error.max():.3g}, allowed {limit:.3g}"
    assert flipped.sum() <= may_flip(truth.numel()), f"{flipped.sum()} roundings of {truth.numel()} differ"


def assert_equal_sums(actual: Tensor, expected: Tensor, terms: int) -> None:
    """Sums of the same ``terms`` products, added up in any two orders.

    Which order a library takes depends on the shape, the layout and even the alignment of what it multiplies, and so do the last
    bits. In 16 bits, one of a thousand may be rounded to the neighbour.
    """
    unit = 0.0 if expected.dtype == torch.float32 else torch.finfo(expected.dtype).eps * expected.abs().double()
    assert_accurate(actual, expected, expected, slack=unit, terms=terms)


def assert_within_a_unit(actual: Tensor, expected: Tensor) -> None:
    """Equal numbers or neighbours: of two libraries that take the same root, one may not round it to the nearest."""
    lower, upper = (expected.nextafter(torch.full_like(expected, bound)) for bound in (-torch.inf, torch.inf))
    assert ((lower <= actual) & (actual <= upper)).all()


def assert_same_up_to_one_step(ours: Tensor, theirs: Tensor, step: float | Tensor) -> None:
    """Scaling in another order moves a value across a tie now and then: one step, on at most 1 % of the elements."""
    difference = (ours - theirs).abs()
    off = difference > 1e-4 * theirs.abs().max()
    assert off.float().mean() <= 0.01
    assert (difference[off] <= 1.01 * step).all()


# ---- Formulas: SEMANTICS in plain torch, any dtype, differentiable straight through every rounding ------------------------


def num_steps(res: float) -> float:
    """SEMANTICS 2: a resolution is a number of steps or its inverse."""
    return res if res > 1 else 1 / res


def step_of(res: float, bound: Tensor) -> Tensor:
    """SEMANTICS 2: ``2 * bound / steps``."""
    return 2 * bound / num_steps(res)


def round_through(v: Tensor) -> Tensor:
    return v + (v.round() - v).detach()


def range_for(r: Tensor, s: int) -> Tensor:
    """The range of slice ``s`` of a static ``[S]`` or dynamic ``[S, M]`` range, broadcastable to ``[M, K_s]``."""
    return r[s].abs() if r.ndim == 1 else r[s].abs()[:, None]


def dac_formula(x: Tensor, r: Tensor | None, slices: int, res: float) -> Tensor:
    """SEMANTICS 3, steps 1 and 2."""
    if r is None:
        return x
    parts = []
    for s, part in enumerate(cut(x, slices)):
        r_s = range_for(r, s).to(x.dtype)
        part = torch.clamp(part, -r_s, r_s)
        if res > 0:
            step = step_of(res, r_s)
            part = torch.where(step == 0, part * 0, round_through(part / step) * step)
        parts.append(part)
    return torch.cat(parts, dim=-1)


def dac_steps(x: Tensor, r: Tensor, slices: int, res: float) -> Tensor:
    """``x`` clamped, in steps before rounding, fp64."""
    parts = []
    for s, part in enumerate(cut(x.double(), slices)):
        r_s = range_for(r.double(), s)
        parts.append(torch.clamp(part, -r_s, r_s) / step_of(res, r_s))
    return torch.cat(parts, dim=-1).nan_to_num()


def off_ties(x: Tensor, r: Tensor | None, slices: int, res: float) -> Tensor:
    """``x`` with 0 where the input converter meets a tie, so that what follows the converter has one right answer."""
    return x if r is None or res <= 0 else x.masked_fill(near_tie(dac_steps(x, r, slices, res)), 0)


def adc_formula(v: Tensor, bound: Tensor, res: float) -> tuple[Tensor, Tensor, Tensor]:
    """SEMANTICS 3, step 6: rounded, then clamped; where it saturated; and what a tie decided otherwise would move."""
    if not res > 0:
        return torch.clamp(v, -bound, bound), v.detach().abs() > bound, torch.zeros_like(v)
    step, half = step_of(res, bound).expand_as(v), num_steps(res) / 2
    steps = torch.where(step == 0, v * 0, v / torch.where(step == 0, 1.0, step))
    slack = torch.where(near_tie(steps.detach()), step, 0.0)
    rounded = round_through(steps)
    return torch.clamp(rounded, -half, half) * step, rounded.detach().abs() > half + TIE, slack


def product_formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    r: Tensor | None,
    slices: int,
    *,
    inp_res: float = -1.0,
    out_noise: float = 0.0,
    noise_wmax: Tensor | None = None,
    out_bound: float = 0.0,
    bound_wmax: Tensor | None = None,
    out_res: float = -1.0,
    seed: Tensor | None = None,
    storage: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """SEMANTICS 3: ``y``, the saturation flags ``[S, M, N]`` and what ties at the output converter may move.

    ``storage`` rounds the converted input as plain torch would store it.
    """
    M, N = x.shape[0], weight.shape[0]
    x_q = dac_formula(x, r, slices, inp_res)
    if storage is not None:
        x_q = x_q.to(storage).to(x.dtype)
    total, slack = x.new_zeros(M, N), x.new_zeros(M, N)
    variance = x.new_zeros(M, N)
    saturated = []
    for s, (x_s, w_s) in enumerate(zip(cut(x_q, slices), cut(weight, slices), strict=True)):
        y_s = x_s @ w_s.T
        if out_noise > 0:
            sigma = out_noise / slices**0.5 * range_for(r, s).to(x.dtype) * noise_wmax[s].to(x.dtype)
            if out_bound > 0:
                y_s = y_s + sigma * reference.noise(seed, M, N, stream=1, plane=s).to(x.dtype)
            variance = variance + sigma**2
        if out_bound > 0:
            bound = out_bound * range_for(r, s).to(x.dtype) * bound_wmax[s].to(x.dtype)
            y_s, flags, slack_s = adc_formula(y_s, bound.detach(), out_res)
            saturated.append(flags)
            slack = slack + slack_s
        total = total + y_s
    if out_noise > 0 and not out_bound > 0:
        total = total + variance.sqrt() * reference.noise(seed, M, N, stream=1).to(x.dtype)
    if bias is not None:
        total = total + bias
    return total, torch.stack(saturated) if saturated else x.new_empty(0, M, N, dtype=torch.bool), slack


def range_grad_formula(
    grad: Tensor, x: Tensor, r: Tensor, slices: int, decay: float = 0.0, share: float = 0.95, fast: bool = False
) -> tuple[Tensor, Tensor]:
    """SEMANTICS 6 and 7: gradients of the input and of the stored range, whose sign is not part of the range."""
    grads, range_grads = [], []
    for g, part, stored in zip(cut(grad, slices), cut(x, slices), r, strict=True):
        r_s, sign = stored.abs(), 1 if stored >= 0 else -1
        up, lo = part >= r_s, part <= -r_s
        if fast:
            dr = g[up].sum() - g[lo].sum()
        else:
            dr = r_s * (g[up].clamp(max=0).sum() - g[lo].clamp(min=0).sum())
            if decay > 0:
                dr = dr + decay * r_s * ((part.abs() < r_s).double().mean() > share)
        range_grads.append(sign * dr)
        grads.append(g * (part.abs() <= r_s))
    return torch.cat(grads, dim=-1), torch.stack(range_grads)


def product_grad_formula(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, r: Tensor | None, slices: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of input, weight and bias by autograd through :func:`product_formula`."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    product_formula(*leaves, r, slices, **options)[0].backward(grad)
    return tuple(None if leaf is None else leaf.grad for leaf in leaves)


# ---- GPUs -----------------------------------------------------------------------------------------------------------

SHARED_LIMIT = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
"""Bytes a program may use."""


def free_ports(count: int) -> list[int]:
    """Of this machine, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def results_of_ranks(one_rank: Callable[..., None], ranks: int, *given: Any) -> dict[Any, Any]:
    """What ``ranks`` processes, each running ``one_rank(rank, port, *given, results)``, leave in ``results``."""
    (port,) = free_ports(1)
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(one_rank, (port, *given, results), nprocs=ranks)
        return dict(results)


def in_a_compilers_process(function, *items):
    """``function`` of each of ``items``, where Triton compiles: this process may run the interpreter, which changes Triton."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        results = run_in_processes(function, items, jobs=2)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
