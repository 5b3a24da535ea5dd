"""What a training step costs the host: calls that are counted without a GPU, and what a second step does not do again."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from triton.runtime.jit import JITFunction

from bench import host
from bench.count import COMPREHENSIONS, allocations, function_calls
from bench.peers.ours import Ours
from bench.stand_in import stand_in
from triton_analog import calls
from triton_analog.launch import lookup
from triton_analog.launch.plan import Plan
from triton_analog.tuning.processes import run_in_processes

CPU = torch.device("cpu")
MOST = {"forward and backward": 425, "forward": 214, "evaluation": 155}
"""Calls of Python's and C's functions, of a layer with everything on: what was counted and 5 %."""
ONCE = {
    "a plan is written": (Plan, "_write"),
    "a configuration is chosen": (lookup, "_choose"),
    "arguments are checked": (calls, "_checked"),
    "Triton looks a kernel up": (JITFunction, "run"),
}
"""What is done for a signature once."""


def measured(phase: str) -> dict[str, Any]:
    """Of one layer, in a process without Triton's interpreter: calls and allocations of two steps each, what is done again in
    a further one, and what is done in a first."""
    found: dict[str, Any] = {}
    with host.PHASES[phase](), stand_in():
        with torch.enable_grad():
            step = host.step_of(host.layer("everything on"), Ours(), phase, CPU)
        for _ in range(2):
            step()
        found["calls"] = [function_calls(step) for _ in range(2)]
        found["again"] = done_in(step)
        found["allocations"] = [allocations(step) for _ in range(2)]
    with host.PHASES[phase](), stand_in():  # which forgets all plans
        lookup.forget()
        calls._known.cache_clear()
        found["first"] = done_in(step)
    return found


def done_in(step: Any) -> list[str]:
    """Which of :data:`ONCE` a step does."""
    done: dict[str, None] = {}
    patches = []
    for what, (owner, name) in ONCE.items():
        own = getattr(owner, name)

        def spy(*args: Any, what: str = what, own: Any = own, **options: Any) -> Any:
            done[what] = None
            return own(*args, **options)

        patches.append(mock.patch.object(owner, name, spy))
    for patch in patches:
        patch.start()
    try:
        step()
    finally:
        for patch in patches:
            patch.stop()
    return sorted(done)


@pytest.fixture(scope="module")
def phases() -> dict[str, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        results = run_in_processes(measured, list(MOST), jobs=1)
    return dict(zip(MOST, results, strict=True))


@pytest.mark.parametrize("phase", MOST)
def test_a_step_makes_few_calls_and_as_many_each_time(phase, phases):
    first, second = phases[phase]["calls"]
    assert first == second
    assert sum(first) <= MOST[phase], "more work for the host in every step; python -m bench run --suite host"


@pytest.mark.parametrize(("phase", "most"), [("forward and backward", 10), ("forward", 4), ("evaluation", 2)])
def test_memory_that_only_kernels_see_is_allocated_at_once(phase, most, phases):
    first, second = phases[phase]["allocations"]
    assert first == second <= most


@pytest.mark.parametrize("phase", MOST)
def test_a_second_step_does_nothing_again(phase, phases):
    assert phases[phase]["first"] == sorted(ONCE), "the spies see what they should"
    assert phases[phase]["again"] == []


def test_calls_are_counted_by_their_kind():
    def doubled(x: float) -> float:
        return abs(2 * x)

    def step() -> list[float]:
        return [doubled(x) for x in (1, 2, 3)]

    assert "<listcomp>" in COMPREHENSIONS
    assert function_calls(step) == (4, 3)


def test_the_suite_says_what_it_does_not_run_and_why():
    found = {name: race(0.0)[0] for name, race in host.races(CPU) if ":" not in name}
    assert (found[host.TIMED].status, found[host.TIMED].detail) == ("not run", "there is no GPU")
