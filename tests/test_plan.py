"""Plans of launchers: what they start on a GPU that is not there, which calls share one, and how many are kept."""

from __future__ import annotations

from functools import lru_cache
from math import prod

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.stand_in import NOWHERE, pretended_gpu, stand_in
from triton_analog import launch
from triton_analog.launch import devices, plan
from triton_analog.launch.plan import Plan, planned


def scale_kernel(x_ptr, out_ptr, bias_ptr, size, factor, BLOCK: tl.constexpr, NEGATE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size, other=0) * factor
    if bias_ptr is not None:
        x += tl.load(bias_ptr)
    tl.store(out_ptr + offsets, -x if NEGATE else x, mask=offsets < size)


def copy_kernel(source, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), source.load([0, 0]).reshape(BLOCK))


SCALE, COPY = JITFunction(scale_kernel), JITFunction(copy_kernel)
X = torch.ones(64)


def launch_scale(x, bias, size, factor, block, negate, warps, skipped, start):
    """``skipped``: elements at the beginning of the output's memory."""
    out = x.new_empty(x.numel() + skipped)[skipped:]
    start(SCALE, (7,), x.device, x, out, bias, size, factor, BLOCK=block, NEGATE=negate, num_warps=warps)
    return out


def launch_copy(x, block, start):
    out = x.new_empty(x.numel())
    source = TensorDescriptor.from_tensor(x.reshape(2, -1), list(block))
    start(COPY, (7,), x.device, source, out, BLOCK=prod(block))
    return out


PLANNED = {
    launch_scale: planned(launch_scale, (True, True, *(False,) * 7)),
    launch_copy: planned(launch_copy, (True, False, False)),
}


def scaled(x=X, bias=None, size=48, factor=2.0, block=64, negate=False, warps=4, skipped=0):
    return launch_scale, (x, bias, size, factor, block, negate, warps, skipped)


def copied(x=X, block=(2, 16)):
    return launch_copy, (x, block)


def in_tritons_way(kernel, grid, device, *args, **options):
    kernel[grid](*args, enable_fp_fusion=True, **options)


def by_plan(launched) -> Tensor:
    launcher, args = launched
    return PLANNED[launcher](*args, launch.launch)


@pytest.fixture
def started():
    """What a GPU that is not there was asked to run: hashes of compiled kernels, grids and arguments."""
    started = []
    with pretended_gpu(lambda kernel, grid, args: started.append((kernel.hash, grid, args))):
        yield started


@pytest.fixture
def written(monkeypatch):
    """The calls for which a plan was written."""
    written, write = [], Plan._write

    def spy(self, launcher, args):
        written.append(args)
        return write(self, launcher, args)

    monkeypatch.setattr(Plan, "_write", spy)
    return written


# ---- What is started --------------------------------------------------------------------------------------------------

LAUNCHES = {
    "first": scaled(),
    "another size": scaled(size=32),
    "a size that 16 does not divide": scaled(size=50),
    "size 1": scaled(size=1),
    "a size of 64 bits": scaled(size=2**31),
    "a negative size": scaled(size=-16),
    "an unaligned input": scaled(torch.ones(64)[1:]),
    "an unaligned output": scaled(skipped=1),
    "another dtype": scaled(X.bfloat16()),
    "with a bias": scaled(bias=torch.ones(16)),
    "another factor": scaled(factor=3.0),
    "an integer factor": scaled(factor=2),
    "factor 1": scaled(factor=1),
    "a factor that is a flag": scaled(factor=True),
    "another block": scaled(block=32),
    "another branch": scaled(negate=True),
    "another number of warps": scaled(warps=8),
    "a descriptor": copied(),
    "a descriptor of another block": copied(block=(1, 32)),
    "a descriptor of another dtype": copied(X.half()),
}


def described(arg, out):
    """An argument of a start, whether Triton was given it or a plan: addresses, and numbers with their types."""
    if isinstance(arg, TensorDescriptor):
        rest = {name: value for name, value in vars(arg).items() if name != "base"}
        return arg.base.data_ptr(), rest
    address = arg.data_ptr() if isinstance(arg, Tensor) else arg
    return "output" if address == out.data_ptr() else repr(address)


