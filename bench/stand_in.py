"""A GPU that is not there: its kernels are chosen, written into plans and started as on a Hopper GPU, but nothing runs.

What a step costs the host can so be counted on any machine. Results are garbage, as no kernel writes any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from triton_analog import launch
from triton_analog.launch import devices, plan

NOWHERE = -1
"""The number of the device: Triton keeps what it compiled by it."""
HARDWARE, TARGET = launch.Hardware("NVIDIA H100 80GB HBM3", "sm_90", 90), GPUTarget("cuda", 90, 32)

Note = Callable[[CompiledKernel, tuple[int, ...], tuple[Any, ...]], None]


class Compiled(CompiledKernel):
    """In place of a binary, the hash of all that Triton compiles it from; each start is handed to ``note``."""

    def __init__(self, source: Any, options: dict[str, Any], note: Note) -> None:
        self.src, self.name = source, source.name
        self.hash = source.hash(), tuple(sorted(options.items()))
        self.module, self.function, self.packed_metadata, self._module_pid = object(), None, None, None
        self._run = lambda *args: note(self, args[:3], args[9:])


@contextmanager
def pretended_gpu(note: Note) -> Iterator[None]:
    """Compiled kernels that are given tensors on the CPU start on a GPU which is not there: ``note(kernel, grid, args)``.

    Not thread safe.
    """
    kernels: set[Any] = set()

    def compiled(source: Any, target: Any, options: dict[str, Any]) -> Compiled:
        kernels.add(source.fn)
        return Compiled(source, options, note)

    def hardware(device: Any) -> launch.Hardware:
        return HARDWARE

    pretended = SimpleNamespace(
        get_current_device=lambda: NOWHERE, get_current_stream=lambda device: 0, get_current_target=lambda: TARGET
    )
    plan.forget()
    try:
        with (
            mock.patch.object(triton.compiler, "compile", compiled),
            mock.patch.object(devices, "_hardware", hardware),
            mock.patch.object(driver, "_active", pretended),
        ):
            yield
    finally:
        plan.forget()
        for kernel in kernels:  # each has kept the compiler that it met, and what came of it
            kernel.compile = triton.compiler.compile
            del kernel.device_caches[NOWHERE]


@contextmanager
def stand_in(note: Note = lambda kernel, grid, args: None) -> Iterator[None]:
    """The library's operations on CPU tensors run on a :func:`pretended_gpu`.

    Triton's interpreter must be off (``TRITON_INTERPRET``).
    """
    assert not triton.knobs.runtime.interpret, "unset TRITON_INTERPRET: interpreted kernels are not compiled"
    with pretended_gpu(note), launch.backend("kernel"):
        yield
