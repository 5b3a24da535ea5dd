"""``python -m triton_analog.tuning``: what it refuses, shows, finds, merges, compiles and measures, and its exit status."""

from __future__ import annotations

import errno
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import needs_interpreter
from rich.console import Console

from bench import memory
from triton_analog import launch
from triton_analog.launch import Hardware, environment, hardware, store
from triton_analog.launch.fingerprint import code_hash, space_hash
from triton_analog.launch.space import Problem, as_values
from triton_analog.launch.store import Entry, Table
from triton_analog.launch.writable import check_writable
from triton_analog.ops.dac import DacConfig
from triton_analog.tuning import autotune, command, tables
from triton_analog.tuning import sweep as sweeping
from triton_analog.tuning.inspect import TARGETS
from triton_analog.tuning.shapes import MODELS
from triton_analog.tuning.spaces import spaces
from triton_analog.tuning.static import GPUS, gpus_of

H200, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
CPU = torch.device("cpu")
DAC = spaces()["dac"]
ONE, TWO = DacConfig(4, 256), DacConfig(8, 256)
"""Configurations of every problem here. None is the formula's."""


@pytest.fixture(autouse=True)
def _no_gpu(places, monkeypatch):
    """And no file has been complained about."""
    monkeypatch.setattr(store, "_reported", set())
    monkeypatch.setattr(command, "devices", lambda: [CPU])


def entry(rows: int = 4096, config: Any = ONE, *, origin: Any = "measured", **source: str | int) -> Entry:
    """Of the input converter, 512 inputs wide."""
    key = DAC.key(Problem(Hardware(H200, "sm_90", 90), torch.bfloat16, (rows, 512), (False,)))
    fresh = {"code": code_hash(DAC), "space": space_hash(DAC), "date": "2026-05-01T12:00:00+00:00"}
    values = config if isinstance(config, dict) else as_values(config)
    return Entry(key, values, origin, 1.0, 2.0, 0.0, fresh | source)


def keep(directory: Path, *entries: Entry, device: str = H200, target: str = "sm_90") -> Path:
    return store.add(directory, Table("dac", device, target, entries or (entry(),)))


