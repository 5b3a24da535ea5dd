"""Compile every operation's kernels for a target that need not be there, and read the compiler's own numbers.

Launchers run on meta tensors with their launches recorded instead of started, and Triton's own code turns a launch into
what it compiles, so what is reported is what would run.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

import triton_analog.launch as launch
from triton_analog.launch.occupancy import MULTIPROCESSORS, occupancy
from triton_analog.tuning.disassembly import (
    Listing,
    parse_amdgcn,
    parse_amdgcn_metadata,
    parse_resource_usage,
    parse_sass,
)
from triton_analog.tuning.processes import run_in_processes
from triton_analog.tuning.variants import variants

TARGETS = {
    name: GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)
    for name in MULTIPROCESSORS
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPS = tuple(variants(torch.bfloat16))


@dataclass(frozen=True)
class Work:
    """One variant of an operation for one target: what a process compiles. Launches hold meta tensors and stay there."""

    op: str
    index: int
    target: str
    dtype: str

    @property
    def variant(self) -> str:
        return variants(DTYPES[self.dtype])[self.op][self.index][0]


@dataclass(frozen=True)
class Report:
    """One compiled kernel. Counts are of machine instructions."""

    op: str
    variant: str
    """What is switched on."""
    kernel: str
    target: str
    dtype: str
    config: dict[str, Any]
    """The launch's keyword arguments: block sizes, warps, stages and flags."""
    registers: int
    """Per thread."""
    spilled_bytes: int
    """Bytes of local (AMD: scratch) memory per thread: what did not fit the registers."""
    shared_bytes: int
    """Per program."""
    tensor_core_instructions: int
    instructions: int
    hottest_loop: int
    """Instructions in the innermost loop with most tensor-core instructions, or else the largest; 0 without a loop."""
    occupancy: int
    """Programs that one multiprocessor holds at once; 0 if not even one fits."""


@dataclass(frozen=True)
class Failure:
    """A kernel that did not compile; ``kernel`` is None where it was not reached."""

    op: str
    variant: str
    kernel: str | None
    target: str
    dtype: str
    error: str


@dataclass(frozen=True)
class Launch:
    """A recorded launch."""

    kernel: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Specialization:
    """What tells a launch's compiled kernel from others: launches with equal ``key`` share one."""

    variant: str
    kernel: str
    config: dict[str, Any]
    key: str


def record(function: Callable[[], object], target: str) -> list[Launch]:
    """The launches of ``function`` as they would be for ``target``; none is started."""
    launches: list[Launch] = []
    with launch.recording(lambda *launched: launches.append(Launch(*launched)), TARGETS[target]):
        function()
    return launches


class _Target:
    """A driver that knows its target and nothing else: kernels ask Triton's active driver what they are compiled for."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target


def _specialize(launched: Launch, target: str) -> tuple[ASTSource, dict[str, Any], str]:
    """What Triton compiles for a launch, with which options, and the key that it keeps the result under.

    The steps of ``JITFunction.run``, which asks the active driver, and so a GPU, for the target.
    """
    kernel, options = launched.kernel, launched.options | {"enable_fp_fusion": True}
    backend = make_backend(TARGETS[target])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, compiler_options = bind(*launched.args, **options)
    key = compute_cache_key({}, specialization, compiler_options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, compiler_options
    )
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return source(kernel, signature, constants, attributes), parsed.__dict__, key


def compile_launch(launched: Launch, target: str) -> Any:
    """Triton's ``CompiledKernel`` of a recorded launch; tensor descriptors and tuples of arguments included."""
    source, options, _ = _specialize(launched, target)
    previous, driver._active = driver._active, _Target(TARGETS[target])  # its own reset would look for a GPU
    try:
        return triton.compile(source, target=TARGETS[target], options=options)
    finally:
        driver._active = previous


def specializations(op: str, rows: int, target: str = "sm_90", dtype: str = "bf16") -> list[Specialization]:
    """Which compiled kernels ``op`` would launch for a batch of ``rows``, in all of its variants. Compiles nothing.

    Raises:
        ValueError: unknown ``op``, ``target`` or ``dtype``.
        RuntimeError: the process runs Triton's interpreter.
    """
    _check((op,), (target,), (dtype,))
    return [
        Specialization(variant, launched.kernel.__name__, launched.options, _specialize(launched, target)[2])
        for variant, function in variants(DTYPES[dtype], rows)[op]
        for launched in record(function, target)
    ]


