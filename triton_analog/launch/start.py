"""The one way to start a kernel."""

from __future__ import annotations

from typing import Any

import torch
from triton.compiler import CompiledKernel

from triton_analog.launch.backends import check_start, why_not_started
from triton_analog.launch.devices import device_guard, hardware
from triton_analog.launch.record import recorder
from triton_analog.launch.tape import tape, untaped


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    """Start ``kernel[grid](*args, **options)`` on ``device``. Multiply-add fusion is on by name, whatever Triton's default.

    ``args`` are the kernel's first parameters.

    Raises:
        RuntimeError: Triton runs no kernels there, or not as it was set up; the message says what to set, and when.
    """
    record = recorder()
    if record is not None:
        record(kernel, args, options)
        return
    notes = tape()
    check_start(kernel, device)
    # Triton launches on the current device, whatever device the tensors are on.
    with device_guard(device), untaped():
        try:
            compiled = kernel[grid](*args, enable_fp_fusion=True, **options)
        except Exception as error:
            why = None if hardware(device).capability > 0 else why_not_started(kernel, device)
            if why is None:
                raise
            raise RuntimeError(why) from error
    if notes is not None:
        # Only an NVIDIA GPU's kernels have been started directly so far.
        known = isinstance(compiled, CompiledKernel) and hardware(device).capability > 0
        notes.started(kernel, grid, args, options | {"enable_fp_fusion": True}, compiled if known else None)
