"""What can be tuned: spaces, their formulas, keys, forced configurations, calls for sweeps, and fingerprints of the code."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from helpers import SHARED_LIMIT
from hypothesis import given
from hypothesis import strategies as st

from triton_analog import launch
from triton_analog.launch import Hardware, fingerprint, lookup, named_hardware
from triton_analog.launch.space import Problem, Space, as_values, forced, forced_config
from triton_analog.launch.store import Entry, Key
from triton_analog.tuning import cases
from triton_analog.tuning.inspect import TARGETS
from triton_analog.tuning.spaces import spaces

SPACES = spaces()
HARDWARE = {name: named_hardware("", name) for name in TARGETS}
HOPPER = HARDWARE["sm_90"]
SIZES = (1, 13, 16, 127, 512, 4096, 11008)
"""The smallest, primes, one below a block, multiples of 16, powers of two, and a model's own."""
MANY_ROWS = 2**17

all_ops = pytest.mark.parametrize("op", SPACES)


def dtypes_of(op: str) -> tuple[torch.dtype, ...]:
    floats = (torch.bfloat16, torch.float16, torch.float32)
    return (*floats, torch.int8) if op == "matmul" else floats


def flags_of(space: Space[Any]) -> list[tuple[bool, ...]]:
    return list(itertools.product((False, True), repeat=len(space.flags)))


def problem_of(space: Space[Any], *sizes: int, on: tuple[str, ...] = (), hardware: Hardware = HOPPER) -> Problem:
    return Problem(hardware, torch.bfloat16, sizes, tuple(name in on for name in space.flags))


def some_problems(op: str, count: int) -> list[Problem]:
    """Of all targets, dtypes and flags; drawn, the same ones in every run."""
    draw, space = random.Random(op), SPACES[op]
    return [
        Problem(
            draw.choice(list(HARDWARE.values())),
            draw.choice(dtypes_of(op)),
            tuple(draw.choice((*SIZES, draw.randint(1, 20_000))) for _ in space.sizes),
            draw.choice(flags_of(space)),
        )
        for _ in range(count)
    ]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Space[Any], Problem]:
    space = SPACES[draw(st.sampled_from(list(SPACES)))]
    sizes = tuple(draw(st.integers(1, 20_000)) for _ in space.sizes)
    dtype, hardware = draw(st.sampled_from(dtypes_of(space.op))), draw(st.sampled_from(list(HARDWARE.values())))
    return space, Problem(hardware, dtype, sizes, draw(st.sampled_from(flags_of(space))))


# ---- Spaces ---------------------------------------------------------------------------------------------------------


def test_every_space_goes_by_the_name_of_its_operation():
    assert {space.op for space in SPACES.values()} == set(SPACES)
    assert all(name == space.op for name, space in SPACES.items())


@all_ops
def test_a_space_has_values_for_every_field_and_for_nothing_else(op):
    space = SPACES[op]
    assert set(space.values) == {field.name for field in fields(space.config)}
    for allowed in space.values.values():
        assert len(set(allowed)) == len(allowed) > 1
        assert len({type(value) for value in allowed}) == 1


@all_ops
@pytest.mark.parametrize("target", TARGETS)
def test_the_formulas_configuration_belongs_to_the_space(op, target):
    space = SPACES[op]
    for dtype, sizes, flags in itertools.product(
        dtypes_of(op), itertools.product(SIZES, repeat=len(space.sizes)), flags_of(space)
    ):
        problem = Problem(HARDWARE[target], dtype, sizes, flags)
        config = space.formula(problem)
        assert space.accepts(problem, as_values(config)) == config, problem


@all_ops
def test_the_formulas_configuration_for_many_rows_belongs_to_the_space(op):
    space = SPACES[op]
    for others, flags in itertools.product(
        itertools.product((1, 16, 17, 512), repeat=len(space.sizes) - 1), flags_of(space)
    ):
        problem = Problem(HOPPER, torch.bfloat16, (MANY_ROWS, *others), flags)
        config = space.formula(problem)
        assert space.accepts(problem, as_values(config)) == config, problem


@all_ops
def test_candidates_are_the_formulas_configuration_and_all_others_that_fit(op):
    space = SPACES[op]
    for problem in some_problems(op, 6):
        candidates = space.candidates(problem)
        assert candidates[0] == space.formula(problem)
        assert len(set(candidates)) == len(candidates)
        accepted = {
            config
            for chosen in itertools.product(*space.values.values())
            if (config := space.accepts(problem, dict(zip(space.values, chosen, strict=True)))) is not None
        }
        assert set(candidates) == accepted


