"""Measuring configurations, and sweeps over many problems: what wins, what is kept, and what happens when one is stopped."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from helpers import needs_interpreter
from torch import Tensor

from triton_analog import launch
from triton_analog.launch import Hardware, hardware, store
from triton_analog.launch.fingerprint import code_hash, space_hash
from triton_analog.launch.space import Problem, as_values, forced_config
from triton_analog.launch.store import Entry, Key, Table
from triton_analog.tuning import command, measure
from triton_analog.tuning import sweep as sweeping
from triton_analog.tuning.measure import FINALISTS, ROUNDS, WORTH_IT, NothingRuns, agrees, tune
from triton_analog.tuning.model import Compiled
from triton_analog.tuning.shapes import Layer, problems
from triton_analog.tuning.spaces import spaces
from triton_analog.tuning.sweep import Done, Job, job_of, measured_before, share, sweep

NOISE, ADC_GRAD = spaces()["noise"], spaces()["adc_grad"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    """Sweeps refuse to measure the reference."""
    with launch.backend("kernel"):
        yield


def small(device: torch.device, rows: int = 16) -> Problem:
    """Its four configurations are the formula's and three others."""
    return Problem(hardware(device), torch.float32, (rows, 16))


@pytest.fixture
def candidates(device) -> list[Any]:
    found = NOISE.candidates(small(device))
    assert len(found) == 4
    return found


# ---- Agreement ----------------------------------------------------------------------------------------------------------


def integers(different: int) -> Tensor:
    """A thousand of them, so many not as they should be."""
    return torch.arange(1000, dtype=torch.int32) + (torch.arange(1000) < different)


ONES = torch.ones(1000)


@pytest.mark.parametrize(
    ("actual", "expected", "agree"),
    [
        ([ONES], [ONES], True),
        ([ONES * 1.001], [ONES], True),
        ([ONES * 1.1], [ONES], False),
        ([ONES + 2 * (torch.arange(1000) == 7)], [ONES], False),
        ([ONES.bfloat16() * 1.004], [ONES.bfloat16()], True),
        ([torch.zeros(9)], [torch.zeros(9)], True),
        ([torch.full((9,), 1e-30)], [torch.zeros(9)], False),
        ([torch.full((9,), torch.nan)], [torch.ones(9)], False),
        ([torch.ones(9)], [torch.full((9,), torch.nan)], False),
        ([torch.full((9,), torch.inf)], [torch.ones(9)], False),
        ([ONES.double()], [ONES], False),
        ([ONES[:, None]], [ONES], False),
        ([ONES], [ONES, ONES], False),
        ([ONES, ONES * 1.1], [ONES, ONES], False),
        ([integers(different=0)], [integers(0)], True),
        ([integers(different=10)], [integers(0)], True),
        ([integers(different=11)], [integers(0)], False),
    ],
    ids=[
        "the same", "a rounding", "ten percent", "one wrong number", "a rounding of bf16", "zeros", "not quite zeros",
        "NaN", "NaN expected", "infinite", "another dtype", "another shape", "a result is missing", "the second is wrong",
        "the same integers", "few other integers", "more other integers",
    ],
)  # fmt: skip
def test_results_agree_up_to_roundings(actual, expected, agree):
    assert agrees(actual, expected) is agree


# ---- Choosing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch) -> Callable[[dict[Any, float]], list[Any]]:
    """Makes up the times of configurations; the list that it returns grows by each one that is timed."""

    def of(times: dict[Any, float]) -> list[Any]:
        log = []

        def microseconds(call, device):
            config = forced_config(NOISE)
            log.append(config)
            return [0.9 * times[config], times[config], 1.1 * times[config]]

        monkeypatch.setattr(measure, "microseconds", microseconds)
        return log

    return of


def change_noise(monkeypatch, change: Callable[[Any, Tensor], Tensor]) -> None:
    """``change(config, out)`` takes the place of what the kernel wrote."""
    operator = import_module("triton_analog.ops.noise")._noise  # the package's name for it is the operation
    original = operator._run_kernel
    monkeypatch.setattr(operator, "_run_kernel", lambda *args: change(forced_config(NOISE), original(*args)))


