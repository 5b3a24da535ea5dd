"""What a step costs the host, as tables."""

from __future__ import annotations

from bench.host import COUNTED, IN_ONE_THREAD, TIMED
from bench.host_model import FROM_PYTHON, GROUP
from bench.tables import IDEAL, Record, by_workload, multiple, table

Workloads = dict[str, dict[str, Record]]
"""Results by workload and contender."""


def milliseconds(result: Record) -> str:
    """Median and quartiles, or why there are none."""
    if not result["seconds"]:
        return result["status"]
    first, middle, third = (1e3 * value for value in result["seconds"])
    return f"{middle:.3g} ({first:.3g} to {third:.3g})" + (" †" if result["detail"] else "")


def counted_cells(result: Record) -> list[str]:
    """Calls of a step, kernels that it starts and blocks that it allocates."""
    calls = f"{result['python_calls']} + {result['c_calls']}"
    return [calls, *("" if result[name] is None else str(result[name]) for name in ("launches", "allocations"))]


def counted_table(workloads: Workloads) -> str:
    rows = [
        [workload, name, *counted_cells(result), milliseconds(result), multiple(result, IDEAL)]
        for workload, found in workloads.items()
        for name, result in found.items()
    ]
    return table(["", "", "calls, Python + C", "kernels", "allocations", "CPU time, ms", f"/ {IDEAL}"], rows)


def timed_table(workloads: Workloads) -> str:
    yardsticks = IDEAL, IDEAL + IN_ONE_THREAD
    rows = [
        [
            workload, name, milliseconds(result), *(multiple(result, other) for other in yardsticks),
            "" if result["device_seconds"] is None else f"{1e3 * result['device_seconds']:.3g}",
            str(result["launches"] or ""),
        ]
        for workload, found in workloads.items()
        for name, result in found.items()
    ]  # fmt: skip
    return table(["", "", "ms", *(f"/ {other}" for other in yardsticks), "GPU, ms", "kernels"], rows)


def models_table(workloads: Workloads) -> str:
    yardstick = f"{IDEAL}, {FROM_PYTHON}"
    rows = [
        [
            workload, name, milliseconds(result), multiple(result, yardstick), multiple(result, like(name)),
            "" if result["first_seconds"] is None else f"{result['first_seconds']:.1f}",
        ]
        for workload, found in workloads.items()
        for name, result in found.items()
    ]  # fmt: skip
    return table(["", "", "ms", f"/ {yardstick}", f"/ {IDEAL}, as it", "first step, s"], rows)


def like(name: str) -> str:
    """The digital contender that is started in the same way."""
    return f"{IDEAL},{name.partition(',')[2]}"


TABLES = {
    COUNTED: (
        "What a step calls, starts and allocates where kernels do not run, and the CPU time that it takes (bf16; the digital "
        "layer is a small one in fp32, as a CPU does its work in the caller's time):",
        counted_table,
    ),
    TIMED: ("Time until the calls of a step return, median (quartiles), and the GPU's own time of it:", timed_table),
    GROUP: (
        "Forward, backward and fused AdamW of a model with everything on, median (quartiles) of the wall-clock time:",
        models_table,
    ),
}


def host_tables(record: Record) -> list[str]:
    """What is counted without a GPU, a layer's time on one, and a model's in every way to start it."""
    found = by_workload(record, ("host",))
    parts = []
    for group, (text, as_table) in TABLES.items():
        workloads = {name: results for (own, name), results in found.items() if own == group and "all" not in results}
        if workloads:
            parts += [text + "\n", as_table(workloads)]
    return parts