def last_start(started, out):
    binary, grid, args = started[-1]
    return binary, grid, [described(arg, out) for arg in args]


def test_a_plan_starts_the_kernel_that_triton_would(started, written):
    """Every launch is written down once and then done again, twice and in turns, so that each meets the plans of all others."""
    by_triton = {}
    for name, (launcher, args) in LAUNCHES.items():
        out = launcher(*args, in_tritons_way)
        by_triton[name] = last_start(started, out)
    for _ in range(3):
        for name, launched in LAUNCHES.items():
            out = by_plan(launched)
            assert last_start(started, out) == by_triton[name], name
    assert len(started) == 4 * len(LAUNCHES)
    assert len(written) == len(LAUNCHES)
    assert len({binary for binary, *_ in by_triton.values()}) >= 15, "these launches need different kernels"


def test_a_plan_passes_by_tritons_lookup(started, monkeypatch):
    by_plan(scaled())
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: pytest.fail("asked Triton again"))
    other = torch.zeros(64)
    out = by_plan(scaled(other))
    first, again = ([described(arg, out) for arg in args] for _, _, args in started)
    assert again[:2] == [repr(other.data_ptr()), "output"]
    assert again[2:] == first[2:]
    with pytest.raises(pytest.fail.Exception, match="asked Triton again"):
        by_plan(scaled(warps=2))


# ---- Which calls share a plan -----------------------------------------------------------------------------------------

PLAIN = {"x": X, "bias": torch.ones(16)}
CHANGES = {
    "dtype": {"x": X.half()},
    "shape": {"x": torch.ones(48)},
    "dimensions": {"x": torch.ones(8, 8)},
    "strides": {"x": torch.ones(128)[::2]},
    "alignment": {"x": torch.ones(68)[1:65]},
    "the other tensor": {"bias": torch.ones(17)[1:]},
    "a missing tensor": {"bias": None},
    "number": {"size": 32},
    "type of a number": {"factor": 2},
    "flag": {"negate": True},
    "flag given as a number": {"negate": 0},
    "warps": {"warps": 8},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_signature_finds_a_plan_of_its_own(change, started, written):
    for _ in range(2):
        by_plan(scaled(**PLAIN))
        by_plan(scaled(**PLAIN | change))
    assert len(written) == 2


def test_the_precision_of_products_is_part_of_the_signature(started, written):
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high") * 2:
            torch.set_float32_matmul_precision(precision)
            by_plan(scaled())
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(written) == 2


def test_the_device_is_part_of_the_signature():
    here, there = plan.layout(X), plan.layout(X.to("meta"))
    assert [a == b for a, b in zip(here, there, strict=True)] == [True, True, True, False, True]


def test_other_tensors_of_one_signature_share_a_plan(started, written):
    for _ in range(3):
        by_plan(scaled(torch.ones(64), torch.ones(16)))
    assert len(written) == 1


# ---- How many are kept ------------------------------------------------------------------------------------------------


def test_as_many_plans_are_kept_as_allowed(started, written, monkeypatch):
    assert plan._plan.cache_info().maxsize == plan.PLANS
    monkeypatch.setattr(plan, "_plan", lru_cache(maxsize=2, typed=True)(plan._plan.__wrapped__))
    for size in (1, 2, 3, 2, 3):
        by_plan(scaled(size=size))
    assert len(written) == 3
    by_plan(scaled(size=1))
    assert len(written) == 4, "the one that was used longest ago is gone"


def test_plans_are_written_anew_once_all_were_forgotten(started, written):
    by_plan(scaled())
    plan.forget()
    by_plan(scaled())
    assert len(written) == 2


# ---- The GPU that is not there ----------------------------------------------------------------------------------------


def test_the_stand_in_leaves_nothing_behind():
    hardware, compiler = devices._hardware, triton.compiler.compile
    for _ in range(2):
        started = []
        with pretended_gpu(lambda *start, into=started: into.append(start)):
            by_plan(scaled())
        assert len(started) == 1, "each has its own starts"
        assert NOWHERE not in SCALE.device_caches
        assert SCALE.compile is triton.compiler.compile is compiler
        assert devices._hardware is hardware


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(AssertionError, match="unset TRITON_INTERPRET"), stand_in():
        pass
