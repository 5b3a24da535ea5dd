"""The one way to start a kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_analog.launch.devices import device_guard, hardware
from triton_analog.launch.record import recorder

_compiled: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}
"""Kernels that were started before, with the values of their last parameters."""


def _specialization(arg: Any) -> Any:
    """What Triton compiles an argument for on NVIDIA GPUs: its type, its alignment, whether it is 1 and whether it needs 64
    bits. Never coarser than Triton's own."""
    kind = type(arg)
    if kind is int:
        return arg == 1 or (arg % 16 == 0, arg >> 31)
    if kind is TensorDescriptor:
        return arg.base.dtype, *arg.block_shape
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    return kind


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    """Start ``kernel[grid](*args, **options)`` on ``device``. Multiply-add fusion is on by name, whatever Triton's default.

    ``args`` are the kernel's first parameters. On NVIDIA GPUs a kernel that was started before is found here and started
    directly, at a third of the time that Triton's way from a Python function to its compiled kernel takes.
    """
    record = recorder()
    if record is not None:
        record(kernel, args, options)
        return
    with device_guard(device):
        if not hardware(device).capability:
            kernel[grid](*args, enable_fp_fusion=True, **options)
            return
        key = kernel.fn, device.index, *map(_specialization, args), *options.items()
        if key in _compiled:
            compiled, constants = _compiled[key]
            x_y_z = (*grid, 1, 1)[:3]
            compiled[x_y_z](*args, *constants)
        else:
            compiled = kernel[grid](*args, enable_fp_fusion=True, **options)
            if isinstance(compiled, CompiledKernel):
                _compiled[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(args) :])
