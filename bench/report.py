"""Results as Markdown: a report beside them, and the README's section."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.machine import ROOT
from bench.report_host import host_tables
from bench.results import RESULTS
from bench.tables import IDEAL, OURS, Record, by_workload, multiple, table

PREDECESSOR = "aihwkit-lightning"
PREDECESSORS = (PREDECESSOR, f"{PREDECESSOR} (Triton)")
BEGIN, END = "<!-- bench: written by python -m bench readme -->", "<!-- bench: end -->"

TIMES = (
    "Time of a training step as a multiple of the digital layer's in the same round: median (quartiles). The last columns "
    "divide ours by the predecessor's."
)
MEMORY = "Kept for the backward beyond parameters and input:"


def read(folder: Path) -> Record:
    """The results in ``folder``.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file is damaged, or something else.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; python -m bench run --out {folder} writes it")
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); python -m bench run --out {folder} writes it anew") from None
    if not (isinstance(record, dict) and {"environment", "results"} <= record.keys()):
        raise ValueError(f"{path}: not the results of a run; python -m bench run --out {folder} writes them")
    return record


def on_cpu(record: Record) -> bool:
    return record["environment"]["device"] == "cpu"


def mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.2f}"


def label(group: str, workload: str) -> str:
    """Of a row: what comes after the group's first comma is in the workload's name, or only sorts it into a plot."""
    return f"{group.partition(',')[0]}: {workload}"


def contenders(record: Record, suites: Sequence[str]) -> list[str]:
    """In the order of their first turn."""
    return list(dict.fromkeys(r["contender"] for r in record["results"] if r["suite"] in suites))


def time_table(record: Record) -> str:
    """Layers and models: every contender's step as a multiple of the digital one's, and ours of the predecessor's."""
    suites = ("layers", "models")
    names = [name for name in contenders(record, suites) if name != IDEAL and name not in record["absent"]]
    beaten = [name for name in PREDECESSORS if name in names]
    rows = [
        [label(group, workload), *(multiple(found.get(name), IDEAL) for name in names)]
        + [multiple(found.get(OURS), other) for other in beaten]
        for (group, workload), found in by_workload(record, suites).items()
    ]
    return table(["", *names, *(f"{OURS} / {other}" for other in beaten)], rows)


def counts_table(record: Record, heading: str, cell: Callable[[Record], str]) -> str:
    """Layers and models: what was counted of every contender."""
    suites = ("layers", "models")
    names = [name for name in contenders(record, suites) if name not in record["absent"]]
    rows = [
        [label(group, workload), *(cell(found[name]) if name in found else "" for name in names)]
        for (group, workload), found in by_workload(record, suites).items()
    ]
    return table([heading, *names], rows)


def saved(result: Record) -> str:
    return mebibytes(result["saved_bytes"])


def peak(result: Record) -> str:
    """Measured, and in brackets what the formulas predict."""
    predicted = mebibytes(result.get("predicted_peak_bytes"))
    return mebibytes(result["peak_bytes"]) + (f" ({predicted})" if predicted else "")


def memory_tables(record: Record) -> list[str]:
    """MiB that a forward keeps for its backward beyond parameters and input; on a GPU also a step's peak, and its launches."""
    parts = [MEMORY + "\n", counts_table(record, "MiB", saved)]
    if not on_cpu(record):
        parts += ["Peak of a step beyond what is there before it (predicted):\n", counts_table(record, "MiB", peak)]
        parts += [
            "Kernels launched by a step:\n",
            counts_table(record, "", lambda result: str(result["launches"] or "")),
        ]
    return parts


def operations_table(record: Record) -> str:
    """Operations: their time as a multiple of plain torch's nearest, and what that is of the machine's ceilings."""
    ceiling = record["ceilings"]
    rows = []
    for (_, workload), found in by_workload(record, ("ops",)).items():
        ours = found[OURS]
        rows.append(
            [
                workload,
                multiple(ours, "plain torch"),
                "" if ours["gb_s"] is None else f"{ours['gb_s'] / ceiling['copy_gb_s']:.0%}",
                "" if ours["gflop_s"] is None else f"{ours['gflop_s'] / ceiling['matmul_gflop_s']:.0%}",
            ]
        )
    return table(["", "time / plain torch", "of a copy's bandwidth", "of a product's FLOP/s"], rows)


def rates_table(record: Record) -> str:
    """Absolute figures, of a GPU that nobody else uses."""
    rows = [
        [
            result["workload"], result["contender"], f"{1e3 * result['seconds'][1]:.3f}",
            "" if result["gflop_s"] is None else f"{result['gflop_s'] / 1e3:.1f}",
            "" if result["gflop_s"] is None else f"{result['gflop_s'] / record['ceilings']['matmul_gflop_s']:.0%}",
        ]
        for result in record["results"]
        if result["seconds"] and result["suite"] != "host"
    ]  # fmt: skip
    return table(["", "", "ms", "TFLOP/s", "of a plain product"], rows)


