"""``python -m bench run``: every contender on every workload, in one process and one after the other in turns."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import host, host_model
from bench.machine import ceilings, environment
from bench.memory import FORMULAS
from bench.operations import Operation, operations
from bench.other_revision import OtherRevision
from bench.peers import PEERS
from bench.peers.base import Peer
from bench.race import Turn, event_turn, host_turn, kernel_turn, take_turns
from bench.results import RESULTS, Result, failed, fill_times
from bench.training import prepare, truth_of
from bench.workloads import Workload, workloads


@dataclass(frozen=True)
class Plan:
    """What to run, and for how long."""

    device: torch.device
    suites: Sequence[str]
    quick: bool = False
    only: str = ""
    """Part of the names of workloads."""
    seconds: float = 6.0
    """Per race, beyond the least number of rounds."""
    minutes: float = 30.0
    """What has not begun by then is not run."""
    base: str | None = None


def run(plan: Plan, folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Everything that ``plan`` names; ``folder`` gets the results after each workload, so that nothing is lost."""
    other = OtherRevision(plan.base, plan.device, plan.quick)
    if not any(plan.only in name for name, _ in races(plan, other)):
        raise ValueError(f"--only: no workload of {', '.join(plan.suites)} has {plan.only!r} in its name")
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * plan.minutes
    on_gpu = plan.device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    record: dict[str, Any] = {
        "environment": environment(plan.device),
        "ceilings": ceilings(plan.device, dtype),
        "base": plan.base,
        "absent": {peer.name: why for peer in PEERS if (why := peer.absent(plan.device))},
        "results": [],
    }
    with other as base:
        for name, race in races(plan, base):
            if plan.only not in name:
                continue
            late = time.monotonic() > deadline
            found = [Result("", "", name, 0, "all", "not run", "out of time")] if late else race()
            for result in found:
                report(line(result))
            record["results"] += [asdict(result) for result in found]
            (folder / RESULTS).write_text(as_json(rounded(record)), "utf-8")
            gc.collect()
    for name, value in ceilings(plan.device, dtype).items():  # others may have been at work in the beginning
        record["ceilings"][name] = max(value, record["ceilings"][name])
    (folder / RESULTS).write_text(as_json(rounded(record)), "utf-8")
    return rounded(record)


def races(plan: Plan, base: OtherRevision) -> Iterator[tuple[str, Callable[[], list[Result]]]]:
    """Layers come first: they are what is compared with the peers."""
    for workload in workloads(plan.device, plan.quick):
        if workload.suite in plan.suites:
            yield f"{workload.group}: {workload.name}", partial(race_workload, workload, PEERS, plan, base)
    if "ops" in plan.suites:
        sizes = (256, 1024) if plan.device.type == "cpu" else (4096,) if plan.quick else (1024, 4096)
        for name, operation in operations().items():
            for size in sizes:
                yield f"{name} {size}", partial(race_operation, operation, size, plan, base)
    if "host" in plan.suites:
        for name, race in (*host.races(plan.device), *host_model.races(plan.device)):
            yield name, partial(race, plan.seconds)


def race_workload(workload: Workload, peers: Sequence[Peer], plan: Plan, base: OtherRevision) -> list[Result]:
    """The gate, what is counted, then the race of those that passed."""
    entry = partial(Result, workload.suite, workload.group, workload.name, workload.size)
    truth = truth_of(workload, plan.device)
    found: dict[str, Result] = {}
    turns: dict[str, Turn] = {}
    turn_of = event_turn if plan.device.type == "cuda" else host_turn
    for peer in peers:
        result = found[peer.name] = entry(peer.name)
        absent = peer.absent(plan.device)
        if absent:
            result.status, result.detail = "absent", absent
        elif peer.name == "plain torch, compiled" and not workload.compiled:
            result.status, result.detail = "not run", "compiled at one size only, as each takes long to compile"
        else:
            try:
                ready = prepare(workload, peer, truth, plan.device)
                counts = ready.counts()
                turns[peer.name] = turn_of(ready.step)
            except Exception as error:  # a contender's failure is a result
                failed(result, error)
            else:
                result.defects, result.dtype = ready.defects, str(ready.dtype).removeprefix("torch.")
                result.saved_bytes, result.peak_bytes = counts["saved_bytes"], counts["peak_bytes"]
                result.launches = counts["launches"]
                if workload.inputs and not workload.steps and peer.name in FORMULAS:
                    shape = workload.rows, workload.inputs, workload.outputs
                    result.predicted_peak_bytes = FORMULAS[peer.name](
                        *shape, workload.recipe, ready.dtype.itemsize
                    ).peak
    if base.name is not None:
        result = found[base.name] = entry(base.name)
        enter_base(result, base, turns, {"workload": workload.name})
    fill_times(found, take_turns(turns, plan.seconds))
    for result in found.values():
        if result.seconds and workload.flops:
            result.gflop_s = workload.flops / result.seconds[1] / 1e9
            if workload.inputs:
                result.intensity = workload.flops / workload.least_bytes
                result.gb_s = workload.least_bytes / result.seconds[1] / 1e9
    return list(found.values())


