"""Which configuration is used: levels, order of folders, reach, damage, switches, and what a lookup does not do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget

from triton_analog import launch, ops, reference
from triton_analog.launch import Hardware, environment, lookup, store
from triton_analog.launch.fingerprint import code_hash, space_hash
from triton_analog.launch.lookup import REACH, choose, distance, explain
from triton_analog.launch.space import Problem, Space, as_values, forced
from triton_analog.launch.store import Entry, Key, Table, TuningWarning
from triton_analog.ops.adc import AdcConfig
from triton_analog.ops.dac import DacConfig
from triton_analog.ops.matmul import MatmulConfig
from triton_analog.tuning import autotune
from triton_analog.tuning.inspect import specializations
from triton_analog.tuning.processes import run_in_processes
from triton_analog.tuning.spaces import spaces

H200 = Hardware("NVIDIA H200", "sm_90", 90)
H100 = "NVIDIA H100 80GB HBM3"
HOPPER = GPUTarget("cuda", 90, 32)
CPU = torch.device("cpu")

DAC = spaces()["dac"]
ONE, TWO, THREE, FOUR = (DacConfig(rows, 256) for rows in (4, 8, 16, 32))
"""Configurations of every problem here. None is the formula's."""


pytestmark = pytest.mark.usefixtures("places")


def problem(rows: int = 4096, width: int = 512, hardware: Hardware = H200, **changes: Any) -> Problem:
    return Problem(hardware, torch.bfloat16, (rows, width), (False,))._replace(**changes)


FRESH: dict[str, str | int] = {"code": code_hash(DAC), "space": space_hash(DAC)}


def keep(
    directory: Path,
    config: Any,
    rows: int = 4096,
    width: int = 512,
    device: str = H200.name,
    target: str = H200.target,
    *,
    origin: Any = "measured",
    source: dict[str, str | int] = FRESH,
    **changes: Any,
) -> Path:
    """Put an entry of the input converter where it is looked for."""
    values = config if isinstance(config, dict) else as_values(config)
    key = DAC.key(problem(rows, width, **changes))
    entry = Entry(key, values, origin, 1.0, 2.0, 0.0, source)
    lookup.forget()
    return store.add(directory, Table("dac", device, target, (entry,)))


def used(of: Problem | None = None) -> Any:
    """The configuration of a problem."""
    return explain(DAC, of or problem()).config


def fail(*args: Any, **options: Any) -> NoReturn:
    raise AssertionError("this should not have been called")


# ---- Levels ---------------------------------------------------------------------------------------------------------


def test_an_entry_is_used_before_a_near_one_a_relatives_and_the_formula(places):
    def found() -> tuple[str, Any, Path | None]:
        choice = explain(DAC, problem())
        assert (choice.entry is None) == (choice.level == "formula")
        return choice.level, choice.config, choice.path

    assert found() == ("formula", DAC.formula(problem()), None)
    relatives = keep(places.own, ONE, device=H100)
    assert found() == ("same architecture", ONE, relatives)
    path = keep(places.own, TWO, rows=16384)
    assert found() == ("nearest", TWO, path)
    keep(places.own, THREE, rows=4096)
    assert found() == ("exact", THREE, path)


def test_this_gpus_entries_are_used_before_nearer_ones_of_a_relative(places):
    keep(places.own, ONE, device=H100)
    keep(places.own, TWO, rows=1024)
    assert explain(DAC, problem()).level == "nearest"
    assert used() == TWO


def test_the_nearest_of_a_relatives_entries_is_used(places):
    keep(places.own, ONE, rows=16384, device=H100)
    keep(places.own, TWO, rows=8192, device="NVIDIA GH200 480GB")
    assert used() == TWO


def test_an_entry_is_exact_for_all_rows_up_to_a_power_of_two(places):
    keep(places.own, ONE, rows=4096)
    assert [explain(DAC, problem(rows)).level for rows in (2048, 2049, 4095, 4096, 4097)] == [
        "nearest", "exact", "exact", "exact", "nearest",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "width", "reached"),
    [
        (1024, 512, True),
        (513, 512, True),
        (512, 512, False),
        (16384, 512, True),
        (16385, 512, False),
        (4096, 2048, True),
        (4096, 2049, False),
        (8192, 1024, True),
        (16384, 513, False),
        (4096, 300, True),
        (2048, 1024, True),
        (1024, 1024, False),
    ],
)
def test_an_entry_reaches_two_powers_of_two_in_all_sizes_together(rows, width, reached, places):
    assert REACH == 2
    keep(places.own, ONE)
    assert explain(DAC, problem(rows, width)).level == ("nearest" if reached else "formula")


