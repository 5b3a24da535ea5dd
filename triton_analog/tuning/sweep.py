"""Sweeps: every problem of some layers tuned on every GPU there is, results kept as they come.

A sweep that was stopped, however, goes on where it was when the same command is given again: problems that have a measured
entry for this device and these kernels are left out.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from triton_analog.launch import Hardware, hardware, store
from triton_analog.launch.fingerprint import is_stale
from triton_analog.launch.space import Problem
from triton_analog.launch.store import Entry, Key, Table
from triton_analog.tuning.measure import NothingRuns, tune
from triton_analog.tuning.processes import Processes, leave_interrupts_to_the_parent
from triton_analog.tuning.spaces import spaces


@dataclass(frozen=True)
class Job:
    """A problem to tune, as it can be sent to another process."""

    op: str
    key: Key


@dataclass(frozen=True)
class Done:
    """A job's result, or why there is none."""

    job: Job
    hardware: Hardware
    entry: Entry | None
    error: str = ""

    @property
    def table(self) -> Table:
        """For :func:`store.add`."""
        entries = () if self.entry is None else (self.entry,)
        return Table(self.job.op, self.hardware.name, self.hardware.target, entries)


def job_of(op: str, problem: Problem) -> Job:
    return Job(op, spaces()[op].key(problem))


def measured_before(job: Job, device: Hardware, directory: Path) -> Entry | None:
    """The measured entry of this device for these kernels, if ``directory`` holds one."""
    table = store.read(store.table_path(directory, device.name, job.op))
    found = [entry for entry in table.entries if entry.key == job.key] if table and table.device == device.name else []
    fresh = (entry for entry in found if entry.origin == "measured" and not is_stale(spaces()[job.op], entry))
    return next(fresh, None)


def devices() -> list[torch.device]:
    """Where a sweep runs: every visible GPU like the first, of a process started by torchrun its own; else the CPU."""
    if not torch.cuda.is_available():
        return [torch.device("cpu")]
    if "LOCAL_RANK" in os.environ:
        return [torch.device("cuda", int(os.environ["LOCAL_RANK"]))]
    every = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [device for device in every if hardware(device) == hardware(every[0])]


def share(jobs: Sequence[Job]) -> list[Job]:
    """A rank's part when torchrun started several. ``jobs`` has to be the same list on all of them: before what is done is
    left out, as others' results come in at any time."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return list(jobs[rank::world])


def _run(job: Job, device: torch.device, exhaustive: bool, processes: Processes) -> Done:
    space, here = spaces()[job.op], hardware(device)
    problem = space.problem(here, job.key)
    candidates = space.candidates(problem) if exhaustive else None
    try:
        return Done(job, here, tune(space, problem, device, candidates, processes))
    except (NothingRuns, torch.OutOfMemoryError) as error:
        return Done(job, here, None, str(error))


_own_device: torch.device | None = None
_own_processes: Processes | None = None


def _take_device(free: Any, compilers: int) -> None:
    global _own_device, _own_processes
    leave_interrupts_to_the_parent()
    _own_device, _own_processes = free.get(), Processes(compilers)


def _run_on_own_device(job: Job, exhaustive: bool) -> Done:
    assert _own_device is not None
    assert _own_processes is not None
    return _run(job, _own_device, exhaustive, _own_processes)


def _results(jobs: Sequence[Job], on: Sequence[torch.device], exhaustive: bool) -> Iterator[Done]:
    compilers = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", len(on))))
    if len(on) == 1:
        with Processes(compilers) as processes:
            for job in jobs:
                yield _run(job, on[0], exhaustive, processes)
        return
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    free = context.Queue()
    for device in on:
        free.put(device)
    with ProcessPoolExecutor(len(on), mp_context=context, initializer=_take_device, initargs=(free, compilers)) as pool:
        futures = [pool.submit(_run_on_own_device, job, exhaustive) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def sweep(
    jobs: Sequence[Job],
    directory: Path,
    on: Sequence[torch.device],
    progress: Callable[[Done], None] = lambda done: None,
    exhaustive: bool = False,
) -> list[Done]:
    """Tune ``jobs`` on the devices ``on`` (of one kind), one process each, and add every result to ``directory`` at once.

    ``exhaustive``: Try every candidate instead of searching (:func:`triton_analog.tuning.measure.tune`).

    Raises:
        OSError: A result could not be written; those before it were.
    """
    results = []
    for done in _results(jobs, on, exhaustive):
        if done.entry is not None:
            store.add(directory, done.table)
        results.append(done)
        progress(done)
    return results


PATIENCE = timedelta(days=7)
"""With ranks that have more to do than others. If one fails, torchrun ends them all."""


def share_results(results: list[Done], directory: Path) -> list[Done]:
    """All ranks' results, on every machine of a sweep that torchrun started on several, which may not share a disk."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return results
    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        gathered: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, results)
    finally:
        distributed.destroy_process_group()
    everything = [done for part in gathered for done in part]
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        for done in everything:
            if done.entry is not None:
                store.add(directory, done.table)
    return everything
