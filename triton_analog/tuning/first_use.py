"""What the lookup of configurations is given for tuning on first use, before anything of the tuning is imported."""

from __future__ import annotations

from typing import Any

import torch

import triton_analog.launch as launch
from triton_analog.launch.lookup import FirstUse
from triton_analog.launch.space import Problem, Space


def can_tune() -> bool:
    """Not while launches are recorded, nor while a CUDA graph is captured, which nothing may be timed in."""
    if launch.is_recording():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def settle(space: Space[Any], problem: Problem, device: torch.device, found: Any, measured: bool) -> Any:
    """:func:`triton_analog.tuning.autotune.settle`, imported when it is first needed."""
    from triton_analog.tuning import autotune

    return autotune.settle(space, problem, device, found, measured)


FIRST_USE = FirstUse(can_tune, settle)