def test_the_nearest_entry_is_used(places):
    for config, rows, width in [(ONE, 1024, 512), (TWO, 4096, 1024), (THREE, 4096, 500), (FOUR, 2048, 512)]:
        keep(places.own, config, rows, width)
    assert used() == THREE
    assert used(problem(1024, 512)) == ONE
    assert used(problem(2000, 500)) == FOUR
    assert used(problem(8192, 1024)) == TWO


sizes = st.integers(0, 2**20)


@given(first=st.tuples(sizes, sizes), second=st.tuples(sizes, sizes))
def test_distances_are_symmetric_and_zero_between_equal_keys_only(first, second):
    one, other = (Key("float16", (("rows", a), ("width", b)), ()) for a, b in (first, second))
    assert distance(one, other) == pytest.approx(distance(other, one))
    assert distance(one, one) == 0
    if [max(size, 1) for size in first] != [max(size, 1) for size in second]:
        assert distance(one, other) > 0


@pytest.mark.parametrize(
    "other",
    [
        Key("bfloat16", (("rows", 1),), ()),
        Key("float16", (("rows", 1),), ("noise",)),
        Key("float16", (("columns", 1),), ()),
        Key("float16", (), ()),
        Key("float16", (("rows", 1), ("columns", 1)), ()),
    ],
    ids=["dtype", "flags", "a size's name", "a size too few", "a size too many"],
)
def test_what_differs_in_more_than_sizes_is_out_of_reach(other):
    assert distance(Key("float16", (("rows", 1),), ()), other) == distance(other, Key("float16", (("rows", 1),), ()))
    assert distance(Key("float16", (("rows", 1),), ()), other) > REACH


@pytest.mark.parametrize("change", [{"dtype": torch.float16}, {"flags": (True,)}], ids=["dtype", "flags"])
def test_entries_of_other_dtypes_and_flags_are_not_used(change, places):
    keep(places.own, ONE, **change)
    assert explain(DAC, problem()).level == "formula"
    assert used(problem(**change)) == ONE


def test_a_measured_entry_is_used_before_a_models_that_is_as_near(places):
    keep(places.own, ONE, origin="model")
    assert used() == ONE
    keep(places.shipped, TWO, origin="measured")
    assert used() == TWO
    for config, rows, origin in [(THREE, 8192, "measured"), (FOUR, 16384, "model")]:
        keep(places.own, config, rows, origin=origin)
    assert used(problem(16384)) == FOUR, "the nearest, whoever found it"


# ---- Devices --------------------------------------------------------------------------------------------------------

NAMES = [
    ("NVIDIA A40", "NVIDIA A4000"),
    ("NVIDIA H200", "NVIDIA H200 NVL"),
    ("NVIDIA L4", "NVIDIA L40S"),
    ("NVIDIA H200", "nvidia h200"),
    ("NVIDIA H200", "NVIDIA_H200"),
]


@pytest.mark.parametrize(("name", "other"), [*NAMES, *((second, first) for first, second in NAMES)])
def test_a_gpu_is_told_by_its_whole_name(name, other, places):
    keep(places.own, ONE, device=other)
    here = problem(hardware=Hardware(name, "sm_90", 90))
    assert explain(DAC, here).level == "same architecture"
    assert explain(DAC, here._replace(hardware=Hardware(other, "sm_90", 90))).level == "exact"
    elsewhere = explain(DAC, here._replace(hardware=Hardware(name, "sm_86", 86)))
    assert elsewhere.level == "formula"


@pytest.mark.parametrize("target", ["sm_100", "sm_9", "sm_80", "gfx942", "sm_90a"])
def test_another_architectures_entries_are_not_used(target, places):
    keep(places.own, ONE, device="another", target=target)
    assert explain(DAC, problem()).level == "formula"


def test_a_gpu_without_a_name_uses_its_architectures_entries(places):
    keep(places.own, ONE)
    assert explain(DAC, problem(hardware=H200._replace(name=""))).level == "same architecture"


def test_the_name_in_the_file_counts_and_not_the_folders(places):
    path = keep(places.own, ONE)
    path.parent.rename(places.own / "copied from a colleague")
    lookup.forget()
    assert explain(DAC, problem()).level == "exact"


# ---- Folders --------------------------------------------------------------------------------------------------------