@all_ops
def test_there_is_something_to_choose_from(op):
    space = SPACES[op]
    sizes = (8192, 4096, 512)[: len(space.sizes)]
    for hardware in HARDWARE.values():
        assert len(space.candidates(problem_of(space, *sizes, on=space.flags, hardware=hardware))) > 3


def operand_bytes(op: str, config: Any, dtype: torch.dtype) -> int:
    """Shared memory for one stage of a product's two operands."""
    m, n, k = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    numbers = {"matmul": (m + n) * k, "matmul_dgrad": (m + k) * n, "matmul_wgrad": (n + k) * m}[op]
    return numbers * dtype.itemsize


@pytest.mark.parametrize("op", ["matmul", "matmul_dgrad", "matmul_wgrad"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_operands_of_every_candidate_fit_the_targets_shared_memory(op, target):
    space, hardware = SPACES[op], HARDWARE[target]
    largest = 0
    for dtype in dtypes_of(op):
        problem = Problem(hardware, dtype, (8192, 4096, 512), (False,) * len(space.flags))
        for config in space.candidates(problem):
            # AMD's compiler keeps the last stage in registers.
            stages = config.num_stages if target.startswith("sm_") else config.num_stages - 1
            largest = max(largest, stages * operand_bytes(op, config, dtype))
    assert SHARED_LIMIT[target] // 2 < largest <= SHARED_LIMIT[target]


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("num_warps"),
        lambda values: values.update(BLOCK_Q=16),
        lambda values: values.update(num_warps=3),
        lambda values: values.update(BLOCK_M=-64),
        lambda values: values.update(BLOCK_M=10**30),
        lambda values: values.update(PARTS=True),
        lambda values: values.update(PREPARED=1),
        lambda values: values.update(DESCRIPTORS=1),
        lambda values: values.update(num_stages=0),
    ],
    ids=[
        "a field is missing", "an unknown field", "not of the space", "negative", "huge", "a boolean for a number",
        "a number for a boolean", "another one", "a default's neighbour",
    ],
)  # fmt: skip
def test_other_fields_and_values_are_not_accepted(change):
    space = SPACES["matmul"]
    problem = problem_of(space, 8192, 4096, 512)
    values = as_values(space.formula(problem))
    assert space.accepts(problem, values) == space.formula(problem)
    change(values)
    assert space.accepts(problem, values) is None


def test_what_fits_one_problem_may_not_fit_another():
    space = SPACES["matmul"]
    values = as_values(space.formula(problem_of(space, 8192, 4096, 512)))
    assert space.accepts(problem_of(space, 8192, 4096, 512), values) is not None
    assert space.accepts(problem_of(space, 16, 4096, 512), values) is None, "the tile is larger than the problem"
    assert space.accepts(problem_of(space, 8192, 4096, 512, hardware=HARDWARE["sm_86"]), values) is None


# ---- Keys -----------------------------------------------------------------------------------------------------------


@given(problems())
def test_a_key_gives_back_its_problem_with_rows_as_a_power_of_two(drawn):
    space, problem = drawn
    key = space.key(problem)
    back = space.problem(problem.hardware, key)
    assert space.key(back) == key
    rows = space.sizes.index("rows")
    expected = list(problem.sizes)
    expected[rows] = triton.next_power_of_2(problem.sizes[rows])
    assert back == problem._replace(sizes=tuple(expected))


def test_a_key_reads_as_the_problem_does():
    space = SPACES["matmul"]
    problem = problem_of(space, 3000, 4096, 512, on=("noise", "dynamic"))
    sizes = (("rows", 4096), ("columns", 4096), ("width", 512))
    assert space.key(problem) == Key("bfloat16", sizes, ("dynamic", "noise"))


@all_ops
def test_problems_share_a_key_between_powers_of_two_of_their_rows_and_nowhere_else(op):
    space = SPACES[op]
    at = space.sizes.index("rows")

    def key(rows: int, other: int = 512, **changes: Any) -> Key:
        sizes = [other] * len(space.sizes)
        sizes[at] = rows
        return space.key(problem_of(space, *sizes)._replace(**changes))

    assert key(1025) == key(1536) == key(2048)
    assert len({key(rows) for rows in (1, 2, 4, 1024, 1025, 2049)}) == 6
    assert key(2048, 511) != key(2048, 512)
    assert key(2048) != key(2048, dtype=torch.float16)
    assert len({key(2048, flags=flags) for flags in flags_of(space)}) == 2 ** len(space.flags)
    assert key(2048) == key(2048, hardware=HARDWARE["gfx942"]), "the file names the GPU"