def test_the_fastest_configuration_is_kept_beside_the_formulas_time(device, candidates, timed):
    timed(dict(zip(candidates, [40.0, 30.0, 20.0, 50.0], strict=True)))
    entry = tune(NOISE, small(device), device)
    assert entry.key == NOISE.key(small(device))
    assert entry.config == as_values(candidates[2])
    assert entry.origin == "measured"
    assert (entry.microseconds, entry.formula_microseconds) == (20.0, 40.0)
    assert entry.spread == pytest.approx(0.2)  # between the quartiles: 0.9 to 1.1 of the median


@pytest.mark.parametrize(("gain", "replaced"), [(WORTH_IT - 0.01, False), (WORTH_IT + 0.01, True)])
def test_the_formulas_configuration_stays_unless_another_is_worth_it(device, candidates, timed, gain, replaced):
    timed(dict(zip(candidates, [100.0, 500.0, 100.0 / gain, 500.0], strict=True)))
    entry = tune(NOISE, small(device), device)
    assert entry.config == as_values(candidates[2 if replaced else 0])
    assert entry.formula_microseconds == 100.0
    assert entry.microseconds == pytest.approx(100.0 / gain if replaced else 100.0)


def test_the_best_take_turns_with_the_formulas(device, candidates, timed):
    first, a, b, c = candidates
    log = timed({first: 90.0, a: 30.0, b: 20.0, c: 10.0})
    tune(NOISE, small(device), device)
    assert FINALISTS == 3
    assert log == [first, a, b, c] + ROUNDS * [c, b, a, first]


def test_a_finalist_that_is_the_formulas_is_timed_no_more_often_than_the_others(device, candidates, timed):
    first, a, b, c = candidates
    log = timed({first: 10.0, a: 20.0, b: 90.0, c: 30.0})
    tune(NOISE, small(device), device)
    assert log == [first, a, b, c] + ROUNDS * [first, a, c]


def test_a_configuration_that_computes_something_else_is_not_even_timed(device, candidates, timed, monkeypatch):
    first, a, wrong, c = candidates
    log = timed({first: 30.0, a: 20.0, wrong: 1.0, c: 40.0})
    change_noise(monkeypatch, lambda config, out: -out if config == wrong else out)
    assert tune(NOISE, small(device), device).config == as_values(a)
    assert wrong not in log


def test_a_configuration_that_raises_is_passed_over(device, candidates, timed, monkeypatch):
    first, a, broken, c = candidates
    log = timed({first: 30.0, a: 20.0, broken: 1.0, c: 40.0})

    def fail(config, out):
        if config == broken:
            raise RuntimeError("out of resource: shared memory")
        return out

    change_noise(monkeypatch, fail)
    assert tune(NOISE, small(device), device).config == as_values(a)
    assert broken not in log


def test_a_formula_that_does_not_run_is_no_reason_to_keep_nothing(device, candidates, timed, monkeypatch):
    broken, a, b, c = candidates
    timed({broken: 1.0, a: 20.0, b: 30.0, c: 40.0})
    change_noise(monkeypatch, lambda config, out: -out if config == broken else out)
    entry = tune(NOISE, small(device), device)
    assert entry.config == as_values(a)
    assert entry.microseconds == entry.formula_microseconds == 20.0


def test_where_nothing_runs_the_error_names_the_problem(device, timed, monkeypatch):
    log = timed({})
    change_noise(monkeypatch, lambda config, out: out + 1)
    with pytest.raises(NothingRuns) as raised:
        tune(NOISE, small(device), device)
    message = str(raised.value)
    assert message.startswith("noise, ")
    assert "('rows', 16)" in message
    assert message.endswith(": none of 4 configurations ran and agreed with the reference")
    assert log == []


def test_only_given_candidates_are_tried(device, candidates, timed):
    log = timed(dict(zip(candidates, [40.0, 30.0, 20.0, 10.0], strict=True)))
    entry = tune(NOISE, small(device), device, candidates[:2])
    assert entry.config == as_values(candidates[1])
    assert set(log) == set(candidates[:2])


def test_neighbours_differ_in_one_field_and_in_warps(device):
    problem = Problem(hardware(device), torch.float32, (4096, 4096))
    center = NOISE.formula(problem)
    near, every = measure.neighbours(NOISE, problem, center), NOISE.candidates(problem)
    for config in every:
        others = (config.BLOCK_M != center.BLOCK_M) + (config.BLOCK_N != center.BLOCK_N)
        assert (config in near) is (others <= 1)
    assert center in near
    assert len(near) < len(every)