def test_the_users_own_folder_comes_first_then_the_cache_then_what_is_shipped(places):
    paths = [keep(folder, ONE) for folder in (places.own, places.cache, places.shipped)]
    for expected in paths:
        assert explain(DAC, problem()).path == expected
        expected.unlink()
        lookup.forget()
    assert explain(DAC, problem()).level == "formula"


def test_the_order_of_folders_decides_among_equals_only(places):
    keep(places.own, ONE, rows=8192)
    keep(places.cache, TWO, device=H100)
    keep(places.shipped, THREE)
    assert used() == THREE


def test_without_a_folder_of_the_users_own_the_others_are_searched(places, monkeypatch):
    keep(places.own, ONE)
    keep(places.cache, TWO)
    monkeypatch.setenv(environment.TUNING_DIR, "")
    assert used() == TWO
    monkeypatch.delenv(environment.TUNING_DIR)
    lookup.forget()
    assert used() == TWO


def test_folders_need_not_be_there(places):
    places.own.write_text("not a folder")
    assert not places.cache.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explain(DAC, problem()).level == "formula"


# ---- Entries that cannot be used ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        as_values(ONE) | {"num_warps": 3},
        as_values(ONE) | {"num_warps": True},
        as_values(ONE) | {"BLOCK_Q": 16},
        {"BLOCK_M": 4, "BLOCK_K": 256},
        {},
        as_values(DacConfig(256, 1024)),
    ],
    ids=["a value", "a boolean", "a field too many", "a field too few", "nothing", "a tile that does not fit"],
)
def test_an_entry_that_left_the_space_is_skipped_for_the_next(config, places):
    keep(places.own, config)
    assert explain(DAC, problem()).level == "formula"
    keep(places.own, ONE, rows=8192)
    assert used() == ONE
    keep(places.shipped, TWO)
    assert used() == TWO


def test_a_near_entry_that_cannot_run_the_problem_is_skipped(places):
    keep(places.own, DacConfig(16, 256), rows=16)
    assert used(problem(rows=16)) == DacConfig(16, 256)
    assert explain(DAC, problem(rows=8)).level == "formula", "eight rows need no tile of sixteen"


