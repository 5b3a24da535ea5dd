"""The check of one's own machine: it covers every operation, passes what is right and names what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import HAS_GPU
from helpers import DTYPES, needs_interpreter

from triton_analog import launch, ops, verify
from triton_analog.testing import OPERATIONS, assert_matches_reference, compare
from triton_analog.testing import cases as testing_cases
from triton_analog.testing.cases import Case, Shape

pytestmark = needs_interpreter
DEVICE = "cuda" if HAS_GPU else "cpu"
SHAPE = {"rows": 5, "columns": 7, "features": 30, "slices": 2}


def test_every_operation_is_there():
    assert set(OPERATIONS) == set(ops.__all__)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["clip", "dac_steps", "input_range_learn", "matmul_backward"])
def test_what_is_right_passes(op, dtype):
    assert_matches_reference(op, **SHAPE, dtype=dtype, device=DEVICE)


WRONG = {
    "off by": lambda std: std * (1 + 2e-6),
    "NaN": lambda std: std * torch.nan,
    "float64": lambda std: std.double(),
    "2 of 2 integers": lambda std: std.round().to(torch.int8) + 1,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(wrong, monkeypatch):
    change = WRONG[wrong]
    right = (lambda std: std.round().to(torch.int8)) if "integers" in wrong else (lambda std: std)

    def broken(x, slices):
        found = ops.std(x, slices)
        return change(found) if x.dtype != torch.float64 and launch.backends._forced == "kernel" else right(found)

    monkeypatch.setitem(
        testing_cases._MAKERS, "std", lambda new: [Case("broken", broken, (new.inputs(), new.shape.slices))]
    )
    with pytest.raises(AssertionError, match=rf"^std broken, torch.float32, 5 x 30 \(2\) -> 7: .*{wrong}"):
        assert_matches_reference("std", **SHAPE, device=DEVICE)


def test_a_rounding_may_go_either_way_and_no_more(monkeypatch):
    """One of a thousand by one step: not two of them, and not by two steps."""

    def flipped(x, steps, count):
        out = x.clone()
        if launch.backends._forced == "kernel" and x.dtype != torch.float64:
            out.view(-1)[:count] += steps / 64
        return out

    def found(steps, count):
        def made(new):
            return [Case("", flipped, (new.inputs(), steps, count), step=1 / 64)]

        monkeypatch.setitem(testing_cases._MAKERS, "dac", made)
        return compare("dac", Shape(5, 7, 30), torch.float32, torch.device("cpu"))[0].wrong

    assert found(1, 1) == ""
    assert found(1, 2).startswith("off by")
    assert found(2, 1).startswith("a rounding is off by")


def test_the_same_operands_each_time_and_nobodys_generator_moves():
    before = torch.get_rng_state()
    first, second = (compare("std", Shape(5, 7, 30), torch.float32, torch.device(DEVICE)) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"op": "matmull"}, "op: got 'matmull'; .*did you mean"),
        ({"rows": 0}, "rows: got 0; give a number above 0"),
        ({"slices": 31}, "slices: got 31; allowed are 1 to the 30 features"),
        ({"dtype": torch.float64}, "dtype: got torch.float64; allowed are"),
    ],
)
def test_mistakes(changed, message):
    with pytest.raises(ValueError, match=message):
        assert_matches_reference(**{"op": "std", **SHAPE, **changed}, device=DEVICE)


def test_the_command(monkeypatch, capsys):
    """A table within 80 columns, what is wrong below it, and an exit code. The process that it starts has the interpreter,
    whatever the shell says."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    monkeypatch.setattr(verify.os, "cpu_count", lambda: 1)
    assert verify.main(["--device", DEVICE, "--op", "std", "--op", "input_range_update_fast"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["operation", "fp32", "allowed", "bf16", "allowed", "fp16", "allowed"]
    assert [line.split()[0] for line in lines[2:4]] == ["std", "input_range_update_fast"]
    assert max(map(len, lines[1:])) <= 80
    assert "all agree with the reference" in lines[-1]

    def one_wrong_and_one_raised(check, jobs, processes):
        found = check(jobs[0])
        return [[replace(found[0], wrong="off by 3")], ValueError("no such thing"), found]

    monkeypatch.setattr(verify, "run_in_processes", one_wrong_and_one_raised)
    assert verify.main(["--device", DEVICE, "--op", "std"]) == 1
    shown = capsys.readouterr().out
    assert "wrong: std, fp32, 19 x 70 (3) -> 37: off by 3" in shown
    assert "wrong: std, bf16: raised ValueError: no such thing" in shown
    assert "2 are wrong" in shown.splitlines()[-1]


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert verify.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: --device cuda: torch sees no GPU")