@all_ops
def test_problems_that_share_a_key_share_the_formulas_configuration_and_what_fits(op):
    """So what was found for one of them, and checked for the power of two, can run all of them."""
    space = SPACES[op]
    for problem in [*some_problems(op, 3), *(p._replace(sizes=(9000, *p.sizes[1:])) for p in some_problems(op, 3))]:
        whole = space.problem(problem.hardware, space.key(problem))
        assert space.formula(problem) == space.formula(whole)
        assert space.candidates(problem) == space.candidates(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float17"},
        {"dtype": "half"},
        {"dtype": "Tensor"},
        {"sizes": (("rows", 1), ("columns", 2))},
        {"sizes": (("rows", 1), ("columns", 2), ("width", 3), ("depth", 4))},
        {"sizes": (("rows", 1), ("columns", 2), ("features", 3))},
        {"flags": ("noise", "wide_loads")},
    ],
    ids=str,
)
def test_a_key_of_something_else_is_refused_with_what_there_is(changes):
    space = SPACES["matmul"]
    key = replace(space.key(problem_of(space, 1, 2, 3)), **changes)
    with pytest.raises(
        ValueError, match=r"got Key.*; matmul has the sizes rows, columns, width and the flags per_slice,"
    ):
        space.problem(HOPPER, key)


# ---- Forced configurations --------------------------------------------------------------------------------------------


