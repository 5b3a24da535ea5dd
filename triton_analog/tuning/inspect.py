"""Compile every operation's kernels for a target that need not be there, and read the compiler's own numbers.

Launchers run on meta tensors with their launches recorded instead of started, so what is compiled is what would run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from triton_analog import launch
from triton_analog.ops.absmax import launch_absmax
from triton_analog.ops.adc import launch_adc
from triton_analog.ops.dac import launch_dac
from triton_analog.ops.input_range import launch_extrema, launch_input_range_grad, launch_input_range_update
from triton_analog.ops.matmul import launch_matmul
from triton_analog.ops.matmul_dgrad import launch_matmul_dgrad
from triton_analog.ops.matmul_wgrad import launch_matmul_wgrad
from triton_analog.ops.noise import launch_noise
from triton_analog.ops.std import launch_moments
from triton_analog.ops.weight import launch_weight, launch_weight_grad

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)

_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Report:
    """One compiled kernel. ``spilled_bytes`` is per thread; counts are of machine instructions."""

    op: str
    kernel: str
    target: str
    dtype: str
    config: dict[str, Any]
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    instructions: int


def _operations(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Every operation with everything switched on, at a size that large models have."""
    M, N, K, S = 4096, 2048, 2048, 4

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, y, w, bias = meta(M, K), meta(M, N), meta(N, K), meta(N)
    r, wmax, seed = meta(S, dtype=torch.float32), meta(S, N, dtype=torch.float32), meta(1, dtype=torch.int64)
    mask = meta(S, M, N // 8, dtype=torch.uint8)

    def input_range() -> None:
        launch_input_range_grad(x, x, r, S, 0.01, 0.95, False)
        launch_input_range_update(r, meta(S, dtype=torch.int64), r, meta(S, 3, dtype=torch.float32), 100, 3.0)
        launch_extrema(x, S)

    def weight() -> None:
        launch_weight(w, S, None, "per_channel", 254.0, "per_channel", 0.02, seed, dtype)
        launch_weight_grad(w, w, wmax, S, "per_channel", 254.0)

    def matmul() -> None:
        launch_matmul(x, w, bias, r, S, 254.0, 0.04, wmax, 10.0, wmax, 254.0, seed)
        launch_matmul(x, w, bias, r, S, 254.0, 0.04, wmax, 0.0, None, -1.0, seed)
        launch_matmul(x, w, bias, meta(S, M, dtype=torch.float32), S, 254.0, 0.0, None, 10.0, wmax, 254.0, None)

    return {
        "absmax": lambda: launch_absmax(w, S),
        "adc": lambda: launch_adc(y, r[:1], 0.04, wmax[0], 10.0, wmax[0], 254.0, seed, 0),
        "dac": lambda: launch_dac(x, r, S, 254.0),
        "input_range": input_range,
        "matmul": matmul,
        "matmul_dgrad": lambda: launch_matmul_dgrad(y, w, x, r, S, mask, 0.01, 0.95, False),
        "matmul_wgrad": lambda: launch_matmul_wgrad(y, x, r, S, mask, 254.0, torch.float32),
        "noise": lambda: launch_noise(seed, M, N, stream=2, plane=0),
        "std": lambda: launch_moments(x, S, meta(S, dtype=torch.bool)),
        "weight": weight,
    }


OPS = tuple(_operations(torch.bfloat16))


def _source(kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> ASTSource:
    """What Triton would compile for this launch: types, constants, and which arguments are multiples of 16."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        specialize = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialize and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPE_NAMES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialize and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes)


def _cuda_tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_cubin(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for command in (
                [_cuda_tool("cuobjdump"), "-res-usage", file.name],
                [_cuda_tool("nvdisasm"), "-c", file.name],
            )
        )
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "spilled_bytes": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        "tensor_core_instructions": sum(bool(re.match(r"[HIQD]G?MMA|UTC\w*MMA", i)) for i in instructions),
        "instructions": sum(i != "NOP" for i in instructions),
    }


def _read_amdgcn(assembly: str) -> dict[str, int]:
    instructions = re.findall(r"^\t([vsdgb][a-z0-9]*_[a-z0-9_]+)", assembly, re.M)

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1])

    return {
        "registers": field("vgpr_count"),
        "spilled_bytes": 4 * field("vgpr_spill_count"),
        "tensor_core_instructions": sum("mfma" in i for i in instructions),
        "instructions": len(instructions),
    }


def inspect(op: str, target: str, dtype: torch.dtype = torch.bfloat16) -> list[Report]:
    """Compile the kernels of ``op`` in their default configurations for ``target``; one report per kernel launched.

    Args:
        op: One of ``OPS``.
        target: One of ``TARGETS``.
        dtype: Storage dtype: fp32, bf16 or fp16.

    Raises:
        ValueError: unknown ``op`` or ``target``.
        RuntimeError: the process runs Triton's interpreter, which has no compiler.
    """
    for name, value, allowed in (("op", op, OPS), ("target", target, tuple(TARGETS))):
        if value not in allowed:
            raise ValueError(f"{name}: got {value!r}; allowed are {', '.join(allowed)}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set: the interpreter compiles nothing; unset it and start a new process"
        )

    launches: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []
    with launch.recording(lambda kernel, args, options: launches.append((kernel, args, options))):
        _operations(dtype)[op]()
    reports = []
    for kernel, args, options in launches:
        compiler_options = {k: v for k, v in options.items() if k in ("num_warps", "num_stages")}
        compiled = triton.compile(
            _source(kernel, args, options),
            target=TARGETS[target],
            options=compiler_options | {"enable_fp_fusion": True},
        )
        numbers = (
            _read_cubin(compiled.asm["cubin"]) if "cubin" in compiled.asm else _read_amdgcn(compiled.asm["amdgcn"])
        )
        reports.append(
            Report(
                op=op,
                kernel=kernel.__name__,
                target=target,
                dtype=_TYPE_NAMES[dtype],
                config=options,
                shared_bytes=compiled.metadata.shared,
                **numbers,
            )
        )
    return reports
