"""Every kernel's default configuration compiles for GPUs that are not there, fits them, and serves every batch size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from unittest import mock

import pytest
from helpers import SHARED_LIMIT

from triton_analog.launch import lookup
from triton_analog.tuning.inspect import OPS, specializations
from triton_analog.tuning.processes import run_in_processes

pytestmark = pytest.mark.timeout(900)  # the first test waits for all of the compilation

RUNS = {"bf16": ("sm_80", "sm_90", "sm_100", "gfx942"), "fp32": ("sm_86",)}
"""Storage dtypes and their targets, one of each generation; sm_86 has the least shared memory of NVIDIA's. fp16 is compiled as
bf16 is."""
CASES = [(target, dtype) for dtype, targets in RUNS.items() for target in targets]
MATMULS = {"matmul", "matmul_dgrad", "matmul_wgrad"}
PRODUCTS = {f"{op}_{kind}" for op in MATMULS for kind in ("kernel", "pipeline_kernel")}

MAY_SPILL = MATMULS
"""The only operations that do not keep everything in registers on every target."""


@pytest.fixture(scope="module")
def reports():
    """The inspector's output per case; in processes of their own, because this one may run the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = defaultdict(list)
    for dtype, targets in RUNS.items():
        choices = [f"--target={target}" for target in targets]
        command = [sys.executable, "-m", "triton_analog.tuning", "inspect", "--json", f"--dtype={dtype}", *choices]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        for report in json.loads(done.stdout):
            found[report["target"], report["dtype"]].append(report)
    return found


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_operation_compiles_and_fits(reports, case):
    assert {r["op"] for r in reports[case]} == set(OPS)
    for r in reports[case]:
        assert 0 < r["registers"] <= 512, r
        assert r["shared_bytes"] <= SHARED_LIMIT[case[0]], r
        assert r["occupancy"] >= 1, r
        assert r["instructions"] > 50, r
        assert r["hottest_loop"] < r["instructions"], r


@pytest.mark.parametrize("case", [case for case in CASES if case[1] != "fp32"], ids="-".join)
def test_matrix_products_use_tensor_cores_in_a_loop(reports, case):
    """fp32 products are exact by default: torch.get_float32_matmul_precision() is 'highest'."""
    products = [r for r in reports[case] if r["kernel"] in PRODUCTS]
    assert {r["op"] for r in products} == MATMULS
    for r in products:
        assert r["tensor_core_instructions"] > 0, r
        assert r["hottest_loop"] > 0, r


SPILLED_PER_SLICE = 80
"""Bytes: what Hopper's pipeline needs once in a slice; ``test_hopper`` sees that it touches none of it while a product runs."""


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_nothing_spills(reports, case):
    """On sm_90 in bf16, which the default configurations are made for, no product does either."""
    may_spill = set() if case == ("sm_90", "bf16") else MAY_SPILL
    for r in reports[case]:
        if r["kernel"] == "matmul_pipeline_kernel":
            assert r["spilled_bytes"] <= SPILLED_PER_SLICE, r
        elif r["op"] not in may_spill:
            assert r["spilled_bytes"] == 0, r


# ---- Batch sizes --------------------------------------------------------------------------------------------------------

BATCHES = [
    *range(1, 21), 24, 31, 32, 33, 40, 48, 63, 64, 65, 80, 96, 100, 127, 128, 129, 144, 200, 255, 256, 257, 320, 500, 512,
    513, 777, 1000, 1024, 1025, 1536, 2000, 2048, 3001, 4096, 5000, 8191, 8192,
]  # fmt: skip
"""Even and odd, multiples of 16 and not, 1, powers of two and their neighbours."""
LARGEST_ROW_BLOCK = 256
REDUCTIONS = {"range_grad_kernel", "merge_moments_kernel", "input_range_learn_kernel", "merge_extrema_kernel"}
"""They read one partial result per block of rows, all at once: their block is the number of those, as a power of two."""
POWERS_OF_TWO = 7
"""16, 32 .. 1024: the sizes that a block can have."""


def kernels_by_batch(op):
    """Per kernel of every variant: for every batch size its configuration and what tells its compiled code from others."""
    found = defaultdict(dict)
    with mock.patch.object(lookup, "tables", return_value=()):  # the formula's; tuned ones differ between powers of two
        for rows in BATCHES:
            for launched in specializations(op, rows):
                name = f"{launched.variant} {launched.kernel}"
                found[name][rows] = (str(launched.config), launched.key)
    return dict(found)


@pytest.fixture(scope="module")
def batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        results = run_in_processes(kernels_by_batch, OPS, jobs=2)
    return dict(zip(OPS, results, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_batch_sizes_share_compiled_kernels(op, batches):
    assert len(BATCHES) >= 50
    for kernel, by_batch in batches[op].items():
        compiled = {key for _, key in by_batch.values()}
        configurations = {config for config, _ in by_batch.values()}

        # Sizes are plain arguments: whether 1, odd or a multiple of 16, only another block size is other code.
        assert len(compiled) == len(configurations), kernel
        assert len(compiled) <= POWERS_OF_TWO, kernel

        # A batch smaller than the block gets a smaller block. All others run the same code.
        if kernel.split()[-1] not in REDUCTIONS:
            assert len({key for rows, (_, key) in by_batch.items() if rows >= LARGEST_ROW_BLOCK}) == 1, kernel
