"""``TRITON_ANALOG_AUTOTUNE=1``: an operation tunes on first use, once, for all processes and ranks, and never fails for it."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from triton_analog import launch, ops, reference
from triton_analog.launch import Hardware, environment, hardware, lookup, store
from triton_analog.launch.fingerprint import code_hash, space_hash
from triton_analog.launch.lookup import choose
from triton_analog.launch.space import Problem, as_values
from triton_analog.launch.store import Entry, Table, TuningWarning
from triton_analog.tuning import autotune, measure
from triton_analog.tuning.autotune import settle
from triton_analog.tuning.measure import NothingRuns
from triton_analog.tuning.spaces import spaces

CPU = torch.device("cpu")
NOISE = spaces()["noise"]
SEED, STREAM = torch.tensor([3]), 1


def problem(rows: int = 16, columns: int = 16, on: Hardware | None = None) -> Problem:
    return Problem(on or hardware(CPU), torch.float32, (rows, columns))


FORMULA, TUNED, OTHER, _ = NOISE.candidates(problem())
"""Configurations of the 16 x 16 problem, which has four."""


def entry(of: Problem | None = None, config: Any = TUNED, *, origin: Any = "measured", **source: str | int) -> Entry:
    fresh = {"code": code_hash(NOISE), "space": space_hash(NOISE), "date": "2026-05-01T12:00:00+00:00"}
    return Entry(NOISE.key(of or problem()), as_values(config), origin, 1.0, 2.0, 0.0, fresh | source)


def keep(directory: Path, *entries: Entry, device: str = "cpu") -> Path:
    return store.add(directory, Table("noise", device, "cpu", entries or (entry(),)))


class Tuner:
    """In the place of measuring: knows the rows that it was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.seconds = 0.0
        self.fails: Exception | None = None

    def __call__(self, space, problem, device) -> Entry:
        self.asked.append(problem.sizes[0])
        time.sleep(self.seconds)
        if self.fails is not None:
            raise self.fails
        return entry(problem, date="2026-06-01T12:00:00+00:00")


@pytest.fixture
def tuner(monkeypatch) -> Tuner:
    tuner = Tuner()
    monkeypatch.setattr(autotune, "tune", tuner)
    return tuner


@pytest.fixture(autouse=True)
def places(places, monkeypatch):
    """The folders of the search, empty, of which the user's cache takes the results; tuning is on; a new process."""
    monkeypatch.delenv(environment.TUNING_DIR)
    monkeypatch.setenv(environment.AUTOTUNE, "1")
    start_anew()
    yield places
    start_anew()


def start_anew() -> None:
    """As if the process had just been started."""
    lookup.forget()
    autotune._found.clear()
    store._reported.clear()


def used(rows: int = 16) -> Any:
    """The configuration that an operation would be launched in."""
    return choose(NOISE, CPU, torch.float32, (rows, 16))


def kept(directory: Path) -> list[Entry]:
    table = store.read(store.table_path(directory, "cpu", "noise"))
    return [] if table is None else list(table.entries)


# ---- First use ----------------------------------------------------------------------------------------------------------


def test_the_first_use_measures_keeps_and_computes_what_it_would_have(device, places, monkeypatch, capfd):
    timed = []
    original = measure.microseconds
    monkeypatch.setattr(measure, "microseconds", lambda *given: timed.append(given) or original(*given))
    seed = SEED.to(device)
    with launch.backend("kernel"):
        first = ops.noise(seed, 16, 16, stream=STREAM)
        assert timed
        timed.clear()
        second = ops.noise(seed, 16, 16, stream=STREAM)
    assert not timed
    assert torch.equal(first, second)
    assert measure.agrees([first.cpu()], [reference.noise(SEED, 16, 16, stream=STREAM)])
    here = hardware(device)
    table = store.read(store.table_path(places.cache, here.name, "noise"))
    (found,) = table.entries
    assert found.key == NOISE.key(problem(on=here))
    assert found.origin == "measured"
    assert as_values(choose(NOISE, device, torch.float32, (16, 16))) == found.config
    assert capfd.readouterr().err == f"triton_analog: tuning noise for {found.key}\n"


