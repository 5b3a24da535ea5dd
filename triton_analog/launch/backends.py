"""Which code an operation runs: its Triton kernel or its reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

Backend = Literal["kernel", "reference"]

_forced: Backend | None = None


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Run every operation inside the ``with`` block through ``"kernel"`` or ``"reference"``, whatever its device.

    For tests and debugging: kernels on CPU tensors need ``TRITON_INTERPRET=1`` (set before the import) or Triton-CPU.
    Not thread safe.

    Raises:
        ValueError: another name.
    """
    global _forced
    if name not in ("kernel", "reference"):
        raise ValueError(f"backend: got {name!r}; allowed are 'kernel' and 'reference'")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


@cache
def _has_triton_cpu() -> bool:
    """Only Triton-CPU ships a CPU backend; asking for the driver elsewhere could initialise a GPU."""
    return "cpu" in triton.backends.backends


def _triton_runs_on_cpu() -> bool:
    return _has_triton_cpu() and driver.active.get_current_target().backend == "cpu"


def runs_kernel(x: Tensor) -> bool:
    """Whether an operation on ``x`` runs its Triton kernel (otherwise: the reference).

    fp64 always runs the reference, which keeps full precision. GPU tensors run kernels. CPU tensors do under the
    interpreter (``TRITON_INTERPRET=1``) or when Triton's active driver is a CPU. An empty tensor has nothing to launch.
    """
    if x.dtype == torch.float64 or x.numel() == 0:
        return False
    if _forced is not None:
        return _forced == "kernel"
    return x.device.type != "cpu" or bool(knobs.runtime.interpret) or _triton_runs_on_cpu()