def notes(record: Record) -> str:
    """Who was absent, what failed, and the known defects behind every mark."""
    lines = [f"- {name} did not take part: {why}" for name, why in record["absent"].items()]
    for result in record["results"]:
        is_left_out = result["status"] == "not run" and result["suite"] in ("", "host")
        if result["status"] in ("FAILED", "unsupported") or is_left_out:
            lines.append(
                f"- {result['workload']}, {result['contender']}: {result['status']}: {one_line(result['detail'])}"
            )
    for result in record["results"]:
        if result["defects"]:
            lines.append(f"- \\* {result['workload']}, {result['contender']}: {'; '.join(result['defects'])}")
        if result["seconds"] and result["detail"]:
            lines.append(f"- † {result['workload']}, {result['contender']}: {one_line(result['detail'])}")
    return "\n".join(lines) + "\n"


def one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def figures(record: Record) -> list[str]:
    """What was aimed at, and whether it was reached."""
    lines, layers = [], by_workload(record, ("layers",))
    for other in PREDECESSORS:
        pairs = {
            label(group, workload): found[OURS]["ratios"][other][1]
            for (group, workload), found in layers.items()
            if OURS in found and other in found[OURS]["ratios"]
        }
        if pairs:
            slower = {name: value for name, value in pairs.items() if value > 1}
            text = ", ".join(f"{name} ({value:.2f})" for name, value in slower.items())
            lines.append(f"Time against {other}: not slower in {len(pairs) - len(slower)} of {len(pairs)} races"
                         + (f"; slower in {text}" if slower else ""))  # fmt: skip
        kept = {
            workload: (found[OURS]["saved_bytes"], found[other]["saved_bytes"])
            for (_, workload), found in layers.items()
            if OURS in found
            and other in found
            and found[OURS]["saved_bytes"] is not None
            and found[other]["saved_bytes"]
        }
        if kept:
            worst = max(kept, key=lambda name: kept[name][0] / kept[name][1])
            share = kept[worst][0] / kept[worst][1]
            lines.append(f"Bytes kept for the backward, against {other}: at most {share:.1%} ({worst})")
    return lines


def setting(record: Record) -> str:
    about = record["environment"]
    where = about["device"].replace("_", " ")
    if on_cpu(record):  # others may be at work on it; the load is that of the minute before
        threads = "one thread" if about["threads"] == 1 else f"{about['threads']} threads"
        where = f"a CPU with {threads} on {about['cores']} cores, load {about['load']} beforehand"
    return f"{where}, PyTorch {about['torch']}, Triton {about['triton']}, revision {about['revision']}, {about['date'][:10]}"


def markdown(record: Record) -> str:
    """The whole report."""
    parts = [f"# Benchmarks: {setting(record)}\n"]
    if not on_cpu(record):
        ceiling = record["ceilings"]
        parts.append(
            f"Measured ceilings: copy {ceiling['copy_gb_s']:.0f} GB/s, product {ceiling['matmul_gflop_s'] / 1e3:.0f} TFLOP/s.\n"
        )
    lines = figures(record)
    parts += ["\n".join(f"- {text}" for text in lines) + "\n"] if lines else []
    if by_workload(record, ("layers", "models")):
        parts += ["## Layers and models\n", TIMES + "\n", time_table(record), *memory_tables(record)]
    if by_workload(record, ("ops",)):
        parts += ["## Operations\n", operations_table(record)]
    if by_workload(record, ("host",)):
        parts += ["## Host\n", *host_tables(record)]
    if not on_cpu(record):
        parts += ["## Rates\n", rates_table(record)]
    return "\n".join([*parts, "## Notes\n", notes(record)])


def readme_section(folder: Path) -> str:
    """What stands between the README's two marks: GPUs first.

    Raises:
        FileNotFoundError: there are no results in any folder of ``folder``.
    """
    if not any(folder.glob(f"*/{RESULTS}")):
        raise FileNotFoundError(
            f"{folder}: no */{RESULTS} there; python -m bench run --out {folder}/<device> writes one"
        )
    records = [(path.parent, read(path.parent)) for path in sorted(folder.glob(f"*/{RESULTS}"))]
    parts = []
    for place, record in sorted(records, key=lambda pair: (on_cpu(pair[1]), pair[0].name)):
        parts += [f"### {setting(record)}\n", *(f"- {text}." for text in figures(record)), ""]
        parts += [TIMES + "\n", time_table(record), *memory_tables(record)]
        where = place.relative_to(ROOT).as_posix() if place.is_relative_to(ROOT) else place.name
        parts += [f"[{where}/report.md]({where}/report.md) has everything, failures and absences included.\n"]
    return "\n".join(parts)


def with_section(text: str, section: str) -> str:
    """``text`` with the part between the marks replaced.

    Raises:
        ValueError: the marks are not there, once each.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README: the marks {BEGIN} and {END} have to stand in it once each")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{section}\n{END}{rest.split(END)[1]}"
