"""The pipelined products of Hopper GPUs: compiled everywhere, and on such a GPU equal to the plain kernels'."""

import importlib
import re
import subprocess

import pytest
import torch
from helpers import in_a_compilers_process, seed_of
from triton.backends.nvidia.compiler import get_ptxas

from triton_analog.launch import hardware
from triton_analog.launch.space import Problem
from triton_analog.ops.matmul import PIPELINED, _can_be_pipelined, _plain_config, launch_matmul
from triton_analog.ops.matmul_dgrad import MatmulDgrad, launch_matmul_dgrad
from triton_analog.ops.matmul_wgrad import MatmulWgrad, launch_matmul_wgrad
from triton_analog.reference import pack_bits
from triton_analog.seeds import placed
from triton_analog.tuning.inspect import _cuda_tool, compile_launch, record

dgrad, wgrad = (importlib.import_module(f"triton_analog.ops.matmul_{name}") for name in ("dgrad", "wgrad"))
HOPPER = torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() == (9, 0)

# ---- Compiled, without a GPU --------------------------------------------------------------------------------------------

PRODUCTS = {
    "noise and converter of one slice": {"slices": 1, "noise": True},
    "converter of several slices": {"slices": 8, "dtype": torch.float16},
    "noise of several slices, no bound": {"slices": 8, "noise": True, "bound": False},
    "dynamic range of one slice, no bound": {"slices": 1, "dynamic": True, "bound": False},
    "noise and converter of a part": {"slices": 8, "noise": True, "placed": True},
}


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launched(slices, noise=False, bound=True, dynamic=False, dtype=torch.bfloat16, placed=False):
    wmax = meta(slices, 4096, dtype=torch.float32)
    return launch_matmul(
        meta(8192, 4096, dtype=dtype), meta(4096, 4096, dtype=dtype), meta(4096, dtype=dtype),
        meta(slices, *[8192] * dynamic, dtype=torch.float32), slices, 254.0, 0.04 if noise else 0.0, wmax,
        10.0 if bound else 0.0, wmax, 254.0 if bound else -1.0, meta(4 if placed else 1, dtype=torch.int64), config=PIPELINED,
    )  # fmt: skip


def launched_dgrad(slices, mask=True, clip=True):
    return MatmulDgrad(
        meta(8192, 4096), meta(4096, 4096), meta(8192, 4096), None, meta(slices, dtype=torch.float32) if clip else None, slices,
        None, 0.0, 1.0, False, 254.0, clip, dgrad.PIPELINED,
    ).launch_masked(meta(8192, 4096), meta(slices, 32, 8192, 4, dtype=torch.int32) if mask else None)  # fmt: skip