@pytest.mark.parametrize("value", [None, "0", ""])
def test_without_the_switch_nothing_is_timed_said_or_kept(value, device, tmp_path, tuner, monkeypatch, capfd):
    if value is None:
        monkeypatch.delenv(environment.AUTOTUNE)
    else:
        monkeypatch.setenv(environment.AUTOTUNE, value)
    with launch.backend("kernel"):
        ops.noise(SEED.to(device), 16, 16, stream=STREAM)
    assert used() == FORMULA
    assert tuner.asked == []
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_later_uses_take_the_result(tuner):
    assert [used(), used(), used()] == [TUNED] * 3
    assert tuner.asked == [16]


def test_rows_up_to_the_same_power_of_two_are_tuned_once(tuner):
    used(16)
    for rows in (9, 12, 15):
        assert used(rows) is not None
    assert tuner.asked == [16]
    used(17)
    used(32)
    assert tuner.asked == [16, 17]


def test_results_go_to_the_users_folder_if_there_is_one(places, tuner, monkeypatch):
    monkeypatch.setenv(environment.TUNING_DIR, str(places.own))
    start_anew()
    assert used() == TUNED
    assert kept(places.own)
    assert not places.cache.exists()


def test_threads_that_meet_a_problem_at_once_tune_it_once(tuner):
    tuner.seconds = 0.2
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(used())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [TUNED] * 4
    assert tuner.asked == [16]


def test_nothing_is_tuned_while_a_graph_is_captured(tuner, monkeypatch):
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_available", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert used() == FORMULA
    assert tuner.asked == []
    assert used() == TUNED  # the next use outside of one does it


# ---- What is there already ----------------------------------------------------------------------------------------------


def test_the_next_process_takes_what_was_kept(places, tuner):
    used()
    start_anew()
    assert used() == TUNED
    assert tuner.asked == [16]


CHILD = """
import torch
from triton_analog import ops
from triton_analog.launch import backend

with backend("kernel"):
    for rows in (16, 32):
        ops.noise(torch.tensor([3], device="DEVICE"), rows, 16)
"""


def test_another_process_measures_nothing_where_this_one_did(device, places, monkeypatch, capfd):
    monkeypatch.setenv(environment.TUNING_DIR, str(places.own))
    start_anew()
    with launch.backend("kernel"):
        ops.noise(SEED.to(device), 16, 16, stream=STREAM)
    assert "tuning noise" in capfd.readouterr().err
    path = store.table_path(places.own, hardware(device).name, "noise")
    (before,) = store.read(path).entries
    subprocess.run([sys.executable, "-c", CHILD.replace("DEVICE", str(device))], check=True)
    first, second = store.read(path).entries
    assert first == before
    tuned = [line for line in capfd.readouterr().err.splitlines() if "tuning" in line]
    assert tuned == [f"triton_analog: tuning noise for {second.key}"]


@pytest.mark.parametrize("folder", ["own", "cache", "shipped"])
def test_a_measured_entry_is_taken_wherever_it_is(folder, places, tuner, monkeypatch):
    monkeypatch.setenv(environment.TUNING_DIR, str(places.own))
    keep(getattr(places, folder), entry(config=OTHER))
    start_anew()
    assert used() == OTHER
    assert tuner.asked == []


@pytest.mark.parametrize(
    ("there", "device"),
    [
        (entry(config=OTHER, origin="model"), "cpu"),
        (entry(problem(rows=32), OTHER), "cpu"),
        (entry(config=OTHER), "CPU of another kind"),
    ],
    ids=["a model's", "of a similar problem", "of another device"],
)
def test_an_entry_that_was_not_measured_for_this_very_problem_is_no_reason_not_to(there, device, places, tuner):
    keep(places.cache, there, device=device)
    assert used() == TUNED
    assert tuner.asked == [16]
    assert [one.config for one in kept(places.cache) if one.key == NOISE.key(problem())] == [as_values(TUNED)]


def test_an_entry_for_older_kernels_is_tuned_again_only_if_strictness_is_asked_for(places, tuner, monkeypatch):
    keep(places.cache, entry(config=OTHER, code="of an older kernel"))
    assert used() == OTHER
    assert tuner.asked == []
    monkeypatch.setenv(environment.STRICT_TUNING, "1")
    start_anew()
    assert used() == TUNED
    (found,) = kept(places.cache)
    assert found.config == as_values(TUNED)


# ---- Failures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [NothingRuns("nothing ran"), torch.OutOfMemoryError("too large"), RuntimeError("no graph")], ids=repr
)
def test_a_failure_is_one_warning_and_the_formulas_configuration(error, tmp_path, tuner):
    tuner.fails = error
    with pytest.warns(TuningWarning, match=f"noise was not tuned: {error}") as warned:
        configs = [used(rows) for rows in (16, 16, 15)]  # all have the same key
    assert configs == [FORMULA] * 3
    assert len(warned) == 1
    assert tuner.asked == [16]
    assert list(tmp_path.iterdir()) == []


