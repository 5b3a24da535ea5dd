"""A sweep that needs no GPU: candidates are compiled, and a cost model ranks them by the compiler's numbers.

What comes out is a guess, marked "model", and nothing here was timed. So a configuration replaces the formula's only where the
model gives it a clear gain (``WORTH_IT``), and only what the model can tell apart is tried: tiles and warps within a factor of
two of the formula's. Stages, the order of tiles, the inner block, loads and the number of programs stay the formula's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from math import prod
from typing import Any

import torch
import triton

from triton_analog.launch import has_wide_tiles, named_hardware
from triton_analog.launch.fingerprint import code_hash, space_hash
from triton_analog.launch.space import Problem, Space, as_values
from triton_analog.launch.store import Entry, Key
from triton_analog.tuning.compiling import Kernel, compile_kernel, launch_of, recorded_call
from triton_analog.tuning.model import GPUS, Compiled, gpus_of, microseconds, work_of
from triton_analog.tuning.processes import Processes
from triton_analog.tuning.shapes import ROWS, SLICE, Layer, problems

__all__ = ["GPUS", "gpus_of", "static_sweep"]

WORTH_IT = 1.15
"""Times the formula's configuration of a product has to be slower by the model to be replaced: its errors are that large."""
PASS_WORTH_IT = 1.5
"""The same of an element-wise operation, where the model was found to be off by up to a factor of two."""

HELD = frozenset({"GROUP_M", "GROUP_N", "PREPARED", "DESCRIPTORS", "PIPELINED", "programs", "num_stages"})
"""Fields that stay the formula's, as the model cannot see what they do."""
PRODUCTS = {
    "matmul": ("BLOCK_M", "BLOCK_K"),
    "matmul_dgrad": ("BLOCK_M", "BLOCK_N"),
    "matmul_wgrad": ("BLOCK_N", "BLOCK_M"),
}
"""A tile's rows, and the block that the product sums over, which is held too."""
FEWEST_ROWS = 64
"""Of a product's tile on GPUs with wide tiles: with fewer the compiler turns to older instructions, which are slower by an
amount the model does not know."""

CHUNK = 64
"""Kernels that are compiled before the next problem is looked at."""


# ---- What to compile ----------------------------------------------------------------------------------------------------


def _is_near(space: Space[Any], problem: Problem, formula: Any, config: Any) -> bool:
    """Whether the model can compare the two."""
    rows, inner = PRODUCTS.get(space.op, ("", ""))
    center, values = as_values(formula), as_values(config)
    if rows and has_wide_tiles(problem.hardware.capability) and values[rows] < min(FEWEST_ROWS, center[rows]):
        return False
    held = HELD | {inner}
    free = center.keys() - held - {"PARTS"}
    return all(values[name] == center[name] for name in held & center.keys()) and all(
        1 / 2 <= values[name] / center[name] <= 2 for name in free
    )


def _numbers_per_part(config: Any) -> float:
    """A thread's share of what is finished at once, up to a constant."""
    blocks = [value for name, value in as_values(config).items() if name.startswith("BLOCK")]
    return prod(blocks) / config.num_warps / config.PARTS


def candidates(space: Space[Any], problem: Problem) -> list[Any]:
    """What the model is to choose from, the formula's configuration first.

    ``PARTS`` follows from the tile: parts as large as the formula's.
    """
    formula = space.formula(problem)
    if getattr(formula, "PIPELINED", False):  # the model knows nothing of what runs at the same time in it
        return [formula]
    near = [config for config in space.candidates(problem) if _is_near(space, problem, formula, config)]
    if not hasattr(formula, "PARTS"):
        return near
    tiles: dict[Any, list[Any]] = {}
    for config in near:
        tiles.setdefault(replace(config, PARTS=1), []).append(config)
    wanted = _numbers_per_part(formula)
    return [min(same, key=lambda c: (c != formula, abs(_numbers_per_part(c) - wanted))) for same in tiles.values()]


@dataclass(frozen=True)
class Named(Kernel):
    """A kernel whose code depends on the sizes through ``options``, else only through what Triton asks of integer arguments
    (whether they are 1, or multiples of 16): any problem's kernel serves all that have its name."""

    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> tuple[Any, ...]:
        """What tells its code from others'."""
        return self.op, self.problem.hardware.target, self.problem.dtype, self.problem.flags, self.options


def _plan(space: Space[Any], problem: Problem) -> list[Named]:
    """A kernel for each candidate."""
    call, hardware = recorded_call(space, problem), problem.hardware
    return [
        Named(space.op, problem, config, tuple(sorted(launch_of(space, hardware, config, call).options.items())))
        for config in candidates(space, problem)
    ]


