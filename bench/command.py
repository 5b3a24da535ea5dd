"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import memory, plots, report
from bench.machine import ROOT, device_name
from bench.recipes import EVERYTHING
from bench.run import Plan, run
from bench.workloads import SUITES
from triton_analog.launch.writable import check_writable

REPORT = "report.md"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of this library and its peers.")
    commands = top.add_subparsers(dest="command", required=True)

    runs = commands.add_parser("run", help="race every contender; write results, a report and pictures")
    runs.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    runs.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    runs.add_argument("--base", metavar="REV", help="another revision of this repository as one more contender")
    runs.add_argument("--out", type=Path, help="folder of the results (default: out/bench/<device>)")
    runs.add_argument("--only", default="", metavar="TEXT", help="workloads whose names contain TEXT")
    runs.add_argument("--quick", action="store_true", help="fewer sizes")
    runs.add_argument("--seconds", type=float, default=6.0, help="per race, beyond its least number of rounds")
    runs.add_argument("--minutes", type=float, default=30.0, help="what has not begun by then is not run")
    runs.add_argument("--threads", type=int, default=2, help="of the CPU")

    readme = commands.add_parser("readme", help="write the README's section from bench/results/*/results.json")
    readme.add_argument("--results", type=Path, default=ROOT / "bench" / "results")

    plot = commands.add_parser("plot", help="report and pictures of results that are there already")
    plot.add_argument("folder", type=Path)

    kept = commands.add_parser("memory", help="what a model's linear layers keep for the backward, predicted")
    kept.add_argument("--model", choices=sorted(memory.MODELS), default="llama-8b")
    kept.add_argument("--rows", type=int, default=8192, help="tokens of a batch")
    kept.add_argument("--max-input-size", type=int, default=512)
    kept.add_argument("--no-adc", action="store_true")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        {"run": run_command, "readme": readme_command, "plot": plot_command, "memory": memory_command}[given.command](
            given
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_command(given: argparse.Namespace) -> None:
    if given.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    warnings.filterwarnings("ignore", module="aihwkit|torch")
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    folder = given.out or ROOT / "out" / "bench" / device_name(device)
    check_writable(folder)
    plan = Plan(device, given.suite, given.quick, given.only, given.seconds, given.minutes, given.base)
    run(plan, folder, lambda text: print(text, flush=True))
    write_report(folder)


def write_report(folder: Path) -> None:
    record = report.read(folder)
    (folder / REPORT).write_text(report.markdown(record), "utf-8")
    print(f"wrote {folder / REPORT}")
    if plots.available():
        for path in plots.draw(record, folder):
            print(f"wrote {path}")
    else:
        print(f"no pictures: matplotlib is not installed; where it is, python -m bench plot {folder} draws them")


def plot_command(given: argparse.Namespace) -> None:
    report.read(given.folder)
    check_writable(given.folder)
    write_report(given.folder)


def readme_command(given: argparse.Namespace) -> None:
    path = ROOT / "README.md"
    path.write_text(report.with_section(path.read_text("utf-8"), report.readme_section(given.results)), "utf-8")


def memory_command(given: argparse.Namespace) -> None:
    recipe = {**EVERYTHING, "mapping.max_input_size": given.max_input_size}
    if given.no_adc:
        recipe |= {"forward.out_bound": 0.0, "forward.out_res": -1}
    print(f"{given.model}, {given.rows} rows, 16-bit numbers; MiB; the rows of all blocks have the input once where layers "
          "share it, and as their peak all that is kept and the largest layer's own\n")  # fmt: skip
    rows = memory.rows_of(memory.MODELS[given.model], given.rows, recipe, 2)
    print(report.table(["layer", "", "kept beyond the input", "input kept", "peak of forward and backward"], rows))