def test_a_search_goes_on_from_the_fastest_neighbour_until_none_is_faster(device, timed, monkeypatch):
    """Two fields away from the formula's; what lies beyond is not timed."""
    problem = Problem(hardware(device), torch.float32, (4096, 4096))
    monkeypatch.setattr(measure, "_runs", lambda *arguments: True)
    center, every = NOISE.formula(problem), NOISE.candidates(problem)
    goal = max(every, key=lambda config: (config.BLOCK_M != center.BLOCK_M, config.BLOCK_N != center.BLOCK_N))

    def off(config: Any) -> float:
        return 10.0 * ((config.BLOCK_M != goal.BLOCK_M) + (config.BLOCK_N != goal.BLOCK_N) + 1)

    log = timed({config: off(config) for config in every})
    entry = tune(NOISE, problem, device)
    assert (entry.microseconds, entry.formula_microseconds) == (10.0, 30.0)
    assert max(log.count(config) for config in set(log)) <= 1 + ROUNDS
    assert len(set(log)) < len(every)


class Compilers:
    """In the place of processes: the compiler's numbers of configurations, or what it raised."""

    def __init__(self, numbers: dict[Any, Any]) -> None:
        self.numbers = numbers
        self.rounds: list[int] = []

    def map(self, function: Any, kernels: Any) -> list[Any]:
        self.rounds.append(len(kernels))
        return [self.numbers[kernel.config] for kernel in kernels]


def compiled(spilled: int = 0, occupancy: int = 2) -> Compiled:
    return Compiled(100, spilled, 0, 1000, 100, 0, occupancy)


@pytest.mark.parametrize("spills", [0, 8], ids=["a formula without spills", "a formula that spills"])
def test_what_spills_more_than_the_formulas_or_does_not_fit_is_not_timed(
    device, candidates, timed, monkeypatch, spills
):
    first, a, b, c = candidates
    problem = Problem(Hardware("", "sm_90", 90), torch.float32, (16, 16))
    assert NOISE.candidates(problem) == candidates
    log = timed(dict.fromkeys(candidates, 1.0))
    compilers: Any = Compilers(
        {first: compiled(spills), a: compiled(spills + 4), b: compiled(spills), c: compiled(occupancy=0)}
    )
    tune(NOISE, problem, device, processes=compilers)
    assert set(log) == {first, b}
    assert compilers.rounds == [1 + len(candidates)]  # all of a round at once


def test_the_formulas_configuration_is_tried_though_the_compiler_fails(device, candidates, timed):
    first, a, b, c = candidates
    log = timed(dict.fromkeys(candidates, 1.0))
    compilers: Any = Compilers(
        {first: RuntimeError("no compiler"), a: compiled(), b: compiled(4), c: MemoryError("full")}
    )
    tune(NOISE, Problem(Hardware("", "sm_90", 90), torch.float32, (16, 16)), device, processes=compilers)
    assert set(log) == {first, a}


def test_the_users_random_numbers_and_configurations_stay_as_they_are(device, candidates, timed):
    timed(dict.fromkeys(candidates, 1.0))
    torch.manual_seed(3)
    expected = torch.randn(4, device=device)
    torch.manual_seed(3)
    tune(NOISE, small(device), device)
    assert torch.equal(torch.randn(4, device=device), expected)
    assert forced_config(NOISE) is None


def test_an_entry_says_what_it_was_measured_with(device, candidates, timed):
    timed(dict.fromkeys(candidates, 1.0))
    before = datetime.now(timezone.utc).replace(microsecond=0)
    source = tune(NOISE, small(device), device).source
    assert before <= datetime.fromisoformat(source["date"]) <= datetime.now(timezone.utc)
    assert (source["triton"], source["torch"]) == (triton.__version__, torch.__version__)
    assert (source["code"], source["space"]) == (code_hash(NOISE), space_hash(NOISE))
    assert ("multiprocessors" if device.type == "cuda" else "processor") in source


def test_times_are_of_the_call(device):
    called = []
    times = measure.microseconds(lambda: called.append(torch.ones(9, device=device).sum()), device)
    assert len(times) >= 2
    assert all(0 < time < 1e6 for time in times)
    assert len(called) >= 2


