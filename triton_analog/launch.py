"""Where an operation runs, and the one way to start a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

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


def _device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device the tensors are on."""
    return nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)


class Hardware(NamedTuple):
    """What configurations depend on."""

    name: str
    """The device's exact name, such as "NVIDIA H200"; empty where only the architecture is known."""
    target: str
    """The architecture, such as "sm_90" or "gfx942"; "cpu" in the interpreter."""
    capability: int
    """Compute capability of an NVIDIA GPU, such as 90; 0 for everything else."""


def named_hardware(name: str, target: str) -> Hardware:
    """The hardware of these names, which need not be there."""
    number = target.removeprefix("sm_")
    return Hardware(name, target, int(number) if number != target and number.isdecimal() else 0)


_recorder: Callable[..., None] | None = None
_recorded_hardware: Hardware | None = None


@contextmanager
def recording(record: Callable[..., None], target: GPUTarget, name: str = "") -> Iterator[None]:
    """Hand every launch to ``record(kernel, args, options)`` instead of starting it, configured as for ``target``.

    For compilation without a device. ``name``: of the device, for the configurations that were found for it.
    """
    global _recorder, _recorded_hardware
    previous = _recorder, _recorded_hardware
    capability = int(target.arch) if target.backend == "cuda" else 0
    target_name = f"sm_{capability}" if capability else str(target.arch)
    _recorder, _recorded_hardware = record, Hardware(name, target_name, capability)
    try:
        yield
    finally:
        _recorder, _recorded_hardware = previous


def is_recording() -> bool:
    """Whether launches are recorded instead of started."""
    return _recorder is not None


@cache
def _hardware(device: torch.device) -> Hardware:
    if device.type != "cuda":
        return Hardware(device.type, device.type, 0)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Hardware(properties.name, properties.gcnArchName.partition(":")[0], 0)
    capability = 10 * properties.major + properties.minor
    return Hardware(properties.name, f"sm_{capability}", capability)


def hardware(device: torch.device) -> Hardware:
    """What ``device`` is; under :func:`recording` what it stands for."""
    return _recorded_hardware or _hardware(device)


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
    if _recorder is not None:
        _recorder(kernel, args, options)
        return
    with _device_guard(device):
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


def describable(*matrices: Tensor) -> bool:
    """Whether tensor descriptors can address these (stacks of) matrices: rows of contiguous elements, 16-byte aligned and
    distinct."""
    return all(
        x.stride(-1) == 1
        and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
        and x.data_ptr() % 16 == 0
        for x in matrices
    )


def slices_describable(x: Tensor, slices: int) -> bool:
    """Whether every slice of the columns starts at a multiple of 16 bytes, as a load through a descriptor has to."""
    return slices == 1 or (x.shape[1] % slices == 0 and x.shape[1] // slices * x.element_size() % 16 == 0)


def has_wide_tiles(capability: int) -> bool:
    """Whether tiles of 128 x 128 and more, loaded through tensor descriptors, suit a GPU: Hopper and data-centre Blackwell."""
    return 90 <= capability < 120


def input_precision() -> str:
    """Precision of fp32 dots, following ``torch.set_float32_matmul_precision``."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def aligned(features: int, slices: int) -> bool:
    """Whether every slice starts and ends at a multiple of 16 columns."""
    return features % (16 * slices) == 0


def cdiv(size: int, part: int) -> int:
    """``ceil(size / part)``; ``triton.cdiv`` takes microseconds on the host, and a step calls it some twenty times."""
    return -(-size // part)


def block(size: int, largest: int, smallest: int = 16) -> int:
    """The power of two that covers ``size``, within ``smallest .. largest``: a block no larger than its tensor needs."""
    return max(smallest, min(largest, 1 << (max(size, 1) - 1).bit_length()))
