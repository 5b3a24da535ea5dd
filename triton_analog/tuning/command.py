"""The command line."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from triton_analog.launch import Hardware, environment, hardware, named_hardware, runs_kernel, store
from triton_analog.launch.lookup import explain
from triton_analog.launch.space import Problem, Space
from triton_analog.launch.store import Entry
from triton_analog.launch.writable import check_writable
from triton_analog.tuning import tables
from triton_analog.tuning.audit import audit
from triton_analog.tuning.autotune import results_directory
from triton_analog.tuning.inspect import DTYPES, OPS, TARGETS, Failure, inspect
from triton_analog.tuning.shapes import MODELS, ROWS, SLICE, Layer, problems
from triton_analog.tuning.spaces import spaces
from triton_analog.tuning.static import GPUS, gpus_of, static_sweep
from triton_analog.tuning.sweep import Done, devices, job_of, measured_before, share, share_results, sweep

KNOWN_FLAGS = sorted({flag for space in spaces().values() for flag in space.flags} - {"aligned", "wide_loads"})
"""Without those that follow from a layer's shape."""
KNOWN_TARGETS = [target for target in TARGETS if gpus_of(target)]
"""Of the GPUs that the model knows."""


# ---- Arguments ----------------------------------------------------------------------------------------------------------


def _layer(text: str) -> Layer:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"got {text!r}; give inputs x outputs of a layer, such as 4096x14336")
    return Layer(int(match[1]), int(match[2]))


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"got {text!r}; give a number above 0")
    return int(text)


def _one_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        given = [name for name in text.split(",") if name]
        unknown = [name for name in given if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}; allowed are {', '.join(allowed)}")
        return given

    return names


