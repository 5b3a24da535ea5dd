"""What a training step of one layer costs the host: its time on a GPU, and without one its calls, starts and allocations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import triton

from bench.count import allocations, function_calls, kernel_launches
from bench.peers.base import Peer
from bench.peers.digital import Digital
from bench.peers.ours import Ours
from bench.race import Step, Turn, device_seconds, host_turn, returning_turn, take_turns
from bench.recipes import EVERYTHING, FLAGSHIP, LIGHTNING
from bench.results import Result, failed, fill_times
from bench.stand_in import stand_in
from bench.training import digital, gradient_for, input_of
from bench.workloads import Workload, linear

RECIPES = {"everything on": EVERYTHING, "Analog Foundation Models'": FLAGSHIP, "Lightning's own": LIGHTNING}
ROWS, INPUTS, OUTPUTS = 512, 1024, 1024
SMALL = 16
"""Rows and sizes of a digital layer, in fp32, whose work takes a CPU no time beside its calls."""
PHASES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "forward and backward": nullcontext,
    "forward": nullcontext,
    "evaluation": torch.no_grad,
}
"""What a step does, and the context that it runs in."""
COUNTED, TIMED = "host, nothing runs", "host, time"
"""Groups of workloads: counted with a GPU that is not there, and timed on one that is."""
PEERS = (Digital(), Ours())
IN_ONE_THREAD = ", one thread"
"""The backward in the caller's thread, not in autograd's own."""

Race = Callable[[float], list[Result]]
"""Takes the seconds of a race."""


def layer(recipe: str) -> Workload:
    return linear("", recipe, ROWS, INPUTS, OUTPUTS, RECIPES[recipe], torch.bfloat16)


def small_layer(recipe: str) -> Workload:
    return linear("", recipe, SMALL, SMALL, SMALL, RECIPES[recipe], torch.float32)


def step_of(workload: Workload, peer: Peer, phase: str, device: torch.device) -> Step:
    """One step of the layer; it runs in the phase's context."""
    model = peer.convert(digital(workload, workload.dtype, device), workload.recipe)
    model.train(phase != "evaluation")
    x = input_of(workload, workload.dtype, device)
    if phase != "forward and backward":
        return lambda: model(x)
    grad = gradient_for(model(x).detach())
    with_gradients = [x, *model.parameters()]

    def step() -> None:
        for tensor in with_gradients:
            tensor.grad = None
        model(x).backward(grad)

    return step


def under(context: Callable[[], AbstractContextManager[None]], turn: Turn) -> Turn:
    def turn_in_context() -> float:
        with context():
            return turn()

    return turn_in_context


def races(device: torch.device) -> Iterator[tuple[str, Race]]:
    """Names, as ``--only`` takes them, and races: without a GPU first."""
    for group, race, runs in (
        (COUNTED, count, not triton.knobs.runtime.interpret),
        (TIMED, partial(time_on, device), device.type == "cuda"),
    ):
        if not runs:
            yield group, partial(not_run, group, "TRITON_INTERPRET is set" if group == COUNTED else "there is no GPU")
            continue
        for recipe in RECIPES:
            for phase in PHASES:
                entry = partial(Result, "host", group, f"{recipe}, {phase}", 0, dtype="bfloat16")
                yield f"{group}: {recipe}, {phase}", partial(race, entry, recipe, phase)


def not_run(group: str, reason: str, seconds: float) -> list[Result]:
    return [Result("host", group, group, 0, "all", "not run", reason)]


# ---- On a GPU --------------------------------------------------------------------------------------------------------


def time_on(
    device: torch.device, entry: Callable[..., Result], recipe: str, phase: str, seconds: float
) -> list[Result]:
    """Time until a step's calls return."""
    found: dict[str, Result] = {}
    turns: dict[str, Turn] = {}
    contexts = {"": PHASES[phase]}
    if phase == "forward and backward":
        contexts[IN_ONE_THREAD] = partial(torch.autograd.set_multithreading_enabled, False)
    for peer in PEERS:
        for suffix, context in contexts.items():
            name = peer.name + suffix
            result = found[name] = entry(name)
            try:
                step = step_of(layer(recipe), peer, phase, device)
                with context():
                    turns[name] = under(context, returning_turn(step))
                    result.launches, result.device_seconds = kernel_launches(step, device), device_seconds(step)
            except Exception as error:  # a contender's failure is a result
                failed(result, error)
    fill_times(found, take_turns(turns, seconds))
    for result in found.values():
        if result.device_seconds is not None and result.device_seconds >= result.seconds[1]:
            result.detail = f"the GPU takes {1e3 * result.device_seconds:.3f} ms, more than the host"
    return list(found.values())


# ---- Without a GPU ---------------------------------------------------------------------------------------------------


def count(entry: Callable[..., Result], recipe: str, phase: str, seconds: float) -> list[Result]:
    """Calls, starts of kernels and allocations of a step whose kernels do not run, and the CPU time that it takes.

    The digital layer is a small one, as a CPU does its work in the caller's time. What it starts and allocates on a GPU is not
    known here.
    """
    cpu = torch.device("cpu")
    found, turns, starts = {}, {}, 0

    def note(*_: object) -> None:
        nonlocal starts
        starts += 1

    with PHASES[phase](), stand_in(note):
        for peer in PEERS:
            workload = small_layer(recipe) if peer.ideal else layer(recipe)
            with torch.enable_grad():
                step = step_of(workload, peer, phase, cpu)
            result = found[peer.name] = entry(peer.name, dtype=str(workload.dtype).removeprefix("torch."))
            turns[peer.name] = host_turn(step, time.thread_time)
            result.python_calls, result.c_calls = function_calls(step)
            if not peer.ideal:
                starts = 0
                step()
                result.launches, result.allocations = starts, allocations(step)
        fill_times(found, take_turns(turns, seconds))
    return list(found.values())