def recorded(call: Any, target: str = "sm_90") -> list[tuple[str, dict[str, Any]]]:
    """Names and options of the launches of ``call``; nothing is started."""
    found: list[tuple[str, dict[str, Any]]] = []

    def record(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append((kernel.__name__, options))

    with launch.backend("kernel"), launch.recording(record, TARGETS[target]):
        call()
    return found


def sizes_of(space: Space[Any]) -> tuple[int, ...]:
    return (96, 80, 64)[: len(space.sizes)]


@all_ops
def test_a_forced_configuration_is_what_is_launched(op):
    space = SPACES[op]
    problem = problem_of(space, *sizes_of(space), on=("wide_loads", "aligned"))
    if op == "noise":
        problem = problem._replace(dtype=torch.float32)
    call = cases.call_of(space, problem, torch.device("cpu"), filled=False)
    formula = space.formula(problem)
    other = next(config for config in space.candidates(problem)[1:] if config.num_warps != formula.num_warps)
    for config in (formula, other):
        with forced(space, config):
            launches = recorded(call)
        seen = [options for _, options in launches if options.get("num_warps") == config.num_warps]
        expected = {name: value for name, value in as_values(config).items() if name.startswith("BLOCK_")}
        assert any(expected.items() <= options.items() for options in seen), launches


def test_a_forced_configuration_ends_with_its_block():
    space = SPACES["dac"]
    first, second = space.candidates(problem_of(space, 64, 64))[:2]
    assert forced_config(space) is None
    with forced(space, first):
        with forced(space, second):
            assert forced_config(space) is second
            assert forced_config(SPACES["dac_steps"]) is None
        assert forced_config(space) is first
        with pytest.raises(KeyError), forced(space, second):
            raise KeyError
        assert forced_config(space) is first
    assert forced_config(space) is None


def test_another_operations_configuration_is_refused():
    space = SPACES["matmul_dgrad"]
    config = SPACES["matmul"].formula(problem_of(SPACES["matmul"], 64, 64, 64))
    with (
        pytest.raises(TypeError, match="got MatmulConfig; matmul_dgrad takes MatmulDgradConfig"),
        forced(space, config),
    ):
        pass
    assert forced_config(space) is None


# ---- Calls of an operation for a problem ------------------------------------------------------------------------------


def test_every_space_has_a_call():
    assert set(cases._BUILDERS) == set(SPACES)


@pytest.fixture
def asked(monkeypatch):
    """Which problems the launchers look up, by the operation."""
    found: list[tuple[str, Problem]] = []

    def choose(space: Space[Any], problem: Problem, device: torch.device | None, choose: Any = lookup._choose) -> Any:
        found.append((space.op, problem))
        return choose(space, problem, device)

    monkeypatch.setattr(lookup, "_choose", choose)
    return found


FOLLOWING = {"absmax": "wide_loads", "extrema": "wide_loads", "weight": "aligned"}
"""Flags that follow from the sizes."""


def possible(op: str) -> list[Problem]:
    """Even and odd sizes with every combination of flags that such an operation can have."""
    space, found = SPACES[op], []
    for dtype, even, flags in itertools.product(dtypes_of(op), (True, False), flags_of(space)):
        # An odd slice of a weight counts what its first tile may reach before it: 15 columns.
        width = 64 if even else 37 + (15 if op == "weight" else 0)
        sizes = (96, 80, width) if len(space.sizes) == 3 else (96, width)
        on = dict(zip(space.flags, flags, strict=True))
        if op in FOLLOWING and on[FOLLOWING[op]] is not even:
            continue
        if (dtype == torch.int8 and not on["per_slice"]) or (op == "noise" and dtype != torch.float32):
            continue
        found.append(Problem(HOPPER, dtype, sizes, flags))
    return found


@all_ops
def test_a_call_looks_up_the_problem_that_it_was_made_for(op, asked):
    problems = possible(op)
    assert {problem.flags for problem in problems} == set(flags_of(SPACES[op]))
    for problem in problems:
        asked.clear()
        assert recorded(cases.call_of(SPACES[op], problem, torch.device("cpu"), filled=False))
        assert [found for name, found in asked if name == op] == [problem]


@pytest.mark.parametrize(("op", "width"), [("absmax", 512), ("extrema", 512), ("weight", 512 + 15)])
def test_slices_of_512_and_511_features_are_told_from_even_ones(op, width, asked):
    problem = problem_of(SPACES[op], 96, width)
    recorded(cases.call_of(SPACES[op], problem, torch.device("cpu"), filled=False))
    assert asked == [(op, problem)]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux what memory is in use")
@all_ops
def test_a_call_that_is_only_recorded_touches_no_memory(op):
    space = SPACES[op]
    sizes = (2**14, 2**14, 512) if len(space.sizes) == 3 else (2**14, 2**12)
    problem = problem_of(space, *sizes, on=("wide_loads", "aligned"))
    before = resident_bytes()
    call = cases.call_of(space, problem, torch.device("cpu"), filled=False)
    assert resident_bytes() - before < 2**25, "of 2**26 numbers or more"
    del call


# ---- Fingerprints -----------------------------------------------------------------------------------------------------

LIBRARY = '''
import triton
import triton.language as tl

MAGIC = tl.constexpr(12.0)


@triton.jit
def innermost(x):
    """What it does."""
    # how it does it
    for i in range(4):
        x += 1
        x *= 2
    return x


@triton.jit
def inner(x):
    return innermost(x) + MAGIC


@triton.jit
def unused(x):
    return x
'''
KERNEL = """
from dataclasses import dataclass

import triton
import triton.language as tl

from {library} import inner


@dataclass(frozen=True)
class Config:
    BLOCK: int


@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    x = x_ptr + tl.arange(0, BLOCK)
    tl.store(x, inner(tl.load(x)))


def launcher(x):
    return 1
"""


def loaded(name: str, source: str, directory: Path) -> Any:
    path = directory / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hash_of(tmp_path, monkeypatch):
    """The hash of a kernel in one file that uses functions of another, after a change of either."""
    numbers = itertools.count()

    def find(old: str = "", new: str = "") -> str:
        number = next(numbers)
        library, kernel = f"some_library_{number}", f"some_kernel_{number}"
        changed = LIBRARY.replace(old, new) if old else LIBRARY
        other = KERNEL.replace(old, new) if old else KERNEL
        assert not old or (changed, other) != (LIBRARY, KERNEL)
        for name in (library, kernel):  # so that they are forgotten
            monkeypatch.setitem(sys.modules, name, None)
        loaded(library, changed, tmp_path)
        config = loaded(kernel, other.format(library=library), tmp_path).Config
        return fingerprint.code_hash(Space("some", config, ("rows",), lambda problem: config(16), {"BLOCK": (16, 32)}))

    return find


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tl.store(x, inner(tl.load(x)))", "tl.store(x, inner(tl.load(x) + 1))"),
        ("BLOCK: tl.constexpr):", "BLOCK: tl.constexpr, ANOTHER: tl.constexpr = 0):"),
        ("innermost(x) + MAGIC", "innermost(x) - MAGIC"),
        ("x += 1", "x += 3"),
        ("        x *= 2", "    x *= 2"),
        ("constexpr(12.0)", "constexpr(13.0)"),
        ("@triton.jit\ndef inner(x)", "@triton.jit(noinline=True)\ndef inner(x)"),
    ],
    ids=[
        "the kernel", "its arguments", "a function that it calls", "one that that calls", "a line leaves a loop", "a constant",
        "a decorator",
    ],
)  # fmt: skip
def test_the_hash_changes_with_the_code_of_a_kernel_and_of_all_that_it_uses(old, new, hash_of):
    assert hash_of(old, new) != hash_of()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# how it does it", "# in other words"),
        ('"""What it does."""', '"""In other words."""'),
        ('    """What it does."""\n', ""),
        ("        x += 1\n", "\n        x += 1  # one\n\n"),
        ("x_ptr + tl.arange(0, BLOCK)", "x_ptr + \\\n        tl.arange(0, BLOCK)"),
        ("@triton.jit\ndef kernel", "NUMBER = 1\n\n\n@triton.jit\ndef kernel"),
        ("return x\n\n\n@triton.jit\ndef inner", "return x\n\n\n\n# ---- Another part ----\n\n\n@triton.jit\ndef inner"),
        ("def unused(x):\n    return x", "def unused(x):\n    return x + 1"),
        ("return 1", "return 2"),
    ],
    ids=[
        "a comment", "a docstring", "without docstring", "blank lines", "a line in two", "moved", "a headline",
        "what is not used", "the launcher",
    ],
)  # fmt: skip
def test_the_hash_stays_when_the_code_does(old, new, hash_of):
    assert hash_of(old, new) == hash_of()