def files(directory: Path) -> dict[Path, tuple[bytes, int]]:
    """What is there, and when it was written."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.rglob("*") if path.is_file()}


def entries_in(path: Path) -> list[Entry]:
    table = store.read(path)
    assert table is not None
    return list(table.entries)


def cells(line: str) -> list[str]:
    return re.split(r" {2,}", line.strip())


# ---- Arguments ----------------------------------------------------------------------------------------------------------

WRONG = {
    "": ["required: command"],
    "tune": ["'tune'", "sweep", "show", "check", "merge", "inspect"],
    "sweep --op conv": ["argument --op", "'conv'", "matmul", "dac"],
    "sweep --shapes 4096": ["argument --shapes", "'4096'", "such as 4096x14336"],
    "sweep --shapes 16x0": ["argument --shapes", "'16x0'"],
    "sweep --shapes 16x16x16": ["argument --shapes", "'16x16x16'"],
    "sweep --shapes": ["argument --shapes"],
    "sweep --rows 0": ["argument --rows", "'0'", "a number above 0"],
    "sweep --rows 1.5": ["argument --rows", "'1.5'"],
    "sweep --slice 0": ["argument --slice", "'0'"],
    "sweep --dtype fp64": ["argument --dtype", "'fp64'", "bf16", "fp16", "fp32"],
    "sweep --flags noise,spam": ["argument --flags", "got spam;", "dynamic", "noise"],
    "sweep --flags aligned": ["argument --flags", "got aligned;"],
    "sweep --models gpt,phi-3-mini": ["argument --models", "got gpt;", *MODELS],
    "sweep --target sm_90": ["--target", "go with --static"],
    "sweep --jobs 2": ["--jobs", "go with --static"],
    "sweep --static": ["--static", "--target", "--gpu"],
    "sweep --static --target sm_1": ["argument --target", "'sm_1'", "sm_90"],
    "sweep --static --target sm_86": ["argument --target", "'sm_86'", "sm_90"],
    "sweep --static --gpu H200": ["argument --gpu", "'H200'", H200],
    "sweep --static --target sm_90 --gpu A100": ["--gpu"],
    "sweep --static --target sm_90 --jobs 0": ["argument --jobs", "'0'"],
    "sweep --static --target sm_90 --again": ["--again", "measured"],
    "sweep --static --target sm_90 --dtype fp32": ["--dtype", "fp32", "bf16 and fp16"],
    "show --gpu H200": ["--gpu", "'H200'", H200, "--target"],
    "show --target sm_1": ["argument --target", "'sm_1'", *TARGETS],
    "check missing": ["directories", "missing does not exist"],
    "merge": ["required: files"],
    "inspect": ["required: --target"],
    "inspect --target sm_90 --op conv": ["argument --op", "'conv'", "matmul"],
    "inspect --target sm_90 --jobs none": ["argument --jobs", "'none'"],
}
"""Arguments, and what the message names."""


@pytest.mark.parametrize("arguments", WRONG, ids=lambda arguments: arguments or "nothing")
def test_a_wrong_argument_is_named_with_what_is_allowed_and_no_file_is_touched(arguments, places, tmp_path, capsys):
    keep(places.own)
    before = files(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments.split())
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    message = printed.err.splitlines()[-1]
    assert all(part in message for part in WRONG[arguments]), message
    assert files(tmp_path) == before


def test_a_gpu_and_another_architecture_contradict_each_other(capsys):
    with pytest.raises(SystemExit):
        command.main(["show", "--gpu", H200, "--target", "sm_80"])
    assert capsys.readouterr().err.endswith("error: --target: got sm_80; NVIDIA H200 is sm_90\n")
    with pytest.raises(SystemExit):
        command.main(["sweep", "--static", "--gpu", H200, "--target", "sm_80"])
    assert "argument --target: not allowed with argument --gpu" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["inspect --target sm_90", "sweep --static --target sm_90 --op dac"])
def test_what_compiles_refuses_the_interpreter(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    try:
        status = command.main(arguments.split())
    except SystemExit as stopped:
        status = stopped.code
    assert status
    assert "TRITON_INTERPRET is set: the interpreter compiles nothing; unset it" in capsys.readouterr().err
    assert files(tmp_path) == {}


def test_without_rich_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(SystemExit, match=r"needs the package rich; pip install 'triton-analog\[tuning\]'"):
        runpy.run_module("triton_analog.tuning", run_name="__main__")


# ---- Problems -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> Iterator[list[sweeping.Job]]:
    """What a measured sweep tunes, which takes no time."""
    jobs = []

    def tune(space, problem, device, candidates, processes):
        jobs.append(sweeping.job_of(space.op, problem))
        return Entry(space.key(problem), as_values(space.formula(problem)), "measured", 1.0, 1.0, 0.0, {})

    monkeypatch.setattr(sweeping, "tune", tune)
    with launch.backend("kernel"):
        yield jobs


def sizes(job: sweeping.Job) -> dict[str, int]:
    return dict(job.key.sizes)


def test_a_sweep_is_of_every_operation_and_of_known_models_unless_told_otherwise(asked):
    assert command.main(["sweep"]) == 0
    assert {job.op for job in asked} == set(spaces())
    assert {job.key.dtype for job in asked if job.op != "noise"} == {"bfloat16"}
    assert {sizes(job)["rows"] for job in asked if job.op == "matmul"} == {2048, 8192}
    columns = {layer.outputs for layers in MODELS.values() for layer in layers}
    assert {sizes(job)["columns"] for job in asked if job.op == "matmul"} == columns
    assert len(set(asked)) == len(asked)


def test_options_choose_the_problems(asked):
    options = "--op dac --op matmul --shapes 64x32 --rows 16 48 --slice 32 --dtype fp32 --flags noise,dynamic"
    assert command.main(["sweep", *options.split()]) == 0
    assert [(job.op, sizes(job)) for job in asked] == [
        ("dac", {"rows": 16, "width": 32}),
        ("dac", {"rows": 64, "width": 32}),
        ("matmul", {"rows": 16, "columns": 32, "width": 32}),
        ("matmul", {"rows": 64, "columns": 32, "width": 32}),
    ]
    assert {job.key.dtype for job in asked} == {"float32"}
    assert [job.key.flags for job in asked] == [("dynamic",)] * 2 + [("dynamic", "noise")] * 2


def test_flags_may_all_be_off(asked):
    command.main(["sweep", "--op", "matmul", "--shapes", "16x16", "--flags", ""])
    assert {job.key.flags for job in asked} == {()}


def test_layers_are_those_of_models_and_those_given_each_once(asked):
    layers = ["--models", "smollm2-135m", "--shapes", "576x192", "16x80"]
    assert command.main(["sweep", "--op", "matmul", "--rows", "16", "--flags", "noise", *layers]) == 0
    assert sorted(sizes(job)["columns"] for job in asked) == [80, 192, 576, 576, 1536]


# ---- Show ---------------------------------------------------------------------------------------------------------------


def show(capsys, *arguments: str) -> list[list[str]]:
    """The lines below the headings, in their cells."""
    assert command.main(["show", "--op", "dac", "--shapes", "512x512", *arguments]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert cells(heading) == ["op", "dtype", "sizes", "flags", "configuration", "why", "entry", "file"]
    return [cells(line) for line in lines]


CONFIGURATION = "BLOCK_M=4 BLOCK_K=256 num_warps=4"
FOUND = "rows 4096, width 512, measured, 2026-05-01T12:00:00+00:00"


@pytest.mark.parametrize(
    ("gpu", "rows", "why"),
    [(H200, "4096", "exact"), (H200, "2048", "nearest"), (H100, "4096", "same architecture")],
)
def test_show_prints_the_configuration_why_it_is_used_and_where_it_comes_from(gpu, rows, why, places, capsys):
    path = keep(places.own)
    (line,) = show(capsys, "--gpu", gpu, "--rows", rows)
    assert line == ["dac", "bfloat16", f"rows {rows}, width 512", CONFIGURATION, why, FOUND, str(path)]


@pytest.mark.parametrize("arguments", [["--gpu", "NVIDIA L40S"], ["--gpu", H200, "--dtype", "fp16"], []], ids=str)
def test_show_prints_the_formulas_configuration_where_no_entry_serves(arguments, places, capsys):
    """Without a GPU and without a name it is that of the CPU."""
    keep(places.own)
    (line,) = show(capsys, *arguments, "--rows", "4096")
    formula = DAC.formula(Problem(hardware(CPU), torch.bfloat16, (4096, 512), (False,)))
    assert line[3:] == [" ".join(f"{name}={value}" for name, value in as_values(formula).items()), "formula"]


def test_show_knows_a_gpu_by_its_architecture(places, capsys):
    path = keep(places.own)
    for arguments in (["--target", "sm_90"], ["--gpu", "NVIDIA GH200", "--target", "sm_90"]):
        (line,) = show(capsys, *arguments, "--rows", "4096")
        assert line[4:] == ["same architecture", FOUND, str(path)]


def test_show_says_which_hardware_it_assumed(places, capsys):
    command.main(["show", "--op", "dac", "--shapes", "512x512"])
    assert capsys.readouterr().err == "for cpu; there is no GPU, name one with --gpu or --target\n"
    command.main(["show", "--op", "dac", "--shapes", "512x512", "--target", "sm_90"])
    assert capsys.readouterr().err == "for any GPU of sm_90\n"


@pytest.mark.parametrize("width", [80, 120])
def test_a_narrow_terminal_folds_and_loses_nothing(width, places, capsys, monkeypatch):
    path = keep(places.own)

    def shown(width: int) -> str:
        monkeypatch.setattr(tables, "console", lambda: Console(width=width, highlight=False, markup=False, emoji=False))
        assert command.main(["show", "--op", "dac", "--shapes", "512x512", "--rows", "4096", "--gpu", H200]) == 0
        return capsys.readouterr().out

    whole, narrow = shown(10_000), shown(width)
    table, _, below = narrow.partition("file: ")
    assert below == f"{path}\n"
    assert max(map(len, table.splitlines())) <= width
    assert sorted("".join(narrow.split())) == sorted("".join(whole.split()) + ":")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_name_and_the_layers_that_it_has_in_the_benchmarks(name):
    assert set(MODELS[name]) == {(layer.inputs, layer.outputs) for layer in memory.MODELS[name].layers}


def test_show_has_a_line_for_each_problem(places, capsys):
    keep(places.own)
    lines = show(capsys, "--gpu", H200, "--rows", "4096", "64", "--dtype", "bf16", "--dtype", "fp32")
    assert [(line[1], line[2], line[4]) for line in lines] == [
        ("bfloat16", "rows 4096, width 512", "exact"),
        ("bfloat16", "rows 64, width 512", "formula"),
        ("float32", "rows 4096, width 512", "formula"),
        ("float32", "rows 64, width 512", "formula"),
    ]
    lines = show(capsys, "--gpu", H200, "--op", "matmul", "--rows", "4096", "--flags", "noise")
    assert [line[0] for line in lines] == ["dac", "matmul"]
    assert lines[1][3] == "noise"


def test_names_are_shown_as_they_are(places, capsys, tmp_path, monkeypatch):
    """Brackets and colons mean something to the package that draws the tables."""
    directory = tmp_path / "[bold]results[old]:smile:"
    monkeypatch.setenv(environment.TUNING_DIR, str(directory))
    path = keep(directory)
    (line,) = show(capsys, "--gpu", H200, "--rows", "4096")
    assert line[-1] == str(path)


def test_show_measures_nothing_and_writes_nothing(places, tmp_path, monkeypatch, capsys):
    def fail(*arguments: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setenv(environment.AUTOTUNE, "1")
    monkeypatch.setattr(autotune, "tune", fail)
    keep(places.own)
    before = files(tmp_path)
    with launch.backend("kernel"):
        assert command.main(["show"]) == 0
    assert set(spaces()) <= {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]}
    assert files(tmp_path) == before


# ---- Check --------------------------------------------------------------------------------------------------------------


def test_check_is_content_with_good_files(places, capsys):
    keep(places.own)
    assert command.main(["check", str(places.own)]) == 0
    assert capsys.readouterr() == ("", f"0 findings in {places.own}: 1 file\n")


@pytest.mark.filterwarnings("ignore::triton_analog.launch.store.TuningWarning")
def test_check_lists_what_is_stale_unknown_and_damaged_wherever_lookups_read(places, tmp_path, capsys):
    stale = keep(places.own, entry(), entry(16, code="of an older kernel"))
    unknown = keep(places.cache, entry(config={"BLOCK_M": 4}), entry(16))
    damaged = keep(places.shipped)
    damaged.write_text("<<<<<<< HEAD")
    before = files(tmp_path)

    assert command.main(["check"]) == 1
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"{stale}: stale: Key(dtype='bfloat16', sizes=(('rows', 16)")
    assert lines[1].startswith(f"{unknown}: unknown: Key(dtype='bfloat16', sizes=(('rows', 4096)")
    assert lines[2].startswith(f"{damaged}: damaged: not JSON")
    assert printed.err.splitlines()[-1] == (
        f"3 findings in {places.own}: 1 file, {places.cache}: 1 file, {places.shipped}: 1 file"
    )
    assert files(tmp_path) == before


def test_check_looks_at_given_folders_only(places, tmp_path, capsys):
    path = keep(places.own, entry(code="of an older kernel"))
    first, second = tmp_path / "first", tmp_path / "second"
    keep(first)
    keep(second)
    assert command.main(["check", str(first), str(second)]) == 0
    assert command.main(["check", str(first), str(places.own)]) == 1
    assert capsys.readouterr().out.startswith(f"{path}: stale: ")


def test_check_says_where_there_is_nothing_to_look_at(places, capsys):
    keep(places.own)
    assert command.main(["check"]) == 0
    _, errors = capsys.readouterr()
    assert errors == (
        f"0 findings in {places.own}: 1 file, {places.cache}: does not exist, {places.shipped}: does not exist\n"
    )
    with pytest.raises(SystemExit):
        command.main(["check", str(places.own / "NVIDIA_H200")])
    assert f"is the folder of one GPU; give {places.own}" in capsys.readouterr().err


# ---- Where nothing can be written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["sweep"], ["sweep", "--static", "--gpu", H200], ["merge", "some.json"]],
    ids=["sweep", "static sweep", "merge"],
)
def test_a_folder_that_cannot_be_written_is_found_before_the_work(arguments, tmp_path, capsys, monkeypatch):
    work = mock.Mock(side_effect=AssertionError("the work began"))
    for name in ("sweep", "static_sweep", "measured_before"):
        monkeypatch.setattr(command, name, work)
    (tmp_path / "file").write_text("not a folder")
    before = files(tmp_path)
    folder = tmp_path / "file" / "deeper" / "results"
    with launch.backend("kernel"):
        assert command.main([*arguments, "--into", str(folder)]) == 1
    assert capsys.readouterr().err == (
        f"error: nothing can be written into {folder} (Not a directory, {tmp_path / 'file'}); give another folder, or make it "
        "writable\n"
    )
    assert files(tmp_path) == before


def test_asking_whether_a_folder_can_be_written_leaves_nothing(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_user_without_a_home_has_what_is_shipped_and_a_word_on_where_results_go(places, monkeypatch, capsys):
    monkeypatch.delenv(environment.TUNING_DIR)
    monkeypatch.setattr(store, "user_cache_path", mock.Mock(side_effect=RuntimeError("no home directory")))
    keep(places.shipped)
    assert store.search_path(None) == (places.shipped,)
    assert store.search_path("/data") == (Path("/data"), places.shipped)
    assert command.main(["check"]) == 0
    assert command.main(["show", "--gpu", H200, "--op", "dac", "--shapes", "512x512", "--rows", "4096"]) == 0
    assert "exact" in capsys.readouterr().out
    assert command.main(["sweep", "--static", "--gpu", H200]) == 1
    assert "no home directory; set TRITON_ANALOG_TUNING_DIR" in capsys.readouterr().err
    problem = DAC.problem(Hardware(H200, "sm_90", 90), entry().key)
    with pytest.warns(autotune.TuningWarning, match=r"are not kept: .* set TRITON_ANALOG_TUNING_DIR"):
        autotune.keep(DAC, problem, entry())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said
        autotune.keep(DAC, problem, entry())


# ---- Merge --------------------------------------------------------------------------------------------------------------


def merge(*paths: Path, into: Path) -> int:
    return command.main(["merge", *map(str, paths), "--into", str(into)])


def test_merge_keeps_every_entry_of_every_file(places, tmp_path, capsys):
    first, second = keep(tmp_path / "a", entry(16), entry(64)), keep(tmp_path / "b", entry(256))
    other = keep(tmp_path / "b", entry(16), device=H100)
    path = keep(places.own, entry(4096))
    sources = files(tmp_path / "a") | files(tmp_path / "b")

    assert command.main(["merge", *map(str, (first, second, other))]) == 0
    assert entries_in(path) == [entry(rows) for rows in (16, 64, 256, 4096)]
    relative = store.table_path(places.own, H100, "dac")
    assert entries_in(relative) == [entry(16)]
    assert capsys.readouterr().out.splitlines() == [
        f"{first} -> {path}",
        f"{second} -> {path}",
        f"{other} -> {relative}",
    ]
    assert files(tmp_path / "a") | files(tmp_path / "b") == sources


MODEL, MODEL_LATER = entry(origin="model"), entry(config=TWO, origin="model", date="2026-06-01T12:00:00+00:00")
MEASURED, MEASURED_LATER = entry(), entry(config=TWO, date="2026-06-01T12:00:00+00:00")


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("better", "worse"),
    [(MEASURED, MODEL), (MEASURED, MODEL_LATER), (MEASURED_LATER, MEASURED), (MODEL_LATER, MODEL)],
    ids=["measured", "measured, though earlier", "later measurement", "later model"],
)
def test_of_two_entries_the_measured_one_then_the_later_one_stays(better, worse, swapped, tmp_path):
    first, second = (worse, better) if swapped else (better, worse)
    path = keep(tmp_path / "into", first)
    assert merge(keep(tmp_path / "from", second), into=tmp_path / "into") == 0
    assert entries_in(path) == [better]


def test_what_was_merged_is_used(places, tmp_path, capsys):
    assert merge(keep(tmp_path / "downloaded"), into=places.own) == 0
    capsys.readouterr()
    (line,) = show(capsys, "--gpu", H200, "--rows", "4096")
    assert line[3:5] == [CONFIGURATION, "exact"]


@pytest.mark.filterwarnings("ignore::triton_analog.launch.store.TuningWarning")
def test_a_file_that_cannot_be_merged_is_an_error_that_leaves_the_others(tmp_path, capsys):
    into = tmp_path / "into"
    path = keep(into, entry(4096))
    missing, damaged = tmp_path / "missing.json", keep(tmp_path / "damaged")
    damaged.write_text("{")
    elsewhere = keep(tmp_path / "elsewhere", target="sm_80")
    good = keep(tmp_path / "good", entry(16))

    assert [merge(bad, into=into) for bad in (missing, damaged, elsewhere)] == [1, 1, 1]
    assert entries_in(path) == [entry(4096)]
    capsys.readouterr()
    assert merge(missing, damaged, elsewhere, good, into=into) == 1
    assert entries_in(path) == [entry(16), entry(4096)]
    printed = capsys.readouterr()
    assert printed.out == f"{good} -> {path}\n"
    errors = printed.err.splitlines()
    assert errors[0] == f"error: {missing}: does not exist"
    assert errors[1] == f"error: {damaged}: no tuning file that can be read"
    assert errors[2].startswith(f"error: {elsewhere}: target: got ('sm_90', 'sm_80')")


def test_the_good_entries_of_a_damaged_file_are_merged_and_the_bad_one_is_reported(tmp_path):
    source = keep(tmp_path / "from", entry(16), entry(64))
    document = json.loads(source.read_text())
    document["entries"][0]["microseconds"] = -1
    source.write_text(json.dumps(document))
    with pytest.warns(store.TuningWarning, match="entry 1: microseconds: got -1"):
        assert merge(source, into=tmp_path / "into") == 0
    assert entries_in(store.table_path(tmp_path / "into", H200, "dac")) == [entry(64)]
    assert json.loads(source.read_text()) == document


def test_a_file_of_a_newer_version_is_not_replaced(tmp_path, capsys):
    path = keep(tmp_path / "into")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": store.FORMAT + 1}))
    before = path.read_bytes()
    assert merge(keep(tmp_path / "from"), into=tmp_path / "into") == 1
    assert path.read_bytes() == before
    assert "newer than this version's" in capsys.readouterr().err


# ---- Processes ------------------------------------------------------------------------------------------------------------


def start(*arguments: str, interpreter: bool) -> subprocess.Popen[str]:
    """The command in a process of its own that sees no GPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "TRITON_DEFAULT_FP_FUSION": "1"}
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-m", "triton_analog.tuning", *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=inherited | hidden | ({"TRITON_INTERPRET": "1"} if interpreter else {}),
    )  # fmt: skip