@pytest.mark.parametrize("op", list(spaces()))
def test_every_operation_can_be_tuned(op, device, monkeypatch):
    """On made-up operands its kernel agrees with the reference."""
    monkeypatch.setattr(measure, "microseconds", lambda call, device: [1.0, 1.0])
    space = spaces()[op]
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    problem = next(problems(space, hardware(device), [Layer(32, 32)], [16], [dtype], 16))
    with torch.autocast(device.type):  # as where an operation is first met
        entry = tune(space, problem, device, [space.formula(problem)])
    assert entry.config == as_values(space.formula(problem))


# ---- Sweeps -------------------------------------------------------------------------------------------------------------

LAYERS = ["16x16", "16x32", "16x48"]
COLUMNS = [16, 32, 48]
ARGUMENTS = ["sweep", "--op", "adc_grad", "--rows", "16", "--dtype", "fp32", "--shapes", *LAYERS]
"""Three problems of two configurations each, which take the interpreter milliseconds."""


def adc_grad(columns: int, on: Hardware | None = None) -> Problem:
    return Problem(on or hardware(CPU), torch.float32, (16, columns))


def job(columns: int) -> Job:
    return job_of("adc_grad", adc_grad(columns))


def made_up(columns: int, **changes: Any) -> Entry:
    """As if it had been measured."""
    problem = adc_grad(columns)
    source = {"date": "2026-05-01T12:00:00+00:00", "code": code_hash(ADC_GRAD), "space": space_hash(ADC_GRAD)}
    fields: dict[str, Any] = {
        "key": ADC_GRAD.key(problem),
        "config": as_values(ADC_GRAD.formula(problem)),
        "origin": "measured",
        "microseconds": 10.0,
        "formula_microseconds": 12.5,
        "spread": 0.01,
        "source": source,
    }
    return Entry(**fields | changes)


def keep(directory: Path, *entries: Entry, device: str = "cpu") -> Path:
    return store.add(directory, Table("adc_grad", device, "cpu", entries))


def columns_of(key: Key) -> int:
    return dict(key.sizes)["columns"]


def columns_in(directory: Path) -> list[int]:
    """Of the problems that were kept there."""
    table = store.read(store.table_path(directory, "cpu", "adc_grad"))
    return [] if table is None else sorted(columns_of(entry.key) for entry in table.entries)


