"""Which code an operation runs: its Triton kernel or its reference."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from triton_analog.hints import did_you_mean

Backend = Literal["kernel", "reference"]

_forced: Backend | None = None


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Run every operation inside the ``with`` block through ``"kernel"`` or ``"reference"``, whatever its device.

    For tests and debugging: kernels on CPU tensors need ``TRITON_INTERPRET=1`` (set before the import) or Triton-CPU, and an
    operation raises a RuntimeError without. Not thread safe.

    Raises:
        ValueError: another name.
    """
    global _forced
    if name not in ("kernel", "reference"):
        near = did_you_mean(str(name), ("kernel", "reference"), "", lead="; ")
        raise ValueError(f"backend: got {name!r}; allowed are 'kernel' and 'reference'{near}")
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


# ---- Why a kernel does not start --------------------------------------------------------------------------------------

_INTERPRET = (
    "set TRITON_INTERPRET=1 in the shell, or as os.environ['TRITON_INTERPRET'] = '1' before triton and triton_analog are first "
    "imported, and start Python anew"
)


def check_start(kernel: Any, device: torch.device) -> None:
    """Nothing keeps ``kernel`` from tensors on ``device`` that Triton would not notice.

    Warns:
        UserWarning: once, where it is not run in the way that the environment asks for.

    Raises:
        RuntimeError: it would read the memory of one device on the other.
    """
    if device.type == "cpu":
        return
    if isinstance(kernel, InterpretedFunction):
        _warn_once(
            f"tensors are on {device}, but TRITON_INTERPRET=1 was set when triton_analog was imported: its kernels run in "
            "Triton's interpreter, on the CPU, very slowly. Start Python anew without it to run them on the GPU."
        )
    elif _triton_runs_on_cpu():
        raise RuntimeError(
            f"tensors are on {device}, but Triton's active driver compiles kernels for the CPU; move the tensors to the CPU, or "
            "unset TRITON_CPU_BACKEND and start Python anew"
        )
    elif knobs.runtime.interpret:
        _warn_once(
            f"TRITON_INTERPRET=1 was set after triton_analog was imported and does nothing: kernels for tensors on {device} are "
            f"compiled. To interpret them, {_INTERPRET}."
        )


@cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=5)


def why_not_started(kernel: Any, device: torch.device) -> str | None:
    """What the user can do about a ``kernel`` that did not start for tensors on ``device``; None if nothing is known."""
    interpreted = isinstance(kernel, InterpretedFunction)
    if interpreted and not isinstance(tl.cdiv, InterpretedFunction):
        return f"TRITON_INTERPRET=1 was set after triton was imported, which is too late: {_INTERPRET}"
    if interpreted or (device.type == "cpu" and _triton_runs_on_cpu()):
        return None
    if device.type != "cpu":
        return (
            None
            if _has_driver()
            else (
                f"Triton has no driver for tensors on {device}; move them to an NVIDIA or AMD GPU that torch sees, or run the "
                'reference: with triton_analog.launch.backend("reference")'
            )
        )
    if knobs.runtime.interpret:
        return f"TRITON_INTERPRET=1 was set after triton_analog was imported, which is too late: {_INTERPRET}"
    return (
        'a kernel was asked for (triton_analog.launch.backend("kernel")), but the tensors are on the CPU, for which Triton '
        f"compiles nothing; move them to a GPU, or, to run kernels in Triton's interpreter, {_INTERPRET}"
    )


def _has_driver() -> bool:
    try:
        driver.active.get_current_target()
    except RuntimeError:
        return False
    return True