def launched_wgrad(slices, mask=True, dtype=torch.float32, columns=4096):
    grad = meta(8192, columns)
    return MatmulWgrad(
        grad,
        meta(8192, 4096),
        meta(slices, dtype=torch.float32),
        slices,
        None,
        254.0,
        dtype,
        True,
        config=wgrad.PIPELINED,
    ).launch_masked(grad, meta(slices, -(-columns // 128), 8192, 4, dtype=torch.int32) if mask else None)


COMPILED = {f"product, {name}": lambda options=options: launched(**options) for name, options in PRODUCTS.items()} | {
    "dgrad, everything": lambda: launched_dgrad(8),
    "dgrad, nothing": lambda: launched_dgrad(1, mask=False, clip=False),
    "wgrad, mask": lambda: launched_wgrad(8),
    "wgrad, shared tiles, bf16": lambda: launched_wgrad(1, mask=False, dtype=torch.bfloat16, columns=256),
}


def compiled(name):
    """PTX and machine code."""
    (launch,) = [one for one in record(COMPILED[name], "sm_90") if "pipeline" in one.kernel.__name__]
    asm = compile_launch(launch, "sm_90").asm
    return asm["ptx"], asm["cubin"]


@pytest.fixture(scope="module")
def compiled_kernels():
    return dict(zip(COMPILED, in_a_compilers_process(compiled, *COMPILED), strict=True))


@pytest.mark.parametrize("name", COMPILED)
def test_products_of_the_kernel_are_asynchronous(compiled_kernels, name, tmp_path):
    """ptxas says so (C7510 and following) where it has to wait for every product."""
    ptx, _ = compiled_kernels[name]
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx)
    said = subprocess.run(
        [get_ptxas(90).path, "-arch=sm_90a", "-v", source, "-o", tmp_path / "kernel.cubin"], capture_output=True, text=True
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "registers" in said.stderr
    assert "C75" not in said.stderr


@pytest.mark.parametrize("name", COMPILED)
def test_nothing_is_spilled_while_a_product_of_the_kernel_runs(compiled_kernels, name, tmp_path):
    _, machine_code = compiled_kernels[name]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(machine_code)
    sass = subprocess.run([_cuda_tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True).stdout
    loops = re.findall(r"HGMMA(?:(?!gsb0, 0x0).)*?DEPBAR\.LE gsb0, 0x1", sass, re.DOTALL)
    assert len(loops) in (2, 3), "one loop for each consumer"
    assert not any(re.search(r"\b(LDL|STL)\b", loop) for loop in loops)


# ---- Equal to the plain kernel's ----------------------------------------------------------------------------------------

needs_hopper = pytest.mark.skipif(not HOPPER, reason="runs on a GPU of compute capability 9.0 alone")
SHAPES = [
    (512, 384, 1024, 4),
    (1000, 300, 2048, 1),
    (200, 131, 520, 3),  # slices that begin anywhere
    (193, 77, 27, 1),  # rows of the weight that no descriptor takes
    (1, 8, 64, 1),
]
MODES = {
    "converter": {},
    "noise and converter": {"noise": True},
    "noise and converter of a part": {"noise": True, "placed": True},
    "dynamic": {"noise": True, "dynamic": True},
    "dynamic, no input converter": {"dynamic": True, "inp_res": -1.0},
    "bound": {"noise": True, "out_res": -1.0},
    "no mask": {"needs_mask": False},
    "no bound": {"out_bound": 0.0, "out_res": -1.0},
    "noise, no bound": {"noise": True, "out_bound": 0.0, "out_res": -1.0},
    "noise, no bound, of a part": {"noise": True, "placed": True, "out_bound": 0.0, "out_res": -1.0},
    "dynamic, no bound": {"dynamic": True, "out_bound": 0.0, "out_res": -1.0},
    "NaN": {"nan": True},
    "NaN, noise, no bound": {"noise": True, "nan": True, "out_bound": 0.0, "out_res": -1.0},
}


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_and_mask_are_the_plain_kernel_s(shape, mode, dtype):
    options = {
        "noise": False,
        "dynamic": False,
        "inp_res": 254.0,
        "out_bound": 2.0,
        "out_res": 254.0,
        "nan": False,
        "placed": False,
    } | mode
    M, N, K, S = shape
    x, w = torch.randn(M, K, device="cuda", dtype=dtype), torch.randn(N, K, device="cuda", dtype=dtype) * 0.02
    if options["nan"]:
        x[M // 2, K // 2] = torch.nan
        w[N // 2, K // 3] = torch.nan
    r = 2 + torch.rand(*((S, M) if options["dynamic"] else (S,)), device="cuda")
    r.view(-1)[-1] = 0
    seed = seed_of(7, "cuda")
    if options["placed"]:
        seed = placed(seed, 48, 160, 3)
    wmax, noise = 0.05 + 0.02 * torch.rand(S, N, device="cuda"), options["noise"]
    args = (
        x, w, torch.randn(N, device="cuda", dtype=dtype), r, S, options["inp_res"], 0.04 if noise else 0.0, wmax,
        options["out_bound"], wmax, options["out_res"], seed, None, 0.0, options.get("needs_mask", True),
    )  # fmt: skip
    problem = Problem(
        hardware(x.device), dtype, (M, N, -(-K // S)), (options["out_bound"] > 0, noise, options["dynamic"])
    )
    if not _can_be_pipelined(problem):
        pytest.skip("a deviation for each row and column is the plain kernel's")
    y, mask = launch_matmul(*args, config=_plain_config(problem))
    ours, our_mask = launch_matmul(*args, config=PIPELINED)
    assert torch.equal(y.isnan(), ours.isnan())
    assert (y.isnan().any() and not y.isnan().all()) == options["nan"] or M * N < 100
    # The compilers' fused multiply-adds may differ: then a number lies within a step, or a rounding, of the other one.
    differ = (y != ours) & ~y.isnan()
    assert differ.float().mean() < 1e-3
    step = 2.0 * 0.07 * 3 / 127 if options["out_res"] > 0 else 0
    torch.testing.assert_close(
        ours.double(),
        y.double(),
        rtol=2**-7 if dtype == torch.bfloat16 else 2**-9,
        atol=1e-3 + 1.05 * step,
        equal_nan=True,
    )
    assert (mask != our_mask).float().mean() < 1e-3 if mask.numel() else our_mask.numel() == 0


GRADIENTS = [
    (1000, 296, 2048, 1),
    (200, 136, 528, 3),
    (64, 8, 2048, 8),
    (2048, 256, 768, 2),  # tiles that several programs share
    (1000, 300, 520, 4),  # rows that TMA does not take, and slices: the plain kernel steps in
]


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("mode", ["learned range", "fast mode", "no mask", "no range", "NaN"])
@pytest.mark.parametrize("shape", GRADIENTS)
def test_gradients_are_the_plain_kernels(shape, mode, dtype):
    """The mask acts on exact numbers and the sums are in fp32: what differs are roundings of other orders."""
    M, N, K, S = shape
    grad, x = torch.randn(M, N, device="cuda", dtype=dtype), torch.randn(M, K, device="cuda", dtype=dtype)
    weight = torch.randn(N, K, device="cuda", dtype=dtype) * 0.05
    ranges, mask = torch.rand(S, device="cuda") + 0.5, None
    if mode != "no mask":
        mask = torch.stack([pack_bits(torch.rand(M, N) < 0.2) for _ in range(S)]).cuda()
    if mode == "NaN":  # of what saturated nothing arrives, of the rest everything
        mask |= pack_bits(grad.isnan().cpu().index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(True))).cuda()
        grad[0, 0] = grad[M // 2, N // 2] = torch.nan
        x[1, 1] = torch.nan
    if mode == "learned range" and S > 1:
        ranges[-1] = 0
        x[1, -1] = 0
    hopper, sizes = hardware(x.device), (M, N, -(-K // S))
    args = (
        grad, weight, x, None, None if mode == "no range" else ranges, S, mask, 0.01, 0.5, mode == "fast mode", 254.0,
        mode != "no range",
    )  # fmt: skip
    plain = launch_matmul_dgrad(*args, config=dgrad._plain_config(Problem(hopper, dtype, sizes, (mode != "no range",))))
    ours = launch_matmul_dgrad(*args, config=dgrad.PIPELINED)
    rounding = 2**-7 if dtype == torch.bfloat16 else 2**-9
    for expected, found, atol in zip(plain, ours, (1e-5 * N**0.5, 2e-5 * (M * K) ** 0.5, 0.0), strict=True):
        torch.testing.assert_close(found.float(), expected.float(), rtol=rounding, atol=atol, equal_nan=True)
    args = (grad, plain[2] if mode != "no range" else x, ranges, S, mask, 254.0 if mode != "no range" else -1.0)
    for out in (torch.float32, dtype):
        options = (out, mode != "no range", torch.float32)
        plain_dw, plain_db = launch_matmul_wgrad(
            *args, *options, config=wgrad._plain_config(Problem(hopper, dtype, sizes))
        )
        dw, db = launch_matmul_wgrad(*args, *options, config=wgrad.PIPELINED)
        rtol = 1e-5 if out == torch.float32 else rounding
        torch.testing.assert_close(dw.float(), plain_dw.float(), rtol=rtol, atol=1e-5 * M**0.5, equal_nan=True)
        torch.testing.assert_close(db, plain_db, rtol=1e-5, atol=1e-5 * M**0.5, equal_nan=True)