def _cuda_tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _numbers(listing: Listing, registers: int, spilled_bytes: int) -> dict[str, int]:
    return {
        "registers": registers,
        "spilled_bytes": spilled_bytes,
        "tensor_core_instructions": listing.tensor_core_instructions,
        "instructions": len(listing.instructions),
        "hottest_loop": listing.hottest_loop,
    }


def _read_cubin(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        sass, usage = (
            subprocess.run([_cuda_tool(tool), option, path], capture_output=True, text=True, check=True).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    return _numbers(parse_sass(sass), *parse_resource_usage(usage))


def _read_amdgcn(assembly: str) -> dict[str, int]:
    return _numbers(parse_amdgcn(assembly), *parse_amdgcn_metadata(assembly))


def measure(compiled: Any, target: str) -> dict[str, int]:
    """The numbers of a :class:`Report`, read from the machine code of a ``CompiledKernel`` for ``target``."""
    machine_code, metadata = compiled.asm, compiled.metadata
    numbers = _read_cubin(machine_code["cubin"]) if "cubin" in machine_code else _read_amdgcn(machine_code["amdgcn"])
    tensor_columns = getattr(metadata, "tmem_size", None) or 0  # only Blackwell has tensor memory
    programs = occupancy(target, numbers["registers"], metadata.shared, metadata.num_warps, tensor_columns)
    return numbers | {"shared_bytes": metadata.shared, "occupancy": programs}


def inspect_variant(work: Work) -> list[Report | Failure]:
    """Compile one variant's kernels, one after the other; a failure does not keep the next from being tried."""
    variant, function = variants(DTYPES[work.dtype])[work.op][work.index]
    results: list[Report | Failure] = []
    for launched in record(function, work.target):
        kernel = launched.kernel.__name__
        try:
            numbers = measure(compile_launch(launched, work.target), work.target)
            results.append(
                Report(work.op, variant, kernel, work.target, work.dtype, config=launched.options, **numbers)
            )
        except Exception as error:  # whatever the compiler raises is a finding about this kernel
            results.append(Failure(work.op, variant, kernel, work.target, work.dtype, _describe(error)))
    return results


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _check(ops: Sequence[str], targets: Sequence[str], dtypes: Sequence[str]) -> None:
    for name, values, allowed in (("op", ops, OPS), ("target", targets, TARGETS), ("dtype", dtypes, DTYPES)):
        for value in values:
            if value not in allowed:
                raise ValueError(f"{name}: got {value!r}; allowed are {', '.join(allowed)}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set: the interpreter compiles nothing; unset it and start a new process"
        )


def inspect(
    ops: Sequence[str] = OPS,
    targets: Sequence[str] = tuple(TARGETS),
    dtypes: Sequence[str] = ("bf16",),
    jobs: int | None = None,
) -> tuple[list[Report], list[Failure]]:
    """Compile the kernels of ``ops`` in their default configurations, all variants, over several processes.

    A script that calls this must be importable without side effects (``if __name__ == "__main__"``), as always with
    spawned processes. Triton's cache on disk makes a second run quick.

    Args:
        ops: Of ``OPS``.
        targets: Of ``TARGETS``.
        dtypes: Storage dtypes, of ``DTYPES``.
        jobs: Processes; default the number of CPUs.

    Returns:
        One report per kernel launched, and one failure per kernel that did not compile.

    Raises:
        ValueError: unknown name, or ``jobs`` below 1.
        RuntimeError: the process runs Triton's interpreter, which has no compiler.
    """
    _check(ops, targets, dtypes)
    jobs = os.cpu_count() or 1 if jobs is None else jobs
    if jobs < 1:
        raise ValueError(f"jobs: got {jobs}; allowed is a number of processes >= 1")
    table = variants(torch.bfloat16)
    work = [
        Work(op, index, target, dtype)
        for op in ops
        for target in targets
        for dtype in dtypes
        for index in range(len(table[op]))
    ]
    reports: list[Report] = []
    failures: list[Failure] = []
    for item, results in zip(work, run_in_processes(inspect_variant, work, jobs), strict=True):
        if isinstance(results, BaseException):
            results = [Failure(item.op, item.variant, None, item.target, item.dtype, _describe(results))]
        reports += [result for result in results if isinstance(result, Report)]
        failures += [result for result in results if isinstance(result, Failure)]
    return reports, failures
