"""The kernel of an operation in a given configuration, compiled in a process of its own and without a GPU.

What is compiled lands in Triton's cache on disk, where a launch in any process finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import triton_analog.launch as launch
from triton_analog.launch import Hardware
from triton_analog.launch.space import Config, Problem, Space, forced
from triton_analog.tuning.cases import Call, call_of
from triton_analog.tuning.inspect import TARGETS, Launch, compile_launch, measure
from triton_analog.tuning.model import Compiled
from triton_analog.tuning.processes import Processes
from triton_analog.tuning.spaces import spaces


@dataclass(frozen=True)
class Kernel:
    """Something to compile, as it can be sent to another process."""

    op: str
    problem: Problem
    config: Any


def recorded_call(space: Space[Any], problem: Problem) -> Call:
    """A call to record launches of: its operands hold nothing."""
    return call_of(space, problem, torch.device("cpu"), filled=False)


def launch_of(space: Space[Any], hardware: Hardware, config: Any, call: Call) -> Launch:
    """The launch that ``config`` configures, of those that ``call`` makes; none is started."""
    launches: list[Launch] = []
    with (
        launch.backend("kernel"),
        forced(space, config),
        launch.recording(lambda *launched: launches.append(Launch(*launched)), TARGETS[hardware.target], hardware.name),
    ):
        call()
    kernels = ("moments_kernel",) if space.op == "std" else (f"{space.op}_kernel", f"{space.op}_pipeline_kernel")
    return next(launched for launched in launches if launched.kernel.__name__ in kernels)


def compile_kernel(kernel: Kernel) -> Compiled:
    """The compiler's numbers. For a process of its own."""
    space, hardware = spaces()[kernel.op], kernel.problem.hardware
    launched = launch_of(space, hardware, kernel.config, recorded_call(space, kernel.problem))
    return Compiled(**measure(compile_launch(launched, hardware.target), hardware.target))


def worth_timing(
    space: Space[Config], problem: Problem, candidates: Sequence[Config], processes: Processes
) -> list[Config]:
    """The candidates that compile, fit the GPU and spill no more than the formula's configuration, which stays."""
    formula = space.formula(problem)
    kernels = [Kernel(space.op, problem, config) for config in (formula, *candidates)]
    first, *others = processes.map(compile_kernel, kernels)
    bound = first.spilled_bytes if isinstance(first, Compiled) else 0
    return [
        config
        for config, numbers in zip(candidates, others, strict=True)
        if config == formula
        or (isinstance(numbers, Compiled) and numbers.occupancy > 0 and numbers.spilled_bytes <= bound)
    ]