_compiled: dict[tuple[Any, ...], Compiled | BaseException] = {}
"""By a kernel's name: GPUs of one architecture share them."""


def _numbers(kernel: Named) -> Compiled | None:
    """Of a kernel that was compiled; None if it could not be or does not fit the GPU."""
    compiled = _compiled[kernel.name]
    return compiled if isinstance(compiled, Compiled) and compiled.occupancy > 0 else None


# ---- The choice ---------------------------------------------------------------------------------------------------------


def worth_it(op: str) -> float:
    return WORTH_IT if op in PRODUCTS else PASS_WORTH_IT


def _source(space: Space[Any], gpu: str) -> dict[str, str | int]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "multiprocessors": GPUS[gpu].multiprocessors,
        "target": GPUS[gpu].target,
        "code": code_hash(space),
        "space": space_hash(space),
    }


def _entry(space: Space[Any], problem: Problem, kernels: Sequence[Named]) -> Entry | None:
    """The best of the kernels that spill no more than the formula's, which is the first; None if that one does not run."""
    gpu = GPUS[problem.hardware.name]
    formula = _numbers(kernels[0])
    if formula is None:
        return None
    times = {}
    for kernel in kernels:
        numbers, config = _numbers(kernel), kernel.config
        if numbers is not None and numbers.spilled_bytes <= formula.spilled_bytes:
            work = work_of(space.op, problem, config)
            times[config] = microseconds(gpu, work, numbers, config.num_warps, getattr(config, "num_stages", 1))
    chosen, first = min(times, key=lambda config: times[config]), kernels[0].config
    if times[chosen] * worth_it(space.op) > times[first]:
        chosen = first
    return Entry(
        space.key(problem), as_values(chosen), "model", times[chosen], times[first], 0.0,
        _source(space, problem.hardware.name),
    )  # fmt: skip


def static_sweep(
    gpu: str,
    spaces: Sequence[Space[Any]],
    layers: Sequence[Layer],
    rows: Sequence[int] = ROWS,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    max_input_size: int = SLICE,
    on: Sequence[str] | None = None,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
    skip: Callable[[Space[Any], Key, str], bool] | None = None,
) -> Iterator[tuple[Space[Any], Entry]]:
    """An entry for every problem of the layers, operation after operation, as soon as its kernels are compiled.

    A script that calls this must be importable without side effects (``if __name__ == "__main__"``), as always with spawned
    processes. GPUs of one architecture cost the compilation once in a process; Triton's cache on disk shortens the next one.

    Args:
        gpu: Of ``GPUS``.
        spaces: The operations.
        layers, rows, max_input_size, on: What :func:`triton_analog.tuning.shapes.problems` makes problems of.
        dtypes: bfloat16 and float16.
        jobs: Processes that compile.
        progress: Called with the kernels that were compiled and all that are to be.
        skip: Whether to leave a problem out, given its space, its key and ``gpu``.

    Raises:
        ValueError: unknown ``gpu``, other dtypes, or ``jobs`` below 1.
        RuntimeError: the process runs Triton's interpreter.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu: got {gpu!r}; the model knows {', '.join(GPUS)}")
    if jobs < 1:
        raise ValueError(f"jobs: got {jobs}; allowed is a number of processes >= 1")
    if any(dtype.itemsize != 2 for dtype in dtypes):
        raise ValueError(f"dtypes: got {', '.join(map(str, dtypes))}; the model knows products of bfloat16 and float16")
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set: the interpreter compiles nothing; unset it and start a new process"
        )
    target = GPUS[gpu].target
    hardware = named_hardware(gpu, target)
    plans = [
        (space, problem, _plan(space, problem))
        for space in spaces
        for problem in problems(space, hardware, layers, rows, dtypes, max_input_size, on)
        if skip is None or not skip(space, space.key(problem), gpu)
    ]
    needed = {kernel.name: kernel for *_, kernels in plans for kernel in kernels}
    missing = [kernel for name, kernel in needed.items() if name not in _compiled]
    done = 0
    if progress is not None and missing:
        progress(done, len(missing))
    with Processes(jobs) as processes:
        for space, problem, kernels in plans:
            while any(kernel.name not in _compiled for kernel in kernels):
                chunk = missing[done : done + CHUNK]
                _compiled.update(zip((k.name for k in chunk), processes.map(compile_kernel, chunk), strict=True))
                done += len(chunk)
                if progress is not None:
                    progress(done, len(missing))
            entry = _entry(space, problem, kernels)
            if entry is not None:
                yield space, entry
