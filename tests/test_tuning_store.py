"""The files of tuning results: what is in them, who wins, many writers at once, and damage of every kind."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import signal
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_analog.launch import store
from triton_analog.launch.store import Entry, Key, NewerFormatError, Table, TuningWarning

H200 = "NVIDIA H200"

STALE = "a process was killed while it wrote this"


def key(**sizes: int) -> Key:
    return Key("bfloat16", tuple((sizes or {"rows": 8192, "columns": 4096}).items()), ("noise", "adc"))


def entry(of: Key | None = None, **changes: Any) -> Entry:
    fields: dict[str, Any] = {
        "key": of or key(),
        "config": {"block_m": 128, "block_n": 64, "warps": 4, "persistent": True},
        "origin": "measured",
        "microseconds": 412.5,
        "formula_microseconds": 430.25,
        "spread": 0.012,
        "source": {"triton": "3.9.0", "multiprocessors": 132, "date": "2026-05-01T12:00:00Z"},
    }
    return Entry(**fields | changes)


def table(*entries: Entry, op: str = "matmul", device: str = H200, target: str = "sm_90") -> Table:
    return Table(op, device, target, entries or (entry(),))


def written(directory: Path, change: Any = None) -> Path:
    """A file of one table, its JSON changed by ``change`` behind the store's back."""
    path = store.add(directory, table())
    document = json.loads(path.read_text())
    if change is not None:
        change(document)
        path.write_text(json.dumps(document))
    return path


def the_warning(path: Path) -> str:
    """Of the first read of a damaged file, which has to be the only one and to say what to do."""
    with pytest.warns(TuningWarning) as caught:
        store.read(path)
    (warning,) = caught
    message = str(warning.message)
    assert message.startswith(f"{path}: ")
    assert "Defaults are used instead" in message
    assert "python -m triton_analog.tuning sweep" in message
    assert warning.filename == __file__
    return message


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- Contents -------------------------------------------------------------------------------------------------------

names = st.text(min_size=1, max_size=8)
keys = st.builds(
    Key,
    dtype=names,
    sizes=st.dictionaries(
        names.filter(lambda name: name not in ("dtype", "flags")), st.integers(0, 2**40), max_size=4
    ).map(lambda sizes: tuple(sizes.items())),
    flags=st.sets(names, max_size=3).map(tuple),
)
times = st.floats(1e-3, 1e9).map(lambda time: float(f"{time:.5g}"))
entries = st.builds(
    Entry,
    key=keys,
    config=st.dictionaries(names, st.integers(-(2**40), 2**40) | st.booleans(), max_size=5),
    origin=st.sampled_from(["measured", "model"]),
    microseconds=times,
    formula_microseconds=times,
    spread=times | st.just(0.0),
    source=st.dictionaries(names, st.text(max_size=8) | st.integers(-(2**40), 2**40), max_size=5),
)


@given(
    some=st.lists(entries, max_size=4, unique_by=lambda entry: entry.key),
    device=names.filter(lambda name: name.strip(".")),
)
def test_what_is_written_is_read_back(tmp_path_factory, some, device):
    directory = tmp_path_factory.mktemp("cache")
    expected = Table("dac", device, "gfx942", tuple(some))
    path = store.add(directory, expected)
    actual = store.read(path)
    assert actual == expected
    assert store.problems(path) == []
    for one, other in zip(actual.entries, expected.entries, strict=True):  # True == 1, yet they configure differently
        assert list(map(repr, one.config.items())) == list(map(repr, other.config.items()))


def test_a_file_is_readable_and_differs_little_when_an_entry_is_added(tmp_path):
    path = store.add(tmp_path, table())
    assert path.read_text() == (
        """{
 "format": 1,
 "op": "matmul",
 "device": "NVIDIA H200",
 "target": "sm_90",
 "entries": [
  {
   "key": {"dtype": "bfloat16", "columns": 4096, "rows": 8192, "flags": ["adc", "noise"]},
   "config": {"block_m": 128, "block_n": 64, "warps": 4, "persistent": true},
   "origin": "measured",
   "microseconds": 412.5,
   "formula_microseconds": 430.25,
   "spread": 0.012,
   "source": {"triton": "3.9.0", "multiprocessors": 132, "date": "2026-05-01T12:00:00Z"}
  }
 ]
}
"""
    )
    before = path.read_text().splitlines()
    store.add(tmp_path, table(entry(key(rows=16, columns=1))))
    after = path.read_text().splitlines()
    assert [line for line in before if line not in after] == []