def test_a_file_of_another_operation_is_skipped(places):
    path = keep(places.own, ONE)
    shutil.copy(path, path.with_name("dac_steps.json"))
    steps = spaces()["dac_steps"]
    assert explain(steps, problem(flags=())).level == "formula"
    path.rename(path.with_name("adc.json"))
    lookup.forget()
    assert explain(DAC, problem()).level == "formula"


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "garbage": lambda data: b"\xff\xfe\x00" + data,
    "of a newer version": lambda data: data.replace(b'"format": 1', b'"format": 2'),
    "of an older version": lambda data: data.replace(b'"format": 1', b'"format": 0'),
    "an entry": lambda data: data.replace(b'"origin": "measured"', b'"origin": "guessed"'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_gives_one_warning_and_the_formulas_configuration(damage, places):
    path = keep(places.own, ONE)
    path.write_bytes(damage(path.read_bytes()))
    found = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in (1, 16, 4096, 4096):
            found[rows] = choose_on(H200, rows)
        lookup.forget()
        assert choose_on(H200) == found[4096]
    assert found == {rows: DAC.formula(problem(rows)) for rows in found}
    (warning,) = caught
    assert warning.category is TuningWarning
    assert str(warning.message).startswith(f"{path}: ")


def test_a_damaged_file_does_not_keep_others_from_being_used(places):
    keep(places.own, ONE).write_text("{")
    keep(places.shipped, TWO)
    with pytest.warns(TuningWarning):
        assert used() == TWO


# ---- Switches -------------------------------------------------------------------------------------------------------


def test_an_entry_for_older_kernels_is_used_unless_strictness_is_asked_for(places, monkeypatch):
    keep(places.own, ONE, source=FRESH | {"code": "older"})
    keep(places.cache, TWO, source=FRESH | {"space": "older"})
    keep(places.shipped, THREE, rows=8192)
    assert used() == ONE
    monkeypatch.setenv(environment.STRICT_TUNING, "1")
    lookup.forget()
    assert used() == THREE
    monkeypatch.setenv(environment.STRICT_TUNING, "0")
    lookup.forget()
    assert used() == ONE


@pytest.mark.parametrize("variable", [environment.STRICT_TUNING, environment.AUTOTUNE])
@pytest.mark.parametrize("value", ["true", "2", "yes", "on", "01", " 1"])
def test_a_switch_is_0_or_1(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable}: got '{value}'; allowed are '0' and '1'"):
        launched()


@pytest.mark.parametrize("variable", [environment.STRICT_TUNING, environment.AUTOTUNE])
@pytest.mark.parametrize("value", ["", "0"])
def test_a_switch_that_is_empty_or_0_is_off(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert not environment.strict_tuning()
    assert not environment.autotune()
    assert launched()


def test_nothing_is_tuned_without_the_switch_or_where_nothing_runs(device, monkeypatch):
    monkeypatch.setattr(autotune, "tune", fail)
    x, r = torch.ones(4, 32, device=device), torch.ones(1, device=device)
    with launch.backend("kernel"):
        ops.dac(x, r, 1, 254)
        monkeypatch.setenv(environment.AUTOTUNE, "1")
        lookup.forget()
        assert launched()
        with pytest.raises(AssertionError, match="should not have been called"):
            ops.dac(x, r, 1, 254)


# ---- What is looked up is launched ------------------------------------------------------------------------------------


def launched(name: str = H200.name, rows: int = 64, target: GPUTarget = HOPPER) -> dict[str, Any]:
    """The options that the input converter would be launched with on a GPU."""
    options: list[dict[str, Any]] = []
    with launch.backend("kernel"), launch.recording(lambda *recorded: options.append(recorded[2]), target, name=name):
        ops.dac(torch.ones(rows, 512, dtype=torch.bfloat16), torch.ones(1), 1, 254)
    (only,) = options
    return only


def choose_on(hardware: Hardware, rows: int = 4096) -> Any:
    """The cached lookup on a GPU that is not there."""
    target = GPUTarget("cuda", hardware.capability, 32)
    with launch.recording(fail, target, name=hardware.name):
        return choose(DAC, CPU, torch.bfloat16, (rows, 512), (False,))


def test_a_tuned_configuration_is_launched(places):
    formula = as_values(DAC.formula(problem(64)))
    assert formula.items() <= launched().items()
    keep(places.own, THREE, rows=64)
    tuned = launched()
    assert as_values(THREE).items() <= tuned.items()
    assert set(tuned) == set(formula) | {
        "MODE",
        "QUANTIZE",
        "STO_ROUND",
        "INPUT_NOISE",
        "VALUES",
        "CONVERTED",
        "ALIGNED",
        "PLACED",
    }


def test_a_recording_stands_for_the_gpu_that_it_names(places):
    keep(places.own, ONE, rows=64)
    keep(places.own, TWO, rows=64, device="NVIDIA A100", target="sm_80")
    assert launched()["BLOCK_M"] == ONE.BLOCK_M
    assert launched(H100)["BLOCK_M"] == ONE.BLOCK_M
    assert launched("")["BLOCK_M"] == ONE.BLOCK_M
    assert launched("NVIDIA A100", target=GPUTarget("cuda", 80, 32))["BLOCK_M"] == TWO.BLOCK_M
    amd = GPUTarget("hip", "gfx942", 64)
    assert launched("", target=amd)["BLOCK_M"] == DAC.formula(problem(64)).BLOCK_M
    assert launched()["BLOCK_M"] == ONE.BLOCK_M


def test_a_forced_configuration_comes_before_any_file(places):
    keep(places.own, ONE, rows=64)
    with forced(DAC, THREE):
        assert launched()["BLOCK_M"] == THREE.BLOCK_M
    assert launched()["BLOCK_M"] == ONE.BLOCK_M


@pytest.mark.parametrize("backend", ["kernel"], indirect=True)
def test_a_tuned_configuration_computes_the_same(places, backend, device):
    here = launch.hardware(device)
    x, r = torch.randn(50, 70, device=device), torch.full((2,), 1.5, device=device)
    at = problem(50, 35, here, dtype=torch.float32)
    assert DAC.formula(at) != DacConfig(2, 16)
    expected = reference.dac(x, r, 2, 254)
    torch.testing.assert_close(ops.dac(x, r, 2, 254), expected)
    key = DAC.key(at)
    entry = Entry(key, as_values(DacConfig(2, 16)), "measured", 1.0, 1.0, 0.0, FRESH)
    store.add(places.own, Table("dac", here.name, here.target, (entry,)))
    lookup.forget()
    assert choose(DAC, device, torch.float32, (50, 35), (False,)) == DacConfig(2, 16)
    torch.testing.assert_close(ops.dac(x, r, 2, 254), expected)


# ---- What a lookup costs --------------------------------------------------------------------------------------------


def test_files_are_read_once_in_a_process(places, monkeypatch):
    paths = [keep(folder, ONE) for folder in (places.own, places.cache, places.shipped)]
    unrelated = store.add(places.own, Table("adc", H200.name, "sm_90", ()))
    read: list[Path] = []

    def noted(path: Path, read_file: Any = store.read) -> Table | None:
        read.append(path)
        return read_file(path)

    monkeypatch.setattr(store, "read", noted)
    for rows in (1, 17, 4096, 4096, 60_000):
        choose_on(H200, rows)
        choose_on(H200._replace(name=H100), rows)
    assert read == paths
    explain(spaces()["adc"], problem(flags=(False, False)))
    assert read == [*paths, unrelated]


def test_a_changed_file_is_seen_after_forgetting(places):
    keep(places.own, ONE)
    assert choose_on(H200) == ONE
    key = DAC.key(problem())
    newer = Entry(key, as_values(TWO), "measured", 1.0, 1.0, 0.0, FRESH | {"date": "2026-05-01"})
    store.add(places.own, Table("dac", H200.name, "sm_90", (newer,)))
    assert choose_on(H200) == ONE
    assert choose_on(H200, 2048) == ONE
    lookup.forget()
    assert choose_on(H200) == TWO


def test_the_environment_is_read_again_after_forgetting(places, monkeypatch):
    keep(places.own, ONE)
    keep(places.cache, TWO)
    assert choose_on(H200) == ONE
    monkeypatch.delenv(environment.TUNING_DIR)
    assert choose_on(H200) == ONE
    lookup.forget()
    assert choose_on(H200) == TWO


def test_a_lookup_that_was_made_before_reads_nothing_and_ranks_nothing(places, monkeypatch):
    """What makes it cheap: the time itself is in ``bench/bench_lookup.py``."""
    keep(places.own, ONE)
    first = choose_on(H200)
    for owner, name in [
        (store, "read"), (store, "search_path"), (Path, "glob"), (Space, "key"), (Space, "accepts"), (Key, "__post_init__"),
        (lookup, "explain"), (lookup, "tables"), (lookup, "distance"), (environment, "autotune"),
        (environment, "strict_tuning"), (environment, "tuning_directory"),
    ]:  # fmt: skip
        monkeypatch.setattr(owner, name, fail)
    before = lookup._choose.cache_info()
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", None)
        for _ in range(3):
            assert choose_on(H200) is first
    after = lookup._choose.cache_info()
    assert (after.hits, after.misses) == (before.hits + 3, before.misses)
    monkeypatch.undo()  # before the files are forgotten


def test_the_cache_holds_every_problem_of_a_training_run():
    """A model has some dozens of distinct layers; sequences may have any length up to thousands."""
    maxsize = lookup._choose.cache_info().maxsize
    assert maxsize is None or maxsize >= 4096


IMPORT = """
import json, os, sys
import torch, triton

def refuse(*args, **options):
    raise AssertionError("asked for a GPU")

for name in ("_lazy_init", "is_available", "device_count", "get_device_properties", "current_device"):
    setattr(torch.cuda, name, refuse)
for name in ("_cuda_init", "_cuda_getDeviceCount", "_cuda_getDevice"):
    setattr(torch._C, name, refuse)

folders = tuple(json.loads(sys.argv[1]))
touched = []

def watch(event, args):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], (str, os.PathLike)):
        if os.fspath(args[0]).startswith(folders):
            touched.append(os.fspath(args[0]))

sys.addaudithook(watch)

import triton_analog, triton_analog.functional, triton_analog.nn, triton_analog.ops, triton_analog.optim
from triton_analog.launch import Hardware
from triton_analog.launch import lookup, space, store
from triton_analog.tuning import audit
from triton_analog.tuning.spaces import spaces as all_spaces

spaces = all_spaces()
at_import = list(touched)
shipped = str(store.shipped_directory())
problem = space.Problem(Hardware("NVIDIA H200", "sm_90", 90), torch.bfloat16, (4096, 512), (False,))
choice = lookup.explain(spaces["dac"], problem)
print(json.dumps([at_import, shipped, touched, choice.config.BLOCK_M]))
"""


def test_importing_asks_for_no_gpu_and_reads_no_tuning_file(tmp_path):
    """Nor does looking up what a GPU that is not there would use."""
    own, cache = tmp_path / "mine", tmp_path / "home" / "triton_analog" / "tuning"
    keep(cache, TWO)
    keep(own, ONE)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environ |= {
        environment.TUNING_DIR: str(own),
        "XDG_CACHE_HOME": str(tmp_path / "home"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    shipped = str(Path(__file__).parents[1] / "tuning_cache")
    watched = json.dumps([str(own), str(cache), shipped])
    done = subprocess.run([sys.executable, "-c", IMPORT, watched], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    at_import, shipped_there, touched, rows = json.loads(done.stdout)
    assert at_import == []
    assert rows == ONE.BLOCK_M
    if shipped_there == shipped:  # in a checkout
        assert all(any(path.startswith(folder) for path in touched) for folder in (str(own), shipped))


# ---- Compilations ---------------------------------------------------------------------------------------------------

BUCKETS = (16, 128, 1024, 8192)
BATCHES = [*range(1, 41), 63, 64, 65, 100, 128, 129, 500, 512, 513, 1024, 1025, 3001, 4096, 4097, 8191, 8192, 16384]
TUNED: dict[str, list[Any]] = {
    "dac": [DacConfig(4, 256), DacConfig(16, 64), DacConfig(8, 128), DacConfig(16, 256, 8)],
    "adc": [AdcConfig(16, 32), AdcConfig(32, 32), AdcConfig(64, 64), AdcConfig(64, 128, 8)],
    "matmul": [
        MatmulConfig(32, 256, 64), MatmulConfig(64, 64, 64), MatmulConfig(128, 64, 64), MatmulConfig(128, 128, 64, 8),
    ],
}  # fmt: skip
"""A configuration for each number of rows in ``BUCKETS``, at the sizes that the inspector launches."""
OTHER_SIZES = {"dac": (512,), "adc": (2048,), "matmul": (2048, 512)}
FLAGS = {"dac": (False,), "adc": (True, True), "matmul": (True, True, False)}
KERNELS = {"dac": "static dac_kernel", "adc": "noise+adc adc_kernel", "matmul": "dac+noise+adc matmul_kernel"}


def compiled_by_batch(op: str) -> dict[int, tuple[dict[str, Any], str]]:
    """For every batch size the configuration, and what tells its compiled kernel from others. In a process of its own."""
    store.search_path = lambda configured: (Path(configured or ""),)  # nobody's cache, nothing shipped
    return {
        rows: (one.config, one.key)
        for rows in BATCHES
        for one in specializations(op, rows)
        if f"{one.variant} {one.kernel}" == KERNELS[op]
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What :func:`compiled_by_batch` finds with an entry for each of ``BUCKETS``."""
    directory = tmp_path_factory.mktemp("tuned")
    for op, configurations in TUNED.items():
        space, entries = spaces()[op], []
        for rows, config in zip(BUCKETS, configurations, strict=True):
            at = Problem(H200, torch.bfloat16, (rows, *OTHER_SIZES[op]), FLAGS[op])
            assert space.accepts(at, as_values(config)) == config
            assert space.formula(at) != config
            entries.append(Entry(space.key(at), as_values(config), "measured", 1.0, 1.0, 0.0, {}))
        store.add(directory, Table(op, H200.name, H200.target, tuple(entries)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(environment.TUNING_DIR, str(directory))
        patch.delenv("TRITON_INTERPRET", raising=False)  # this process may run the interpreter
        found = run_in_processes(compiled_by_batch, list(TUNED), jobs=1)
    return dict(zip(TUNED, found, strict=True))


@pytest.mark.parametrize("op", TUNED)
def test_a_tuned_configuration_is_compiled_once_whatever_the_batch_size(op, compiled):
    assert len(BATCHES) > 50
    found = compiled[op]
    assert list(found) == BATCHES

    of_configuration, of_bucket = defaultdict(set), defaultdict(set)
    for rows, (options, key) in found.items():
        of_configuration[str(options)].add(key)
        of_bucket[triton.next_power_of_2(rows)].add(key)
    assert all(len(keys) == 1 for keys in of_configuration.values())
    assert all(len(keys) == 1 for keys in of_bucket.values())
    for rows, config in zip(BUCKETS, TUNED[op], strict=True):
        tiles = {name: value for name, value in as_values(config).items() if name.startswith("BLOCK_")}
        assert tiles.items() <= found[rows][0].items()
    assert len(BUCKETS) <= len(of_configuration) <= len(BUCKETS) + 2, "and the formula's for the smallest batches"