def test_the_next_process_tries_again_what_failed(tuner):
    tuner.fails = NothingRuns("nothing ran")
    with pytest.warns(TuningWarning, match="nothing ran"):
        used()
    start_anew()
    tuner.fails = None
    assert used() == TUNED


def test_an_operation_computes_after_a_failure(device, tuner):
    tuner.fails = torch.OutOfMemoryError("too large")
    with launch.backend("kernel"), pytest.warns(TuningWarning, match="too large"):
        out = ops.noise(SEED.to(device), 16, 16, stream=STREAM)
    assert measure.agrees([out.cpu()], [reference.noise(SEED, 16, 16, stream=STREAM)])


def test_what_would_have_been_used_without_tuning_is_used_after_a_failure(places, tuner):
    keep(places.cache, entry(config=OTHER, origin="model"))
    tuner.fails = NothingRuns("nothing ran")
    with pytest.warns(TuningWarning):
        assert used() == OTHER


def test_a_disk_that_keeps_nothing_costs_a_warning_and_no_second_measurement(tuner, monkeypatch):
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(store, "_write", full)
    with pytest.warns(TuningWarning, match="configuration of noise was not kept: .*No space left") as warned:
        configs = [used(rows) for rows in (16, 16, 15)]  # all have the same key
    assert configs == [TUNED] * 3
    assert len(warned) == 1
    assert tuner.asked == [16]


# ---- Damage ---------------------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_kept_aside_and_replaced(places, tuner):
    path = keep(places.cache)
    path.write_text('{"format": 1, "op": "noi')
    with pytest.warns(TuningWarning, match=re.escape(str(path))):
        assert used() == TUNED
    assert path.with_name("noise.json.damaged").read_text() == '{"format": 1, "op": "noi'
    assert kept(places.cache) == [entry(date="2026-06-01T12:00:00+00:00")]
    start_anew()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert used() == TUNED
    assert tuner.asked == [16]


def test_damage_to_one_entry_leaves_the_others(places, tuner):
    path = keep(places.cache, entry(), entry(problem(rows=64), OTHER))
    document = json.loads(path.read_text())
    document["entries"][0]["spread"] = "wide"
    path.write_text(json.dumps(document))
    with pytest.warns(TuningWarning, match="entry 1: spread: got 'wide'"):
        assert used() == TUNED
    assert tuner.asked == [16]
    assert [one.config for one in kept(places.cache)] == [as_values(TUNED), as_values(OTHER)]


def test_an_entry_that_left_the_space_is_replaced(places, tuner):
    path = keep(places.cache)
    document = json.loads(path.read_text())
    document["entries"][0]["config"] = {"BLOCK_Q": 16}
    path.write_text(json.dumps(document))
    assert used() == TUNED
    start_anew()
    assert used() == TUNED
    assert tuner.asked == [16]


def test_a_newer_versions_file_is_left_as_it_is(places, tuner):
    path = keep(places.cache)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": store.FORMAT + 1}))
    before = path.read_bytes()
    with pytest.warns(TuningWarning, match="was not kept"), pytest.warns(TuningWarning, match="Defaults are used"):
        assert used() == TUNED
    assert path.read_bytes() == before


# ---- Ranks ----------------------------------------------------------------------------------------------------------------

RANKS = 2
BY_FIRST, BY_SECOND, AT_ONCE, IN_THREADS, KNOWN, OVERRULED, FAILING, OWN_KIND = (16 * 2**i for i in range(8))
"""Problems by their numbers of rows."""


def tuned_by(rank: int, rows: int) -> dict[str, int | bool]:
    """Each rank finds something else; none of it is the formula's."""
    return as_values(NOISE.candidates(problem(rows))[1 + rank])


def kept_by_second(rows: int) -> dict[str, int | bool]:
    return as_values(NOISE.candidates(problem(rows))[3])