def test_numbers_are_rounded_to_what_a_timing_can_tell(tmp_path):
    path = store.add(tmp_path, table(entry(microseconds=412.123456789, formula_microseconds=10 / 3, spread=1 / 300)))
    (actual,) = store.read(path).entries
    assert (actual.microseconds, actual.formula_microseconds, actual.spread) == (412.12, 3.3333, 0.0033333)


def test_keys_are_equal_however_their_sizes_and_flags_are_ordered():
    one = Key("float16", (("rows", 1), ("columns", 2)), ("noise", "adc"))
    other = Key("float16", (("columns", 2), ("rows", 1)), ("adc", "noise"))
    assert one == other
    assert hash(one) == hash(other)


def test_entries_are_in_the_order_of_their_keys_whoever_came_first():
    small, large = entry(key(rows=16)), entry(key(rows=4096))
    assert table(large, small).entries == table(small, large).entries == (small, large)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", {"block_m": 64.0}),
        ("config", {"block_m": "64"}),
        ("config", {"block_m": None}),
        ("config", {"block_m": [64]}),
        ("config", [64]),
        ("config", {"": 64}),
        ("origin", "guessed"),
        ("origin", ["model"]),
        ("microseconds", math.nan),
        ("microseconds", math.inf),
        ("microseconds", 0.0),
        ("microseconds", -1.0),
        ("microseconds", 10**400),
        ("microseconds", True),
        ("microseconds", "412"),
        ("formula_microseconds", math.nan),
        ("formula_microseconds", None),
        ("spread", math.nan),
        ("spread", math.inf),
        ("spread", -0.1),
        ("source", {"triton": 3.9}),
        ("source", {"triton": True}),
        ("source", "by hand"),
        ("key", {"dtype": "bfloat16", "rows": 1.0, "flags": []}),
        ("key", {"dtype": "bfloat16", "rows": True, "flags": []}),
        ("key", {"dtype": "bfloat16", "rows": -1, "flags": []}),
        ("key", {"dtype": "bfloat16", "rows": 1, "flags": "adc"}),
        ("key", {"dtype": "bfloat16", "rows": 1, "flags": [1]}),
        ("key", {"dtype": "bfloat16", "rows": 1, "flags": ["adc", "adc"]}),
        ("key", {"dtype": "bfloat16", "rows": 1}),
        ("key", {"dtype": 16, "flags": []}),
        ("key", ["bfloat16"]),
    ],
)
def test_an_entry_with_a_wrong_value_is_skipped_and_the_others_are_kept(tmp_path, name, value):
    path = store.add(tmp_path, table(entry(key(rows=1)), entry(key(rows=2)), entry(key(rows=3))))
    document = json.loads(path.read_text())
    document["entries"][1][name] = value
    path.write_text(json.dumps(document))
    assert "entry 2: " in the_warning(path)
    assert store.read(path) == table(entry(key(rows=1)), entry(key(rows=3)))
    assert len(store.problems(path)) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries[1].pop("spread"),
        lambda entries: entries[1].update(comment="faster on Tuesdays"),
        lambda entries: entries.__setitem__(1, None),
        lambda entries: entries.__setitem__(1, dict(entries[0], microseconds=1.0)),
    ],
    ids=["a part is missing", "an unknown part", "not an object", "a key that is there already"],
)
def test_an_entry_of_a_wrong_form_is_skipped_and_the_others_are_kept(tmp_path, change):
    path = store.add(tmp_path, table(entry(key(rows=1)), entry(key(rows=2)), entry(key(rows=3))))
    document = json.loads(path.read_text())
    change(document["entries"])
    path.write_text(json.dumps(document))
    assert "entry 2: " in the_warning(path)
    assert store.read(path) == table(entry(key(rows=1)), entry(key(rows=3)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Key("", (), ()),
        lambda: Key("float16", (("rows", 1), ("rows", 2)), ()),
        lambda: Key("float16", (("flags", 1),), ()),
        lambda: entry(config={"block_m": 0.5}),
        lambda: entry(microseconds=math.nan),
        lambda: table(entry(), entry()),
        lambda: table(device=""),
    ],
    ids=["no dtype", "a size twice", "a size that is no size", "a config", "a time", "a key twice", "no device"],
)
def test_what_could_not_be_read_back_cannot_be_made(make):
    with pytest.raises(ValueError, match=r"got .*; allowed: "):
        make()


# ---- Places ---------------------------------------------------------------------------------------------------------


