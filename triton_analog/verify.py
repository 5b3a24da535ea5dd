"""``python -m triton_analog.verify``: every operation's kernels against their reference, on the machine at hand."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from triton_analog.tables import ShownAsTable
from triton_analog.testing.cases import OPERATIONS, Shape
from triton_analog.testing.compare import DTYPES, Comparison, compare
from triton_analog.tuning.processes import run_in_processes

SMALL = (Shape(19, 37, 70, 3),)
SHAPES = (
    *SMALL,
    Shape(1, 1, 1),
    Shape(5, 7, 3, 3),
    Shape(3, 17, 17),
    Shape(33, 16, 127),
    Shape(17, 23, 258, 2),
    Shape(1, 9, 40, 7),
    Shape(64, 128, 256, 2),
    Shape(257, 384, 769, 2),
    Shape(1000, 520, 1032, 3),
    Shape(512, 768, 1024, 2),
    Shape(1024, 1024, 2048, 4),
)
"""Awkward ones and those that layers have. The interpreter, which is slow, gets :data:`SMALL` alone."""
MOST_PROCESSES = 8
"""Each has a context of its own on the GPU, about half a GB."""
NAMES = dict(zip(DTYPES, ("fp32", "bf16", "fp16"), strict=True))


@dataclass(frozen=True)
class Job:
    """One operation in one dtype at some shapes, as it can be sent to another process."""

    op: str
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    device: str
    threads: int


def check(job: Job) -> list[Comparison]:
    torch.set_num_threads(job.threads)
    return [one for shape in job.shapes for one in compare(job.op, shape, job.dtype, torch.device(job.device))]


def _ratio(one: Comparison) -> float:
    return one.error / one.allowed if one.allowed else one.error


@dataclass
class Verdicts(ShownAsTable):
    """What all comparisons found."""

    found: dict[tuple[str, torch.dtype], list[Comparison]]
    raised: list[str]

    @property
    def wrong(self) -> list[str]:
        bad = [one for each in self.found.values() for one in each if one.wrong]
        return [
            f"{' '.join(filter(None, (one.op, one.variant)))}, {NAMES[one.dtype]}, {one.shape}: {one.wrong}"
            for one in bad
        ] + self.raised

    def headings(self) -> tuple[str, ...]:
        return ("operation", *(text for name in NAMES.values() for text in (name, "allowed")))

    def rows(self) -> Iterable[tuple[str, ...]]:
        for op in dict.fromkeys(op for op, _ in self.found):
            worst = [max(self.found[op, dtype], key=_ratio, default=None) for dtype in DTYPES]
            yield op, *(text for one in worst for text in self._cells(one))

    @staticmethod
    def _cells(one: Comparison | None) -> tuple[str, str]:
        return (f"{one.error:.1e}", f"{one.allowed:.1e}") if one else ("raised", "")

    def legend(self) -> str:
        return (
            "Of all shapes and variants the error that comes nearest to what is allowed:\n"
            "twice that of the reference in the same dtype, against itself in fp64, and two\n"
            "units in the last place of fp32. Inputs and outputs are about 1 in size."
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m triton_analog.verify",
        description="Hold the kernels of every operation against their reference, in fp32, bf16 and fp16. Exits with 1 if one "
        "is further off than it may be.",
    )
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu: in Triton's interpreter, at fewer shapes (default: the GPU if there is one)",
    )  # fmt: skip
    parser.add_argument(
        "--op", action="append", choices=OPERATIONS, metavar="OP",
        help=f"instead of all, may be given several times: {', '.join(OPERATIONS)}",
    )  # fmt: skip
    return parser


def _verdicts(operations: Sequence[str], shapes: tuple[Shape, ...], device: str) -> Verdicts:
    cores = os.cpu_count() or 1
    processes = min(MOST_PROCESSES, cores)
    asked = [(op, dtype) for op in operations for dtype in DTYPES]
    jobs = [Job(op, dtype, shapes, device, max(1, cores // processes)) for op, dtype in asked]
    found: dict[tuple[str, torch.dtype], list[Comparison]] = {}
    raised = []
    for job, result in zip(jobs, run_in_processes(check, jobs, processes), strict=True):
        found[job.op, job.dtype] = [] if isinstance(result, BaseException) else result
        if isinstance(result, BaseException):
            raised.append(f"{job.op}, {NAMES[job.dtype]}: raised {type(result).__name__}: {result}")
    return Verdicts(found, raised)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if every kernel is right, 1 if one is not, 2 if there is no such device."""
    given = _parser().parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: --device cuda: torch sees no GPU; --device cpu runs the kernels in Triton's interpreter",
            file=sys.stderr,
        )
        return 2
    on_gpu = given.device == "cuda"
    shapes = SHAPES if on_gpu else SMALL
    if not on_gpu:  # for the processes, which have not imported Triton yet
        os.environ |= {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    where = (
        torch.cuda.get_device_name()
        if on_gpu
        else f"the CPU, in Triton's interpreter: {len(SMALL)} of {len(SHAPES)} shapes"
    )
    print(f"verifying on {where}; this takes about a minute", flush=True)
    start = time.perf_counter()
    verdicts = _verdicts(given.op or OPERATIONS, shapes, given.device)
    print(verdicts)
    for line in verdicts.wrong:
        print(f"wrong: {line}")
    calls = sum(len(each) for each in verdicts.found.values())
    outcome = f"{len(verdicts.wrong)} are wrong" if verdicts.wrong else "all agree with the reference"
    print(f"{calls} calls in {time.perf_counter() - start:.0f} s: {outcome}")
    return 1 if verdicts.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
