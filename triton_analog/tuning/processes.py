"""Work spread over processes, where one that dies takes only its own item along."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

from typing_extensions import Self

Item = TypeVar("Item")
Result = TypeVar("Result")


def leave_interrupts_to_the_parent() -> None:
    """Ctrl-C reaches every process of a terminal; the parent ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Processes:
    """Up to ``jobs`` processes, started when first needed and kept until the end of the ``with`` block.

    They are spawned, not forked: the parent may hold threads, whose locks forked children would inherit, and a GPU.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _attempt(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result | BaseException]:
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._jobs, spawn, initializer=leave_interrupts_to_the_parent)
        futures = [self._pool.submit(function, item) for item in items]
        results = [future.exception() or future.result() for future in futures]
        if any(isinstance(result, BrokenProcessPool) for result in results):
            self._stop()
        return results

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result | BaseException]:
        """``function`` of every item; in place of a result what it raised.

        A process that dies (a compiler's assertion) takes the others along. What they left undone is tried again one by one,
        so that only the item that kills its process is lost.
        """
        results = self._attempt(function, items)
        for i, result in enumerate(results):
            if isinstance(result, BrokenProcessPool):
                results[i] = self._attempt(function, [items[i]])[0]
        return results


def run_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], jobs: int
) -> list[Result | BaseException]:
    """:meth:`Processes.map` over processes of its own."""
    with Processes(min(jobs, len(items))) as processes:
        return processes.map(function, items) if items else []