HASHES = """
import json
from triton_analog.launch.fingerprint import code_hash, space_hash
from triton_analog.tuning.spaces import spaces

print(json.dumps({op: [code_hash(space), space_hash(space)] for op, space in spaces().items()}))
"""


def hashes_in_a_process(**variables: str) -> dict[str, list[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", HASHES], env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_hashes_are_the_same_in_every_process_with_and_without_the_interpreter():
    here = {op: [fingerprint.code_hash(space), fingerprint.space_hash(space)] for op, space in SPACES.items()}
    assert hashes_in_a_process(TRITON_INTERPRET="1", PYTHONHASHSEED="1") == here
    assert hashes_in_a_process(PYTHONHASHSEED="2") == here


def test_operations_of_one_file_share_its_hash_and_others_do_not():
    hashes = {op: fingerprint.code_hash(space) for op, space in SPACES.items()}
    assert hashes["dac"] == hashes["dac_steps"]
    assert len(set(hashes.values())) == len({space.config.__module__ for space in SPACES.values()})


@dataclass(frozen=True)
class Tile:
    BLOCK: int
    split: bool = False


SMALL_SPACE = Space(
    "small", Tile, sizes=("rows", "width"), flags=("noise",), formula=lambda problem: Tile(16),
    values={"BLOCK": (16, 32), "split": (True, False)},
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"values": {"BLOCK": (16, 32, 64), "split": (True, False)}},
        {"values": {"BLOCK": (16,), "split": (True, False)}},
        {"values": {"BLOCK": (16, 32), "split": (1, 0)}},
        {"values": {"BLOCKS": (16, 32), "split": (True, False)}},
        {"sizes": ("rows", "columns")},
        {"flags": ("noise", "bound")},
        {"sizes": ("rows",), "flags": ("width", "noise")},
        {"flags": ()},
    ],
    ids=str,
)
def test_the_hash_of_a_space_changes_with_what_its_entries_mean(change):
    assert fingerprint.space_hash(replace(SMALL_SPACE, **change)) != fingerprint.space_hash(SMALL_SPACE)


def test_the_hash_of_a_space_is_not_of_the_formula():
    other = replace(SMALL_SPACE, formula=lambda problem: Tile(32), values={"BLOCK": [16, 32], "split": [True, False]})
    assert fingerprint.space_hash(other) == fingerprint.space_hash(SMALL_SPACE)


@pytest.mark.parametrize(
    ("source", "stale"),
    [({}, False), ({"code": "0"}, True), ({"space": "0"}, True), ({"triton": "2.0.0", "date": "2020-01-01"}, False)],
    ids=["as now", "other kernels", "another space", "an older compiler"],
)
def test_an_entry_is_stale_when_kernels_or_space_are_others(source, stale):
    space = SPACES["dac"]
    problem = problem_of(space, 64, 64)
    found = {"code": fingerprint.code_hash(space), "space": fingerprint.space_hash(space)} | source
    entry = Entry(space.key(problem), as_values(space.formula(problem)), "measured", 1.0, 1.0, 0.0, found)
    assert fingerprint.is_stale(space, entry) is stale
    assert fingerprint.is_stale(space, replace(entry, source={}))