MANY = [f"16x{columns}" for columns in range(16, 28)]
SWEEP = ["sweep", "--op", "adc_grad", "--rows", "16", "--dtype", "fp32", "--shapes", *MANY]
"""A dozen problems of two configurations each."""


@needs_interpreter
def test_an_interrupted_sweep_loses_nothing_and_goes_on_from_there(tmp_path):
    path = store.table_path(tmp_path, "cpu", "adc_grad")
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process inherits it if it is ignored
    try:
        sweep = start(*SWEEP, "--into", str(tmp_path), interpreter=True)
    finally:
        signal.signal(signal.SIGINT, previous)
    while sweep.poll() is None and not path.exists():
        time.sleep(0.005)
    sweep.send_signal(signal.SIGINT)
    _, errors = sweep.communicate()
    assert sweep.returncode == 130, errors
    assert errors.splitlines()[-1] == (
        f"stopped; what was measured is in {tmp_path}. The same command goes on from there."
    )
    kept = entries_in(path)
    assert 1 <= len(kept) < len(MANY)

    sweep = start(*SWEEP, "--into", str(tmp_path), interpreter=True)
    output, errors = sweep.communicate()
    assert sweep.returncode == 0, errors
    assert f"{len(kept)} of {len(MANY)} were measured before; --again measures them too" in errors
    assert output.splitlines()[-1] == f"{len(MANY)} configurations, in {tmp_path}"
    entries = entries_in(path)
    assert len(entries) == len(MANY)
    assert all(one in entries for one in kept)
    assert not [file for file in files(tmp_path) if file.suffix == ".tmp"]