def enter_base(result: Result, base: OtherRevision, turns: dict[str, Turn], what: dict[str, Any]) -> None:
    answer = base.prepare(what)
    if "error" in answer:
        result.status, result.detail = "FAILED", answer["error"]
        return
    result.defects, result.dtype = answer["defects"], answer["dtype"]
    result.saved_bytes, result.peak_bytes = answer["saved_bytes"], answer["peak_bytes"]
    result.launches = answer["launches"]
    turns[result.contender] = base.turn


def race_operation(operation: Operation, size: int, plan: Plan, base: OtherRevision) -> list[Result]:
    """The operation against plain torch, once it agrees with its reference."""
    ours, theirs = "triton_analog", "plain torch"
    found = {name: Result("ops", operation.name, f"{operation.name} {size}", size, name) for name in (ours, theirs)}
    turns: dict[str, Turn] = {}
    turn_of = kernel_turn if plan.device.type == "cuda" else host_turn
    least = 0
    try:
        operation.set_up(size, plan.device).check()
        least = operation.least_bytes()
        turns = {ours: turn_of(operation.functions["op"]), theirs: turn_of(operation.functions["torch"])}
    except Exception as error:
        failed(found[ours], error)
        found[theirs].status, found[theirs].detail = "not run", "the operation failed"
    if base.name is not None and turns:
        result = found[base.name] = Result("ops", operation.name, f"{operation.name} {size}", size, base.name)
        enter_base(result, base, turns, {"operation": operation.name, "size": size})
    fill_times(found, take_turns(turns, plan.seconds / 20))
    for name, result in found.items():
        if result.seconds and operation.inputs and name != theirs:
            result.gb_s = least / result.seconds[1] / 1e9
            if operation.flops:
                result.gflop_s = operation.flops / result.seconds[1] / 1e9
                result.intensity = operation.flops / least
    return list(found.values())


def rounded(value: Any) -> Any:
    """Four significant digits are more than a machine repeats."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def as_json(record: dict[str, Any]) -> str:
    """One result a line, which keeps files and their differences short."""
    head = json.dumps({**record, "results": []}, indent=1).rpartition("[]")
    results = ",\n".join(f"  {json.dumps(result)}" for result in record["results"])
    return f"{head[0]}[\n{results}\n ]{head[2]}\n"


def line(result: Result) -> str:
    """For the terminal."""
    text = f"{result.suite:7}{result.workload:34.34} {result.contender:28}"
    if result.python_calls is not None:
        text += f"{result.python_calls + (result.c_calls or 0):6} calls"
    if not result.seconds:
        return f"{text}{result.status}: {result.detail[:150]}"
    first, middle, third = (1e3 * value for value in result.seconds)
    text += f"{middle:10.3f} ms ({first:.3f} to {third:.3f})"
    if result.saved_bytes is not None:
        text += f", saves {result.saved_bytes / 2**20:.2f} MiB"
    if result.first_seconds is not None:
        text += f", the first step {result.first_seconds:.1f} s"
    if result.detail:
        text += f"; {result.detail}"
    return text + (f"; known defects: {'; '.join(result.defects)}" if result.defects else "")
