"""What a kernel runs on, and what of it configurations and kernels depend on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch


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


_stand_in: Hardware | None = None


@contextmanager
def standing_in(hardware: Hardware) -> Iterator[None]:
    """Every device is ``hardware`` inside the ``with`` block."""
    global _stand_in
    previous, _stand_in = _stand_in, hardware
    try:
        yield
    finally:
        _stand_in = previous


def is_standing_in() -> bool:
    """Whether devices are taken for another one."""
    return _stand_in is not None


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
    """What ``device`` is; under :func:`standing_in` what it stands for."""
    return _stand_in or _hardware(device)


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` the current one of its kind."""
    return nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; of a device that only stands for one, as many as an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def has_wide_tiles(capability: int) -> bool:
    """Whether tiles of 128 x 128 and more, loaded through tensor descriptors, suit a GPU: Hopper and data-centre Blackwell."""
    return 90 <= capability < 120


def input_precision() -> str:
    """Precision of fp32 dots, following ``torch.set_float32_matmul_precision``."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
