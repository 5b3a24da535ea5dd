"""What can be counted exactly: bytes kept for the backward, function calls and allocations of the host, and on a GPU peak
memory and launched kernels."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile


def saved_bytes(forward: Callable[[], Any], already_there: Iterable[Tensor]) -> int:
    """Bytes that ``forward`` saves for its backward: each distinct storage once, without those of ``already_there``
    (parameters, buffers, the input), which exist in any case."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # kept until everything is counted, so that no address is used twice
    there = {tensor.untyped_storage().data_ptr() for tensor in already_there}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    del result
    return sum(size for address, size in storages.items() if address not in there)


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int | None:
    """Most device memory that a step takes on top of what is there before it. Not counted on a CPU: None."""
    if device.type != "cuda":
        return None
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def kernel_launches(step: Callable[[], Any], device: torch.device) -> int | None:
    """Kernels that a step runs on the GPU, copies and fills left out. Not counted on a CPU: None."""
    if device.type != "cuda":
        return None
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    on_device = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)


COMPREHENSIONS = ("<listcomp>", "<dictcomp>", "<setcomp>")
"""Calls before Python 3.12 only."""


def function_calls(step: Callable[[], Any]) -> tuple[int, int]:
    """Calls of Python's functions and of C's that this thread makes in a step; equal in every run."""
    python = c = 0

    def note(frame: Any, event: str, what: Any) -> None:
        nonlocal python, c
        python += event == "call" and frame.f_code.co_name not in COMPREHENSIONS
        c += event == "c_call" and what is not sys.setprofile

    collects, others = gc.isenabled(), sys.getprofile()
    gc.disable()  # or it would run finalizers and callbacks now and then
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(others)
        if collects:
            gc.enable()
    return python, c


def allocations(step: Callable[[], Any]) -> int:
    """Blocks of the CPU's memory that torch takes in a step."""
    for _ in range(2):  # operators go another way under a profiler, and may have to plan it first
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    events = profiler.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)