class Tuner:
    """Takes no time, and knows what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.fail: dict[int, BaseException] = {}

    def __call__(self, space, problem, device, candidates, processes) -> Entry:
        columns = problem.sizes[1]
        self.asked.append(columns)
        if columns in self.fail:
            raise self.fail[columns]
        return made_up(columns)


@pytest.fixture
def tuner(monkeypatch) -> Tuner:
    """In the place of measuring, on one device."""
    tuner = Tuner()
    monkeypatch.setattr(sweeping, "tune", tuner)
    monkeypatch.setattr(command, "devices", lambda: [CPU])
    return tuner


def run(directory: Path, *more: str) -> int:
    return command.main([*ARGUMENTS, "--into", str(directory), *more])


def test_a_sweep_measures_keeps_and_prints(tmp_path, device, monkeypatch, capsys):
    monkeypatch.setattr(command, "devices", lambda: [device])
    assert run(tmp_path) == 0
    here = hardware(device)
    table = store.read(store.table_path(tmp_path, here.name, "adc_grad"))
    assert table.target == here.target
    assert sorted(columns_of(entry.key) for entry in table.entries) == COLUMNS
    for entry in table.entries:
        problem = adc_grad(columns_of(entry.key), here)
        assert ADC_GRAD.accepts(problem, entry.config) in ADC_GRAD.candidates(problem)
        assert entry.origin == "measured"
    heading, *lines, last = capsys.readouterr().out.splitlines()
    assert heading.split() == [
        "op", "dtype", "sizes", "flags", "formula", "us", "best", "us", "gain", "spread", "origin", "configuration",
    ]  # fmt: skip
    assert [line.split()[:6] for line in lines] == [
        ["adc_grad", "float32", "columns", f"{columns},", "rows", "16"] for columns in COLUMNS
    ]
    assert all("BLOCK_M=" in line and " x " in line and "measured" in line for line in lines)
    assert last == f"3 configurations, in {tmp_path}"


def test_gains_are_times_by_which_the_formulas_is_slower(tmp_path, tuner, capsys):
    run(tmp_path, "--shapes", "16x16")
    _, line, _ = capsys.readouterr().out.splitlines()
    assert "12.5" in line
    assert "10.0" in line
    assert "1.25 x" in line
    assert "1.0%" in line


def test_results_go_where_lookups_find_them(tmp_path, tuner, monkeypatch):
    monkeypatch.setenv("TRITON_ANALOG_TUNING_DIR", str(tmp_path / "own"))
    assert command.main(ARGUMENTS) == 0
    assert columns_in(tmp_path / "own") == COLUMNS


def test_a_sweep_that_is_interrupted_keeps_what_it_has_and_goes_on_from_there(tmp_path, tuner, capsys):
    tuner.fail = {32: KeyboardInterrupt()}
    assert run(tmp_path) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"stopped; what was measured is in {tmp_path}. The same command goes on from there."
    )
    assert columns_in(tmp_path) == [16]

    tuner.asked, tuner.fail = [], {}
    assert run(tmp_path) == 0
    assert tuner.asked == [32, 48]
    assert columns_in(tmp_path) == COLUMNS
    captured = capsys.readouterr()
    assert "1 of 3 were measured before; --again measures them too" in captured.err
    assert captured.out.count("adc_grad") == 3  # the table shows all that was asked for


def test_what_was_measured_is_measured_again_only_if_asked_for(tmp_path, tuner):
    run(tmp_path)
    run(tmp_path)
    assert tuner.asked == COLUMNS
    run(tmp_path, "--again")
    assert tuner.asked == 2 * COLUMNS


def test_an_entry_that_is_not_measured_stale_or_of_another_device_does_not_count(tmp_path, tuner):
    keep(tmp_path, made_up(16, origin="model"), made_up(32, source={"code": "old", "space": "old"}))
    keep(tmp_path, made_up(48), device="CPU of another kind")
    assert [measured_before(job(columns), hardware(CPU), tmp_path) for columns in COLUMNS] == [None] * 3
    run(tmp_path)
    assert tuner.asked == COLUMNS


def test_a_problem_that_nothing_solves_is_an_error_that_leaves_the_others(tmp_path, tuner, capsys):
    tuner.fail = {16: NothingRuns("adc_grad: nothing ran"), 48: torch.OutOfMemoryError("too large")}
    assert run(tmp_path) == 1
    assert columns_in(tmp_path) == [32]
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-2:] == ["error: adc_grad: nothing ran", "error: too large"]
    assert captured.out.splitlines()[-1] == f"1 configurations, in {tmp_path}"
    run(tmp_path)
    assert tuner.asked == [*COLUMNS, 16, 48]  # the next sweep tries them again


class FullDisk:
    """Takes the first file and no other."""

    def __init__(self) -> None:
        self.write = store._write
        self.room = 1

    def __call__(self, path: Path, data: bytes) -> None:
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self.write(path, data)


def test_a_full_disk_ends_a_sweep_that_keeps_what_came_before(tmp_path, tuner, monkeypatch):
    monkeypatch.setattr(store, "_write", FullDisk())
    with pytest.raises(OSError, match="No space left on device"):
        sweep([job(columns) for columns in COLUMNS], tmp_path, [CPU])
    assert columns_in(tmp_path) == [16]
    assert tuner.asked == [16, 32]  # nothing is measured that cannot be kept


def test_the_command_says_that_the_disk_is_full(tmp_path, tuner, monkeypatch, capsys):
    monkeypatch.setattr(store, "_write", FullDisk())
    assert run(tmp_path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: [Errno 28] No space left on device")
    assert error.endswith(f"what was measured before is in {tmp_path}")


def test_without_anything_to_measure_on_the_command_says_what_would_work(tmp_path, tuner, capsys):
    with launch.backend("reference"):
        assert run(tmp_path) == 1
    assert capsys.readouterr().err == "error: there is no GPU to measure on; --static needs none\n"
    assert tuner.asked == []


def test_progress_comes_with_every_result(tmp_path, tuner):
    tuner.fail = {32: NothingRuns("nothing ran")}
    seen = []
    results = sweep(
        [job(columns) for columns in COLUMNS], tmp_path, [CPU], lambda done: seen.append((done, columns_in(tmp_path)))
    )
    assert [done for done, _ in seen] == results
    assert [kept for _, kept in seen] == [[16], [16], [16, 48]]
    assert results[1] == Done(job(32), hardware(CPU), None, "nothing ran")


# ---- Several devices and machines ---------------------------------------------------------------------------------------


def test_a_sweep_runs_on_the_cpu_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sweeping.devices() == [CPU]


@pytest.fixture
def gpus(monkeypatch) -> list[str]:
    """Names of GPUs that are not there."""
    names: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(sweeping, "hardware", lambda device: Hardware(names[device.index], "sm_90", 90))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return names


def indices() -> list[int]:
    return [device.index for device in sweeping.devices()]


def test_a_sweep_runs_on_every_gpu_of_one_kind(gpus, monkeypatch):
    gpus += ["NVIDIA H200", "NVIDIA H100", "NVIDIA H200"]
    assert indices() == [0, 2]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert indices() == [1]


def test_ranks_have_disjoint_shares_that_are_everything(monkeypatch):
    jobs = [job(columns) for columns in range(1, 8)]
    assert share(jobs) == jobs
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(share(jobs))
    assert sorted(map(len, shares)) == [2, 2, 3]
    assert {each for part in shares for each in part} == set(jobs)


@pytest.fixture
def interpreter(monkeypatch) -> None:
    """Processes that are started now run kernels on the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@needs_interpreter