def test_kernels_are_inspected_without_a_gpu():
    output, errors = start(
        "inspect", "--target", "sm_90", "--op", "noise", "--jobs", "1", "--json", interpreter=False
    ).communicate()
    (report,) = json.loads(output)
    assert (report["op"], report["kernel"], report["target"]) == ("noise", "noise_kernel", "sm_90")
    assert report["registers"] > 0
    assert report["spilled_bytes"] == 0
    assert report["instructions"] > 100
    assert errors == ""


@pytest.mark.timeout(300)
def test_a_static_sweep_ranks_for_gpus_that_are_not_there(tmp_path):
    problem = ["--op", "dac", "--shapes", "64x16", "--rows", "16", "--slice", "16", "--flags", "dynamic"]
    sweep = start(
        "sweep", "--static", "--target", "sm_90", *problem, "--jobs", "1", "--into", str(tmp_path), interpreter=False
    )
    output, errors = sweep.communicate()
    assert sweep.returncode == 0, errors
    for gpu in gpus_of("sm_90"):
        (found,) = entries_in(store.table_path(tmp_path, gpu, "dac"))
        asked = Problem(Hardware(gpu, "sm_90", 90), torch.bfloat16, (16, 16), (True,))
        assert found.key == DAC.key(asked)
        assert DAC.accepts(asked, found.config) is not None
        assert found.origin == "model"
        assert found.source["multiprocessors"] == GPUS[gpu].multiprocessors
    assert len([line for line in output.splitlines() if line.startswith("dac ") and " model " in line]) == 2