def test_a_table_lies_in_a_folder_that_shows_its_gpu(tmp_path):
    assert store.table_path(tmp_path, H200, "matmul") == tmp_path / "NVIDIA_H200" / "matmul.json"


def test_names_that_contain_or_resemble_each_other_have_folders_of_their_own(tmp_path):
    devices = ["NVIDIA A40", "NVIDIA A4000", "A40", "NVIDIA_A40", "NVIDIA%5FA40", "NVIDIA/A40", "NVIDIA  A40", "a/../b"]
    for device in devices:
        store.add(tmp_path, table(device=device))
    assert len(names_in(tmp_path)) == len(devices)
    for device in devices:
        assert store.read(store.table_path(tmp_path, device, "matmul")) == table(device=device)


def test_a_file_system_that_ignores_case_mixes_no_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "table_path", lambda directory, device, op: directory / device.lower() / f"{op}.json")
    path = store.add(tmp_path, table(device="NVIDIA L4"))
    with pytest.raises(ValueError, match="'NVIDIA L4', 'Nvidia l4'"):
        store.add(tmp_path, table(device="Nvidia l4"))
    assert store.read(path).device == "NVIDIA L4"


@pytest.mark.parametrize(("device", "op"), [("", "dac"), ("..", "dac"), (H200, ""), (H200, "../dac"), (H200, "a b")])
def test_names_that_could_leave_the_folder_are_refused(tmp_path, device, op):
    with pytest.raises(ValueError, match=r"got .*; allowed: "):
        store.table_path(tmp_path, device, op)


def test_the_users_folders_come_before_what_is_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "user_cache_path", lambda name: tmp_path / name)
    cache, shipped = tmp_path / "triton_analog" / "tuning", store.shipped_directory()
    assert store.search_path("/data/tuning") == (Path("/data/tuning"), cache, shipped)
    assert store.search_path("~/tuning")[0] == Path.home() / "tuning"
    assert store.search_path(None) == store.search_path("") == (cache, shipped)


def test_shipped_tables_are_in_the_package_or_beside_it_in_a_checkout(tmp_path, monkeypatch):
    package = tmp_path / "triton_analog"
    monkeypatch.setattr(store, "__file__", str(package / "launch" / "store.py"))
    assert store.shipped_directory() == tmp_path / "tuning_cache"
    (package / "tuning_cache").mkdir(parents=True)
    assert store.shipped_directory() == package / "tuning_cache"


# ---- Merging --------------------------------------------------------------------------------------------------------

OLD, NEW = {"date": "2026-04-30T23:59:59Z"}, {"date": "2026-05-01T00:00:00Z"}


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        ({"origin": "measured", "source": OLD}, {"origin": "model", "source": NEW}, "first"),
        ({"origin": "model", "source": NEW}, {"origin": "measured", "source": OLD}, "second"),
        ({"source": NEW}, {"source": OLD}, "first"),
        ({"source": OLD}, {"source": NEW}, "second"),
        ({"origin": "model", "source": NEW}, {"origin": "model", "source": OLD}, "first"),
        ({"source": NEW}, {"source": NEW}, "second"),
        ({"source": NEW}, {"source": {}}, "first"),
        ({"source": {}}, {"source": {}}, "second"),
    ],
)
def test_the_measured_then_the_newer_then_the_second_entry_wins(first, second, winner):
    one, other = entry(microseconds=1.0, **first), entry(microseconds=2.0, **second)
    (actual,) = store.merge(table(one), table(other)).entries
    assert actual == (one if winner == "first" else other)


def test_a_merge_has_the_entries_of_both():
    a, b, c = (entry(key(rows=rows)) for rows in (1, 2, 3))
    assert store.merge(table(c, a), table(b, a)) == table(a, b, c)


@pytest.mark.parametrize("other", [{"op": "dac"}, {"device": "NVIDIA H100"}, {"target": "sm_100"}])
def test_only_tables_of_one_operation_and_gpu_merge(other):
    with pytest.raises(ValueError, match=f"{next(iter(other))}: got .*{next(iter(other.values()))}"):
        store.merge(table(), table(**other))


# ---- Damage ---------------------------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_no_reason_to_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.read(tmp_path / "matmul.json") is None
    assert store.problems(tmp_path / "matmul.json") == []


def test_a_file_cut_anywhere_is_told_from_a_whole_one(tmp_path):
    whole = store.add(tmp_path, table()).read_bytes()
    path = tmp_path / "cut.json"
    for length in range(len(whole) - 1):  # all but the last newline
        path.write_bytes(whole[:length])
        (finding,) = store.problems(path)
        assert finding.startswith("not JSON in UTF-8")
    assert the_warning(path)
    assert store.read(path) is None