def test_every_device_has_a_process_of_its_own(tmp_path, tuner, interpreter):
    results = sweep([job(columns) for columns in COLUMNS], tmp_path, [CPU, CPU])
    assert sorted(columns_of(done.job.key) for done in results) == columns_in(tmp_path) == COLUMNS
    assert all(done.entry is not None and done.hardware == hardware(CPU) for done in results)
    assert tuner.asked == []  # by this process


CHILD = """
import os, sys
from triton_analog.tuning import command, sweep

tune = sweep.tune

def reported(space, problem, device, candidates, processes):
    print("tuning", problem.sizes[1], flush=True)
    if str(problem.sizes[1]) == os.environ.get("DIES_AT"):
        os.kill(os.getpid(), 9)
    return tune(space, problem, device, candidates, processes)

sweep.tune = reported
sys.exit(command.main(sys.argv[1:]))
"""


def start(directory: Path, **environment: str) -> subprocess.Popen[str]:
    """A sweep that says what it tunes."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *ARGUMENTS, "--into", str(directory)], env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def tuned_by(output: str) -> list[int]:
    return [int(line.removeprefix("tuning ")) for line in output.splitlines() if line.startswith("tuning ")]


@needs_interpreter
def test_a_sweep_that_is_killed_goes_on_where_it_was(tmp_path, tuner, interpreter):
    killed = start(tmp_path, DIES_AT="32")
    output, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors
    assert tuned_by(output) == [16, 32]
    assert columns_in(tmp_path) == [16]
    before = store.table_path(tmp_path, "cpu", "adc_grad").read_text()

    assert run(tmp_path) == 0
    assert tuner.asked == [32, 48]
    (first, *_) = json.loads(before)["entries"]
    assert first in json.loads(store.table_path(tmp_path, "cpu", "adc_grad").read_text())["entries"]


@needs_interpreter
def test_machines_share_the_work_and_all_have_the_results(tmp_path, interpreter):
    """Also what one of them had before; and whatever a rank has, it makes no difference to the others' shares."""
    machines = [tmp_path / "first", tmp_path / "second"]
    keep(machines[0], made_up(16))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    ranks = [start(machine, RANK=str(rank), **together) for rank, machine in enumerate(machines)]
    outputs = []
    for rank in ranks:
        output, errors = rank.communicate()
        assert rank.returncode == 0, errors
        outputs.append(output)
    assert [tuned_by(output) for output in outputs] == [[48], [32]]
    first, second = (store.read(store.table_path(machine, "cpu", "adc_grad")) for machine in machines)
    assert first == second
    assert columns_in(machines[0]) == COLUMNS
    assert outputs[0].count("measured") == 3  # the first rank prints everything
    assert "measured" not in outputs[1]