def one_rank(rank: int, port: int, folder: Path) -> None:
    """Meets the problems in an order that is settled by barriers, and writes down what it used and was asked to tune."""
    own = folder / f"machine {rank}"
    os.environ |= {environment.AUTOTUNE: "1", environment.TUNING_DIR: str(own), "XDG_CACHE_HOME": str(folder / "cache")}
    if rank == 1:
        for rows in (KNOWN, OVERRULED):
            keep(own, entry(problem(rows), NOISE.candidates(problem(rows))[3]))
    asked: list[int] = []

    def tune(space, problem, device) -> Entry:
        rows = problem.sizes[0]
        asked.append(rows)
        time.sleep(0.3)
        if rows == FAILING:
            raise RuntimeError("no memory")
        return entry(problem, NOISE.candidates(problem)[1 + rank])

    autotune.tune = tune
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)

    def meet(rows: int, first: int) -> dict[str, int | bool]:
        if rank != first:
            dist.barrier()
        config = used(rows)
        if rank == first:
            dist.barrier()
        return as_values(config)

    results: dict[int, Any] = {}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for rows, first in ((BY_FIRST, 0), (BY_SECOND, 1), (KNOWN, 1), (OVERRULED, 0), (FAILING, 0)):
            results[rows] = meet(rows, first)
        dist.barrier()
        results[AT_ONCE] = as_values(used(AT_ONCE))

        on = problem(OWN_KIND, on=Hardware(f"kind {rank}", "cpu", 0))
        results[OWN_KIND] = as_values(settle(NOISE, on, CPU, NOISE.formula(on), measured=False))

        dist.barrier()
        results[IN_THREADS] = []
        work = [lambda: results[IN_THREADS].append(as_values(used(IN_THREADS)))] * 2
        threads = [threading.Thread(target=each, daemon=True) for each in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    failures = [str(one.message) for one in warned if issubclass(one.category, TuningWarning)]
    text = json.dumps({"asked": asked, "used": results, "failures": failures})
    (folder / f"{rank}.json").write_text(text)
    if any(thread.is_alive() for thread in threads):
        os._exit(0)  # the test says what is missing
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[SimpleNamespace]:
    """What each of two processes tuned and used, which share no disk."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_rank, (port, folder), nprocs=RANKS)
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]
    return [SimpleNamespace(**one | {"used": {int(k): v for k, v in one["used"].items()}}) for one in found]


def askers(ranks: list[SimpleNamespace], rows: int) -> list[int]:
    """The ranks that tuned a problem, each as often as it did."""
    return [rank for rank, one in enumerate(ranks) for asked in one.asked if asked == rows]


@pytest.mark.parametrize(("rows", "first"), [(BY_FIRST, 0), (BY_SECOND, 1)])
def test_the_first_rank_to_meet_a_problem_decides_for_all(rows, first, ranks):
    assert askers(ranks, rows) == [first]
    assert [one.used[rows] for one in ranks] == [tuned_by(first, rows)] * RANKS


def test_ranks_that_meet_a_problem_at_once_agree(ranks):
    (first,) = askers(ranks, AT_ONCE)
    assert [one.used[AT_ONCE] for one in ranks] == [tuned_by(first, AT_ONCE)] * RANKS


def test_threads_of_ranks_agree_and_do_not_block_each_other(ranks):
    (first,) = askers(ranks, IN_THREADS)
    assert [one.used[IN_THREADS] for one in ranks] == [[tuned_by(first, IN_THREADS)] * 2] * RANKS


def test_an_entry_of_the_first_rank_is_used_by_all_and_nothing_is_tuned(ranks):
    assert askers(ranks, KNOWN) == []
    assert [one.used[KNOWN] for one in ranks] == [kept_by_second(KNOWN)] * RANKS


def test_a_rank_with_an_entry_follows_one_that_came_before_it(ranks):
    assert askers(ranks, OVERRULED) == [0]
    assert [one.used[OVERRULED] for one in ranks] == [tuned_by(0, OVERRULED)] * RANKS


def test_a_failure_is_not_repeated_by_the_other_ranks(ranks):
    """Nor do they use anything else: the second one has entries of similar problems, which it would use on its own."""
    assert askers(ranks, FAILING) == [0]
    formula = as_values(NOISE.formula(problem(FAILING)))
    assert [one.used[FAILING] for one in ranks] == [formula] * RANKS
    assert [one.failures for one in ranks] == [["noise was not tuned: no memory"], []]


def test_ranks_on_other_gpus_tune_for_themselves(ranks):
    assert askers(ranks, OWN_KIND) == [0, 1]
    assert [one.used[OWN_KIND] for one in ranks] == [tuned_by(rank, OWN_KIND) for rank in range(RANKS)]