# ---- The static sweep's options and failures --------------------------------------------------------------------------------


@pytest.fixture
def ranked(monkeypatch):
    """The static sweep without a compiler: what it was asked for, and entries of these rows."""
    asked = SimpleNamespace(calls=[], rows=[16, 64], then=None)

    def static_sweep(gpu, chosen, layers, rows, dtypes, max_input_size, on, jobs, progress):
        asked.calls.append((gpu, [space.op for space in chosen], layers, rows, dtypes, max_input_size, on, jobs))
        for number in asked.rows:
            yield DAC, entry(number, origin="model")
        if asked.then is not None:
            raise asked.then

    monkeypatch.setattr(command, "static_sweep", static_sweep)
    return asked


def test_options_reach_the_static_sweep(ranked, tmp_path, capsys):
    options = "--op dac --shapes 64x32 --rows 16 --dtype fp16 --slice 32 --flags dynamic --jobs 3"
    gpus = ["NVIDIA L40S", "AMD Instinct MI300X"]
    chosen = [argument for gpu in gpus for argument in ("--gpu", gpu)]
    assert command.main(["sweep", "--static", *options.split(), *chosen, "--into", str(tmp_path)]) == 0
    assert ranked.calls == [(gpu, ["dac"], [(64, 32)], [16], [torch.float16], 32, ["dynamic"], 3) for gpu in gpus]
    for gpu in gpus:
        table = store.read(store.table_path(tmp_path, gpu, "dac"))
        assert table.target == GPUS[gpu].target
        assert [one.origin for one in table.entries] == ["model", "model"]
    assert capsys.readouterr().out.count("dac ") == 4


def test_a_static_sweep_does_not_replace_what_was_measured(ranked, places):
    path = keep(places.own, entry(16, TWO))
    assert command.main(["sweep", "--static", "--gpu", H200]) == 0
    assert entries_in(path) == [entry(16, TWO), entry(64, origin="model")]


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "stopped; what was ranked is in "),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: [Errno 28] No space left on device; what was ranked"),
    ],
    ids=["interrupted", "a full disk"],
)  # fmt: skip
def test_a_static_sweep_that_stops_keeps_what_came_before(raised, status, message, ranked, places, capsys):
    ranked.then = raised
    assert command.main(["sweep", "--static", "--gpu", H200]) == status
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(message)
    assert str(places.own) in last
    assert len(entries_in(store.table_path(places.own, H200, "dac"))) == 2