@pytest.mark.parametrize(
    ("data", "finding"),
    [
        (b"", "not JSON"),
        (b"\0" * 4096, "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"9" * 5000, "not JSON"),
        (b"\xff\xfe\x00garbage", "not JSON in UTF-8"),
        ('{"format": 1}'.encode("utf-16"), "not JSON in UTF-8"),
        (b"<<<<<<< HEAD\n{}\n=======\n{}\n>>>>>>> mine\n", "not JSON"),
        (b"null", "file: got None"),
        (b"[]", "file: got []"),
        (b'"format"', "file: got 'format'"),
        (b"{}", "format: got None; allowed: 1"),
        (b'{"format": 0}', "format: got 0; allowed: 1"),
        (b'{"format": true}', "format: got True; allowed: 1"),
        (b'{"format": "1"}', "format: got '1'; allowed: 1"),
        (b'{"format": 1, "op": "matmul"}', "file: got ['format', 'op']; allowed: format, op, device"),
        (b'{"format": 2, "tables": {}}', "format 2 is newer than this version's 1; upgrade"),
    ],
)
def test_a_file_of_something_else_is_not_used(tmp_path, data, finding):
    path = tmp_path / "matmul.json"
    path.write_bytes(data)
    assert finding in the_warning(path)
    assert store.read(path) is None
    assert len(store.problems(path)) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.update(op=3),
        lambda document: document.update(device=None),
        lambda document: document.update(target=["sm_90"]),
        lambda document: document.update(entries={}),
        lambda document: document.update(comment="by hand"),
        lambda document: document.pop("device"),
    ],
    ids=["op", "device", "target", "entries", "a name too many", "a name too few"],
)
def test_a_file_of_a_wrong_form_is_not_used(tmp_path, change):
    path = written(tmp_path, change)
    assert the_warning(path)
    assert store.read(path) is None


def test_a_folder_in_the_files_place_is_not_used(tmp_path):
    path = tmp_path / "matmul.json"
    path.mkdir()
    assert "Is a directory" in the_warning(path)
    assert store.read(path) is None
    beyond_a_file = written(tmp_path) / "NVIDIA_H200" / "matmul.json"
    assert "Not a directory" in the_warning(beyond_a_file)


def test_a_file_that_may_not_be_read_is_not_used(tmp_path, monkeypatch):
    path = written(tmp_path)
    with monkeypatch.context() as patch:  # by hand, since permissions do not bind root
        patch.setattr(Path, "read_bytes", fail(REFUSED))
        assert "Permission denied" in the_warning(path)
        assert store.read(path) is None
        with pytest.raises(PermissionError):
            store.add(tmp_path, table())
    assert store.read(path) == table()


def test_a_damaged_file_is_reported_once_for_its_path(tmp_path, monkeypatch):
    first, second = tmp_path / "dac.json", tmp_path / "adc.json"
    for path in (first, second):
        path.write_text("{")
        assert the_warning(path)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in (first, Path("dac.json"), second):
            assert store.read(path) is None
    assert len(store.problems(first)) == 1


def test_a_report_of_many_damaged_entries_stays_short(tmp_path):
    path = written(tmp_path, lambda document: document.update(entries=[None] * 1000))
    assert "entry 3: " in (message := the_warning(path))
    assert "and 997 more" in message
    assert "entry 4: " not in message
    assert len(store.problems(path)) == 1000


