"""Launches that are recorded instead of started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from triton.backends.compiler import GPUTarget

from triton_analog.launch.devices import Hardware, standing_in

_recorder: Callable[..., None] | None = None


@contextmanager
def recording(record: Callable[..., None], target: GPUTarget, name: str = "") -> Iterator[None]:
    """Hand every launch to ``record(kernel, args, options)`` instead of starting it, configured as for ``target``.

    For compilation without a device. ``name``: of the device, for the configurations that were found for it.
    """
    global _recorder
    previous, _recorder = _recorder, record
    capability = int(target.arch) if target.backend == "cuda" else 0
    target_name = f"sm_{capability}" if capability else str(target.arch)
    try:
        with standing_in(Hardware(name, target_name, capability)):
            yield
    finally:
        _recorder = previous


def recorder() -> Callable[..., None] | None:
    """What launches are handed to instead of being started, if they are."""
    return _recorder


def is_recording() -> bool:
    """Whether launches are recorded instead of started."""
    return _recorder is not None