def _add_problem_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--op", action="append", choices=list(spaces()), help="instead of all; may be given several times"
    )
    command.add_argument("--models", type=_one_of(list(MODELS)), default=[], help=f"of {', '.join(MODELS)}; by commas")
    command.add_argument("--shapes", type=_layer, nargs="+", default=[], help="layers, such as 4096x14336")
    command.add_argument(
        "--rows", type=_positive, nargs="+", default=list(ROWS), help="of the input, batch and sequence"
    )
    command.add_argument("--dtype", action="append", choices=DTYPES, help="default: bf16; may be given several times")
    command.add_argument("--slice", type=_positive, default=SLICE, help="inputs of a tile (max_input_size)")
    command.add_argument(
        "--flags", type=_one_of(KNOWN_FLAGS),
        help=f"exactly these are on, of {', '.join(KNOWN_FLAGS)}; by commas (default: the combinations of training)",
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m triton_analog.tuning", description="Configurations of the kernels."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("sweep", help="find the best configurations and keep them")
    _add_problem_arguments(command)
    command.add_argument("--into", type=Path, help="folder for the results (default: where lookups find them)")
    command.add_argument("--again", action="store_true", help="also what was measured before")
    command.add_argument(
        "--exhaustive",
        action="store_true",
        help="time every configuration instead of searching: hours instead of minutes",
    )
    command.add_argument(
        "--static", action="store_true", help="rank by the compiler's numbers and a model; needs no GPU"
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument("--target", choices=KNOWN_TARGETS, help="with --static: all known GPUs of an architecture")
    which.add_argument("--gpu", action="append", choices=list(GPUS), help="with --static; may be given several times")
    command.add_argument("--jobs", type=_positive, help="with --static: processes that compile (default: all CPUs)")

    command = commands.add_parser("show", help="what would be used for a shape, and why")
    _add_problem_arguments(command)
    command.add_argument("--gpu", help="its exact name (default: the GPU that is there)")
    command.add_argument("--target", choices=TARGETS, help="its architecture, if the name is not a known one")

    command = commands.add_parser("check", help="list what is damaged, unknown or stale")
    command.add_argument("directories", type=Path, nargs="*", help="default: all that lookups read")

    command = commands.add_parser("merge", help="add tuning files to a folder")
    command.add_argument("files", type=Path, nargs="+")
    command.add_argument("--into", type=Path, help="default: where lookups find them")

    command = commands.add_parser("inspect", help="compile every kernel and print the compiler's numbers")
    command.add_argument(
        "--target", required=True, action="append", choices=[*TARGETS, "all"], help="may be given several times"
    )
    command.add_argument("--op", action="append", choices=OPS, help="instead of all; may be given several times")
    command.add_argument("--dtype", action="append", choices=DTYPES, help="default: bf16; may be given several times")
    command.add_argument("--jobs", type=_positive, help="processes that compile (default: all CPUs)")
    command.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    return parser


def _layers(options: argparse.Namespace) -> list[Layer]:
    """Given ones and those of models, each once; without any those of all models."""
    models = options.models or ([] if options.shapes else list(MODELS))
    return list(dict.fromkeys([*options.shapes, *(layer for name in models for layer in MODELS[name])]))


def _problems(options: argparse.Namespace, here: Hardware) -> list[tuple[Space, Problem]]:
    dtypes = [DTYPES[name] for name in options.dtype or ["bf16"]]
    return [
        (space, problem)
        for space in (spaces()[op] for op in options.op or spaces())
        for problem in problems(space, here, _layers(options), options.rows, dtypes, options.slice, options.flags)
    ]


# ---- Commands -----------------------------------------------------------------------------------------------------------


def _progress() -> Progress:
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    return Progress(TextColumn("{task.description}"), *columns, console=tables.console(stderr=True))


def _place_for_results(options: argparse.Namespace) -> Path:
    """Where results go, once it is known that they can be written there.

    Raises:
        OSError: They cannot.
    """
    directory = options.into or results_directory()
    check_writable(directory)
    return directory


def _where(what: str, directory: Path) -> str:
    """For a command that ended early."""
    return f"what was {what} is in {directory}" if any(directory.glob("*/*.json")) else "nothing was written"


def _sweep(options: argparse.Namespace) -> int:
    on = devices()
    here = hardware(on[0])
    if not runs_kernel(torch.empty(1, device=on[0])):
        print("error: there is no GPU to measure on; --static needs none", file=sys.stderr)
        return 1
    directory = _place_for_results(options)
    mine = share([job_of(space.op, problem) for space, problem in _problems(options, here)])
    before = {} if options.again else {job: measured_before(job, here, directory) for job in mine}
    results = [Done(job, here, entry) for job, entry in before.items() if entry is not None]
    left = [job for job in mine if before.get(job) is None]
    if results:
        print(f"{len(results)} of {len(mine)} were measured before; --again measures them too", file=sys.stderr)
    try:
        with _progress() as progress:
            task = progress.add_task("tuning", total=len(left))
            results += sweep(
                left, directory, on, lambda done: progress.update(task, advance=1, description=done.job.op),
                options.exhaustive,
            )  # fmt: skip
    except KeyboardInterrupt:
        print(f"stopped; {_where('measured', directory)}. The same command goes on from there.", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"error: {error}; {_where('measured before', directory)}", file=sys.stderr)
        return 1
    results = share_results(results, directory)
    if int(os.environ.get("RANK", 0)) == 0:
        tables.print_gains([(done.job.op, done.entry) for done in results if done.entry is not None])
        print(f"{sum(done.entry is not None for done in results)} configurations, in {directory}")
        for done in results:
            if done.entry is None:
                print(f"error: {done.error}", file=sys.stderr)
    return 0 if all(done.entry is not None for done in results) else 1


def _ranked(gpu: str, directory: Path, options: argparse.Namespace) -> list[tuple[str, Entry]]:
    """What a model finds for a GPU, kept as it comes."""
    dtypes = [DTYPES[name] for name in options.dtype or ["bf16"]]
    chosen = [spaces()[op] for op in options.op or spaces()]
    found = []
    with _progress() as progress:
        task = progress.add_task(gpu, total=None)
        for space, entry in static_sweep(
            gpu, chosen, _layers(options), options.rows, dtypes, options.slice, options.flags,
            jobs=options.jobs or os.cpu_count() or 1,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        ):  # fmt: skip
            store.add(directory, store.Table(space.op, gpu, GPUS[gpu].target, (entry,)))
            found.append((space.op, entry))
    return found


def _static_sweep(options: argparse.Namespace) -> int:
    directory = _place_for_results(options)
    try:
        for gpu in options.gpu or gpus_of(options.target):
            tables.print_gains(_ranked(gpu, directory, options))
    except KeyboardInterrupt:
        print(f"stopped; {_where('ranked', directory)}", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}; {_where('ranked before', directory)}", file=sys.stderr)
        return 1
    return 0


def _shown_hardware(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Hardware:
    if options.gpu is None and options.target is None:
        return hardware(devices()[0])
    known = GPUS[options.gpu].target if options.gpu in GPUS else None
    target = options.target or known
    if known not in (None, target):
        parser.error(f"--target: got {target}; {options.gpu} is {known}")
    if target is None:
        parser.error(f"--gpu: {options.gpu!r} is not one of {', '.join(GPUS)}; give its --target too")
    return named_hardware(options.gpu or "", target)


def _show(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    here = _shown_hardware(options, parser)
    assumed = (
        ""
        if options.gpu or options.target or here.name != "cpu"
        else "; there is no GPU, name one with --gpu or --target"
    )
    print(f"for {here.name or f'any GPU of {here.target}'}{assumed}", file=sys.stderr)
    tables.print_choices([(space, problem, explain(space, problem)) for space, problem in _problems(options, here)])
    return 0


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    for directory in options.directories:
        if not directory.is_dir():
            why = "is not a folder" if directory.exists() else "does not exist"
            parser.error(f"directories: {directory} {why}")
        if not list(directory.glob("*/*.json")) and list(directory.glob("*.json")):
            parser.error(f"directories: {directory} is the folder of one GPU; give {directory.absolute().parent}")
    directories = options.directories or store.search_path(environment.tuning_directory())
    findings = [finding for directory in directories for finding in audit(directory)]
    for path, text in findings:
        print(f"{path}: {text}")
    places = [f"{place}: {_content(place)}" for place in directories]
    print(f"{len(findings)} findings in {', '.join(places)}", file=sys.stderr)
    return 1 if findings else 0


def _content(directory: Path) -> str:
    if not directory.is_dir():
        return "does not exist"
    count = len(list(directory.glob("*/*.json")))
    return "1 file" if count == 1 else f"{count} files"


def _merge(options: argparse.Namespace) -> int:
    directory = _place_for_results(options)
    failed = 0
    for path in options.files:
        if not path.is_file():
            why = f"is a folder; give its files, {path}/*/*.json" if path.is_dir() else "does not exist"
            print(f"error: {path}: {why}", file=sys.stderr)
            failed = 1
            continue
        table = store.read(path)
        if table is None:
            print(f"error: {path}: no tuning file that can be read", file=sys.stderr)
            failed = 1
            continue
        try:
            print(f"{path} -> {store.add(directory, table)}")
        except (OSError, ValueError) as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            failed = 1
    return failed


def _line(failure: Failure) -> str:
    kernel = failure.kernel or "before any kernel"
    return f"error: {failure.op} ({failure.variant}), {kernel}, {failure.target}, {failure.dtype}: {failure.error}"


def _inspect(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    targets = list(TARGETS) if "all" in options.target else options.target
    try:
        reports, failures = inspect(options.op or OPS, targets, options.dtype or ["bf16"], options.jobs)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if options.json:
        print(json.dumps([asdict(report) for report in reports], indent=1, default=str))
    else:
        tables.print_reports(reports)
    for failure in failures:
        print(_line(failure), file=sys.stderr)
    return 1 if failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 1 if anything was found wrong."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return _run(options, parser)
    except OSError as error:  # there is no place for results
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if options.command == "sweep" and not options.static:
        if options.target or options.gpu or options.jobs:
            parser.error(
                "--target, --gpu and --jobs go with --static; a measured sweep runs on the GPUs that are there"
            )
        return _sweep(options)
    if options.command == "sweep":
        if not (options.target or options.gpu):
            parser.error("--static: give a --target or a --gpu")
        if options.again:
            parser.error("--again goes with a measured sweep; a static one ranks everything anew")
        if "fp32" in (options.dtype or ()):
            parser.error("--dtype: got fp32; the model behind --static knows bf16 and fp16")
        return _static_sweep(options)
    if options.command == "show":
        return _show(options, parser)
    if options.command == "check":
        return _check(options, parser)
    if options.command == "merge":
        return _merge(options)
    return _inspect(options, parser)
