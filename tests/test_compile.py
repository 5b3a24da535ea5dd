"""Every kernel's default configuration compiles for GPUs that are not there, and fits them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}  # bytes a program may use
CASES = [("sm_80", "bf16"), ("sm_90", "bf16"), ("sm_90", "fp32"), ("gfx942", "fp16")]
MATMULS = {"matmul", "matmul_dgrad", "matmul_wgrad"}
OPS = MATMULS | {"absmax", "adc", "dac", "input_range", "noise", "std", "weight"}


@pytest.fixture(scope="module")
def reports():
    """The inspector's output per case; in processes of their own, because this one may run the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "triton_analog.tuning", "inspect", "--json"]
    running = {
        case: subprocess.Popen(
            [*command, "--target", case[0], "--dtype", case[1]], env=environment, stdout=subprocess.PIPE, text=True
        )
        for case in CASES
    }
    return {case: json.loads(process.communicate()[0]) for case, process in running.items()}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_operation_compiles_and_fits(reports, case):
    assert {r["op"] for r in reports[case]} == OPS
    for r in reports[case]:
        assert 0 < r["registers"] <= 512, r
        assert r["shared_bytes"] <= SHARED_LIMIT[case[0]], r
        assert r["instructions"] > 50, r


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_matrix_products_use_tensor_cores(reports, case):
    if case[1] == "fp32":
        pytest.skip("fp32 products are exact by default: torch.get_float32_matmul_precision() is 'highest'")
    for r in reports[case]:
        if r["kernel"].startswith("matmul"):
            assert r["tensor_core_instructions"] > 0, r


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_element_wise_kernels_do_not_spill(reports, case):
    for r in reports[case]:
        if r["op"] not in MATMULS:
            assert r["spilled_bytes"] == 0, r


def test_the_command_names_what_is_allowed():
    command = [sys.executable, "-m", "triton_analog.tuning", "inspect", "--target", "sm_1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "sm_90" in result.stderr
