"""What a launcher does, written down once for each call signature and then done again without the launcher.

What a launcher allocates and starts depends on its signature alone: on numbers and flags, and on the shapes, strides, dtypes,
devices and alignment of tensors. The first call of a signature runs the launcher under a :class:`Tape`, which notes every
operation of torch and every start of a kernel; all later ones go through the notes with their own tensors. Nothing is checked,
chosen or computed again then, memory that only kernels see is allocated at once, and on NVIDIA GPUs a kernel is started by its
compiled launcher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from triton_analog.launch.devices import device_guard, input_precision, is_standing_in
from triton_analog.launch.record import is_recording
from triton_analog.launch.space import is_forced
from triton_analog.launch.steps import Place, Slots, Step, slots_of, with_forgetting, with_one_workspace
from triton_analog.launch.tape import Tape, tape

PLANS = 4096
"""Signatures that are remembered, those used last. A plan takes some 10 KB of the host's memory and none of a device's."""

_age = 0
"""How often all plans were forgotten."""


class Plan:
    """The work of a launcher for one signature.

    A launcher takes positional arguments and returns new tensors, one or a tuple or list of them, or None. It does nothing beside
    operations of torch on tensors (none of which may wait for a device) and starts of kernels.
    """

    def __init__(self) -> None:
        self._steps: list[Step] | None = None
        self._age = _age

    def run(self, launcher: Callable[..., Any], args: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> Any:
        """``launcher(*args)``, whose tensors in their order are ``tensors``; all else is that of the first call.

        Where configurations are forced or launches are recorded, the launcher itself runs.
        """
        if is_recording() or is_standing_in() or is_forced() or tape() is not None:
            return launcher(*args)
        if self._steps is not None and self._age == _age:
            return self._do([x for x in tensors if x is not None])
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return launcher(*args)  # which may choose otherwise than it would outside of the capture
        return self._write(launcher, args)

    def _write(self, launcher: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        # The same tensor may be given twice, so each gets an object of its own; later calls may give different ones.
        args = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
        inputs = [arg for arg in args if isinstance(arg, Tensor)]
        with Tape(inputs) as notes:
            out = launcher(*args)
        self._device = inputs[0].device
        self._result = notes.placed(out)
        kept, workspace = set(slots_of(self._result)), len(notes.bases)
        self._new = [None] * (workspace + 1 - len(inputs))
        steps = with_one_workspace(notes.steps, kept, workspace)
        self._age = _age
        self._steps = with_forgetting(steps, kept, len(inputs))
        return out

    def _do(self, slots: Slots) -> Any:
        slots += self._new
        index = self._device.index
        if index is None or driver.active.get_current_device() == index:
            self._do_steps(slots, index)
        else:
            with device_guard(self._device):
                self._do_steps(slots, index)
        result = self._result
        if isinstance(result, Place):
            return result.of(slots)
        return result and type(result)([place.of(slots) for place in result])

    def _do_steps(self, slots: Slots, index: int | None) -> None:
        stream = None if _is_watched() else 0 if index is None else driver.active.get_current_stream(index)
        for step in self._steps:  # type: ignore[union-attr]
            step(slots, stream)


def _is_watched() -> bool:
    """Whether somebody wants to be told of every start of a kernel."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def layout(x: Tensor | None) -> Any:
    """All of a tensor that a launcher's work depends on."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16)


@lru_cache(maxsize=PLANS, typed=True)  # 1, 1.0 and True are equal, but Triton compiles a kernel for each
def _plan(launcher: Callable[..., Any], precision: str, *signature: Any) -> Plan:
    return Plan()


def planned(launcher: Callable[..., Any], is_tensor: Sequence[bool]) -> Callable[..., Any]:
    """``launcher`` by a :class:`Plan` for each signature.

    Args:
        launcher: As a plan takes it.
        is_tensor: Which of its arguments are tensors (or None), at least one; all others are hashable.
    """
    tensors_of, others_of = picker(is_tensor), picker([not is_one for is_one in is_tensor])

    @wraps(launcher)
    def call(*args: Any) -> Any:
        tensors = tensors_of(args)
        plan = _plan(launcher, input_precision(), *others_of(args), *map(layout, tensors))
        return plan.run(launcher, args, tensors)

    return call


def picker(wanted: Sequence[bool]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Takes those of the arguments, as fast as can be."""
    positions = [i for i, is_one in enumerate(wanted) if is_one]
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda args: tuple([args[i] for i in positions])


def forget() -> None:
    """Write all plans anew."""
    global _age
    _age += 1
    _plan.cache_clear()