@pytest.mark.parametrize(
    ("damage", "survivors"),
    [
        (lambda whole: whole[: len(whole) // 2], []),
        (lambda whole: whole.replace(b'"rows": 1,', b'"rows": "one",'), [2]),
        (lambda whole: whole.replace(b'"format": 1', b'"format": 0'), []),
    ],
    ids=["cut in half", "one entry", "older format"],
)
def test_a_damaged_file_is_kept_beside_the_one_that_replaces_it(tmp_path, damage, survivors):
    path = store.add(tmp_path, table(entry(key(rows=1)), entry(key(rows=2))))
    damaged = damage(path.read_bytes())
    for name in ("matmul.json.damaged", "matmul.json.damaged.2"):
        path.write_bytes(damaged)
        with pytest.warns(TuningWarning, match=f"was kept as {name} "):
            assert store.add(tmp_path, table(entry(key(rows=3)))) == path
        assert path.with_name(name).read_bytes() == damaged
        assert store.read(path) == table(*(entry(key(rows=rows)) for rows in (*survivors, 3)))
    assert store.problems(path) == []


def test_a_file_of_a_newer_version_is_never_replaced(tmp_path):
    path = written(tmp_path, lambda document: document.update(format=2, tables=document.pop("entries")))
    before = path.read_bytes()
    with pytest.raises(NewerFormatError, match=rf"{path}: format 2 .*upgrade.*nothing was written"):
        store.add(tmp_path, table())
    assert path.read_bytes() == before
    assert names_in(path.parent) == {path.name, ".matmul.json.lock"}


# ---- Failures while writing -----------------------------------------------------------------------------------------


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
REFUSED = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
INTERRUPT = KeyboardInterrupt()


def fail(error: BaseException) -> Callable[..., NoReturn]:
    def function(*args: Any) -> NoReturn:
        raise error

    return function


@contextmanager
def cut_off(path: Path, mode: str) -> Iterator[Any]:
    """A file of which only half gets to the disk."""
    with open(path, mode) as file:

        def write(data: bytes) -> NoReturn:
            file.write(data[: len(data) // 2])
            file.flush()
            raise FULL

        yield SimpleNamespace(write=write)


@pytest.mark.parametrize(
    ("where", "name", "fault", "error"),
    [
        (store, "open", fail(REFUSED), REFUSED),
        (store, "open", cut_off, FULL),
        (os, "fsync", fail(FULL), FULL),
        (os, "replace", fail(FULL), FULL),
        (os, "fsync", fail(INTERRUPT), INTERRUPT),
        (os, "replace", fail(INTERRUPT), INTERRUPT),
    ],
    ids=[
        "read-only",
        "half written",
        "not on the disk",
        "not renamed",
        "Ctrl-C while writing",
        "Ctrl-C before renaming",
    ],
)
@pytest.mark.parametrize("there", [True, False], ids=["with a file", "without a file"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where, name, fault, error, there):
    path = store.table_path(tmp_path, H200, "matmul")
    if there:
        store.add(tmp_path, table())
    with monkeypatch.context() as patch:
        patch.setattr(where, name, fault, raising=False)
        with pytest.raises(type(error)) as caught:
            store.add(tmp_path, table(entry(key(rows=1))))
    assert caught.value is error
    assert store.read(path) == (table() if there else None)
    assert names_in(path.parent) == {".matmul.json.lock"} | ({path.name} if there else set())
    store.add(tmp_path, table(entry(key(rows=1))))
    assert len(store.read(path).entries) == (2 if there else 1)


def test_a_full_disk_does_not_cost_the_damaged_file(tmp_path, monkeypatch):
    path = store.add(tmp_path, table())
    path.write_text("damaged")
    monkeypatch.setattr(os, "fsync", fail(FULL))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        store.add(tmp_path, table())
    assert path.read_text() == "damaged"
    assert names_in(path.parent) == {path.name, ".matmul.json.lock"}


def test_a_file_system_that_cannot_sync_folders_is_no_reason_to_fail(tmp_path, monkeypatch):
    def only_files(descriptor: int, sync: Any = os.fsync) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    assert store.read(store.add(tmp_path, table())) == table()


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root; 'read-only' above stands in for this")
def test_a_read_only_folder_keeps_its_file(tmp_path):
    path = store.add(tmp_path, table())
    path.parent.chmod(0o555)
    with pytest.raises(PermissionError):
        store.add(tmp_path, table(entry(key(rows=1))))
    path.parent.chmod(0o755)
    assert store.read(path) == table()
    assert names_in(path.parent) == {path.name, ".matmul.json.lock"}


def test_a_new_file_may_be_shared_as_far_as_the_users_mask_allows(tmp_path):
    mask = os.umask(0o027)
    try:
        path = store.add(tmp_path, table())
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750


def test_what_killed_processes_left_is_never_read_and_goes_with_the_next_write(tmp_path):
    path = store.add(tmp_path, table())
    path.with_name(".matmul.json.tmp").write_text(STALE)
    path.with_name(".matmul.json.lock").write_text(STALE)
    assert store.read(path) == table()
    assert store.problems(path) == []
    store.add(tmp_path, table(entry(key(rows=1))))
    assert len(store.read(path).entries) == 2
    assert names_in(path.parent) == {path.name, ".matmul.json.lock"}


# ---- Many processes -------------------------------------------------------------------------------------------------

LOAD = f"""
import importlib.util, os, resource, signal, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("store", {store.__file__!r})
store = sys.modules["store"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(store)
assert not {{"torch", "triton"}} & sys.modules.keys()

def table(rows):
    key = store.Key("bfloat16", (("rows", rows),), ())
    entry = store.Entry(key, {{"block_m": 128}}, "measured", 1.0, 1.0, 0.0, {{"date": "2026-05-01"}})
    return store.Table("matmul", {H200!r}, "sm_90", (entry,))

directory = Path(sys.argv[1])
"""
"""The store by itself, without the package, whose other modules import torch."""


def child(script: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-B", "-c", LOAD + script, *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def rows_in(path: Path) -> list[int]:
    actual = store.read(path)
    return [] if actual is None else [size for entry in actual.entries for _, size in entry.key.sizes]


ADD_SEVERAL = """
print("ready", flush=True)
input()
for rows in range(100 * int(sys.argv[2]), 100 * int(sys.argv[2]) + 6):
    store.add(directory, table(rows))
"""


@pytest.mark.parametrize("writers", [2, 8])
def test_processes_that_write_at_once_lose_no_entry(tmp_path, writers):
    path = store.table_path(tmp_path, H200, "matmul")
    children = [child(ADD_SEVERAL, tmp_path, number) for number in range(writers)]
    for one in children:
        assert one.stdout.readline() == "ready\n"
    for one in children:
        one.stdin.write("go\n")
        one.stdin.flush()
    seen = 0
    while any(one.poll() is None for one in children):  # a reader meanwhile finds whole files that only grow
        assert store.problems(path) == []
        found = len(rows_in(path))
        assert found >= seen
        seen = found
    for one in children:
        assert (one.communicate(), one.returncode) == (("", ""), 0)
    assert rows_in(path) == [100 * number + step for number, step in itertools.product(range(writers), range(6))]
    assert names_in(path.parent) == {path.name, ".matmul.json.lock"}


KILLED = {
    "in the middle of the data": """
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
""",
    "before the data is on the disk": "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)",
    "before the file is renamed": "os.replace = lambda one, other: os.kill(os.getpid(), signal.SIGKILL)",
    "after the file is renamed": """
def rename_and_die(one, other):
    os.rename(one, other)
    os.kill(os.getpid(), signal.SIGKILL)

os.replace = rename_and_die
""",
}


@pytest.mark.parametrize("when", KILLED)
def test_a_process_killed_while_it_writes_leaves_a_whole_file(tmp_path, when):
    path = store.add(tmp_path, table(entry(key(rows=1))))
    one = child(KILLED[when] + "\nstore.add(directory, table(2))", tmp_path)
    _, errors = one.communicate()
    assert one.returncode in (-signal.SIGKILL, -signal.SIGXFSZ), errors
    assert store.problems(path) == []
    assert rows_in(path) == ([1, 2] if when.startswith("after") else [1])
    assert path.with_name(".matmul.json.tmp").exists() is not when.startswith("after")

    store.add(tmp_path, table(entry(key(rows=3))))  # neither the lock nor the temporary file is in the way
    assert rows_in(path) == ([1, 2, 3] if when.startswith("after") else [1, 3])
    assert names_in(path.parent) == {path.name, ".matmul.json.lock"}


def test_a_limit_on_the_files_size_is_an_error_that_leaves_the_old_file(tmp_path):
    path = store.add(tmp_path, table(entry(key(rows=1))))
    one = child("resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))\nstore.add(directory, table(2))", tmp_path)
    _, errors = one.communicate()
    assert one.returncode == 1
    assert os.strerror(errno.EFBIG) in errors
    assert rows_in(path) == [1]
    assert names_in(path.parent) == {path.name, ".matmul.json.lock"}


def test_a_lock_that_stays_held_is_an_error_that_names_it(tmp_path, monkeypatch):
    path = store.add(tmp_path, table())
    lock = path.with_name(".matmul.json.lock")
    holder = child("with store.FileLock(sys.argv[2]):\n    print('ready', flush=True)\n    input()", tmp_path, lock)
    assert holder.stdout.readline() == "ready\n"
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.1)
    with pytest.raises(TimeoutError, match=rf"{lock}: locked by other processes for 0.1 s; nothing was written"):
        store.add(tmp_path, table(entry(key(rows=1))))
    assert store.read(path) == table()
    holder.communicate("go\n")
    store.add(tmp_path, table(entry(key(rows=1))))
    assert len(store.read(path).entries) == 2
