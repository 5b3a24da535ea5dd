"""How long a compiled kernel would take on a GPU that is not here: a few GPU facts and a cost model.

A multiprocessor runs its share of the programs, ``ceil(programs / multiprocessors)``, as many of them at once as fit. A
program feeds the tensor cores (``product``) and does everything else (``rest``):

    product  (tensor^3 + loads^3 + issue^3)^(1/3) of its rounds, as they mostly overlap; none faster than loads arrive
      tensor   the round's products at ``REACHABLE`` of the datasheet's rate
      loads    its operands at ``LOAD_BYTES`` a clock
      issue    the loop's instructions in all warps
    rest     the instructions outside of the loop once, the loop's output stage (or change of unit) once for each slice; or,
             where there is no product, all instructions, or the wait for each round's loads if that is longer

    cycles of a program = max(product, rest) + min(product, rest) * (OVERLAP if others run beside it, else 1)
    time = max(share * cycles / clock, bytes / (COPY * bandwidth)) + START

The constants' sources stand beside them. The exponent, ``WARP_RATE`` and ``OVERLAP`` are fitted to ``bench/NOTES.md``: times of
one H200, bf16, 8192 rows, 4096 to 4096 features in slices of 512. With Triton 3.9 the model makes of those:

    ====================================================  =================  ==============
                                                          measured           model
    ====================================================  =================  ==============
    forward with ADC, 64 x 128 and 4 warps                0.62 ms            0.64 ms
    128 x 128 and 8 warps instead; with noise             1.11 x             1.08 x, 1.21 x
    ``matmul_dgrad``, clip and integers, 128 x 128        0.51 ms            0.55 ms
    the same, 128 x 256                                   0.45 ms            0.49 ms
    forward with noise and ADC, 64 x 128 and 4 warps      0.82 ms            0.74 ms
    forward with noise, no ADC, 256 x 128                 about 0.46 ms (*)  0.51 ms
    forward with neither, 256 x 128                       0.38 to 0.44 (*)   0.43 ms
    ``matmul_wgrad``, 128 x 256                           0.39 to 0.41 (*)   0.40 ms
    ``noise``, from which ``SCHEDULER_RATE`` is           51 us              52 us
    ``weight``                                            33 us              49 us
    ``dac``                                               2.5 TB/s           3.9 TB/s
    ``absmax``                                            1.7 TB/s           3.4 TB/s
    ====================================================  =================  ==============

    (*) the notes' ratio to the plain product's 0.39 ms, for forwards less 0.05 ms of the launch that converts the input

Tiles of products that were compared are ordered as measured. For noise without an ADC the model puts 128 x 128 before
256 x 128, by 9 %: no time of that pair was kept. Of the element-wise kernels it knows too little, as the last lines show: where
it tells their configurations apart, it is by padding, instructions or latency. Nothing was measured on the other GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton

from triton_analog.launch.occupancy import SCHEDULERS
from triton_analog.launch.space import Problem
from triton_analog.tuning.cases import slices_for


@dataclass(frozen=True)
class Gpu:
    """Facts from a vendor's public datasheet."""

    target: str
    multiprocessors: int
    """AMD: compute units."""
    clock: float
    """Hz: the boost clock that the datasheet's FLOP/s are given for."""
    flops: float
    """FLOP/s of the tensor cores: dense, bf16 operands, fp32 sums."""
    bandwidth: float
    """Bytes/s of the DRAM."""


GPUS = {
    # Datasheets "NVIDIA H100 Tensor Core GPU" and "NVIDIA H200 Tensor Core GPU" (SXM); architecture whitepaper.
    "NVIDIA H100 80GB HBM3": Gpu("sm_90", 132, 1.83e9, 989.4e12, 3.35e12),
    "NVIDIA H200": Gpu("sm_90", 132, 1.83e9, 989.4e12, 4.8e12),
    # Datasheet "NVIDIA A100 Tensor Core GPU" (80 GB SXM).
    "NVIDIA A100-SXM4-80GB": Gpu("sm_80", 108, 1.41e9, 312e12, 2.039e12),
    # Datasheet "NVIDIA L40S"; whitepaper "NVIDIA Ada GPU architecture", which has the RTX 4090 too.
    "NVIDIA L40S": Gpu("sm_89", 142, 2.52e9, 362e12, 0.864e12),
    "NVIDIA GeForce RTX 4090": Gpu("sm_89", 128, 2.52e9, 165.2e12, 1.008e12),
    # Datasheet "NVIDIA HGX B200"; the clock follows from its FLOP/s and 8192 FLOP a clock.
    "NVIDIA B200": Gpu("sm_100", 148, 1.86e9, 2250e12, 7.7e12),
    # Datasheet "AMD Instinct MI300X Accelerator".
    "AMD Instinct MI300X": Gpu("gfx942", 304, 2.1e9, 1307.4e12, 5.3e12),
}
"""By the name that :func:`torch.cuda.get_device_name` reports."""

REACHABLE = 0.8
"""Of the datasheet's tensor FLOP/s: 790 of 989 TFLOP/s, the best published for plain products on an H100."""

COPY = 0.87
"""Of the datasheet's bandwidth: 4.2 of 4.8 TB/s, a copy on an H200 (``bench/NOTES.md``)."""

LOAD_BYTES = 64
"""A clock, from the L2 cache to one multiprocessor: the width of that port (NVIDIA: tuning guides; AMD: CDNA 3 whitepaper)."""

LATENCY = 480
"""Clocks until a load from DRAM arrives. H100: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU", 2024."""

START = 2.0
"""Microseconds of a launch that does nothing: what no configuration can save."""

WARP_RATE = 0.23
"""Instructions a clock that one warp issues, as each waits for earlier ones. Fitted."""

SCHEDULER_RATE = 0.7
"""Instructions a clock that a scheduler with many warps issues: 654 G normals/s of the noise field (``bench/NOTES.md``)."""

OVERLAP = 0.45
"""Share of a program's shorter part that others do not hide: they overlap by chance only. Fitted to two programs."""

LOOP_INSTRUCTIONS = 100, 2
"""Of a round of a product's loop without output stage: these, and so many for each tensor-core instruction. Fitted to what
the compilers make for sm_80 (T = 32, 64, 128: about 165, 235, 325) and sm_90 (T = 4: 88 to 108)."""


@dataclass(frozen=True)
class Compiled:
    """The compiler's numbers of one kernel; see :class:`triton_analog.tuning.inspect.Report`."""

    registers: int
    spilled_bytes: int
    tensor_core_instructions: int
    instructions: int
    hottest_loop: int
    shared_bytes: int
    occupancy: int


@dataclass(frozen=True)
class Work:
    """What a launch has to do."""

    programs: int
    rounds: int
    """Of a program's hottest loop."""
    bytes: float
    """That have to come from DRAM or go there."""
    flops: float = 0
    """Of a round's product, 0 where there is none."""
    loaded: int = 0
    """Bytes of a round's operands."""
    finishes: int = 0
    """How many rounds of a program also finish a slice."""


def gpus_of(target: str) -> list[str]:
    """The names of the GPUs of an architecture that the model knows."""
    return [name for name, gpu in GPUS.items() if gpu.target == target]


# ---- What each operation has to do ----------------------------------------------------------------------------------------


def _product(
    problem: Problem, tile: tuple[int, int, int], tiles: int, depth: int, elements: float, finishes: int = 0
) -> Work:
    """``tiles`` of ``tile[0]`` x ``tile[1]`` outputs, each over ``depth`` blocks of ``tile[2]``; ``elements`` to read and
    write."""
    size = problem.dtype.itemsize
    rows, columns, inner = tile
    return Work(
        tiles, depth, elements * size, 2.0 * rows * columns * inner, (rows + columns) * inner * size, finishes
    )  # fmt: skip


def _matmul(problem: Problem, config: Any) -> Work:
    (rows, columns, width), (per_slice, *_) = problem.sizes, problem.flags
    slices = slices_for(width)
    features = width * slices
    tiles = triton.cdiv(rows, config.BLOCK_M) * triton.cdiv(columns, config.BLOCK_N)
    elements = rows * features + columns * features + rows * columns * (1 + per_slice * slices / 8 / 2)  # with a mask
    depth = slices * triton.cdiv(width, config.BLOCK_K)
    tile = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    return _product(problem, tile, tiles, depth, elements, slices)


def _matmul_dgrad(problem: Problem, config: Any) -> Work:
    (rows, columns, width), (ranged,) = problem.sizes, problem.flags
    slices = slices_for(width) if ranged else 1
    tiles = triton.cdiv(rows, config.BLOCK_M) * slices * triton.cdiv(width, config.BLOCK_K)
    elements = rows * columns + width * slices * (columns + (3 if ranged else 1) * rows)
    tile = config.BLOCK_M, config.BLOCK_K, config.BLOCK_N
    return _product(problem, tile, tiles, triton.cdiv(columns, config.BLOCK_N), elements)


def _matmul_wgrad(problem: Problem, config: Any) -> Work:
    rows, columns, width = problem.sizes
    slices = slices_for(width)
    tiles = triton.cdiv(columns, config.BLOCK_N) * slices * triton.cdiv(width, config.BLOCK_K)
    elements = rows * columns + width * slices * (rows + columns)
    tile = config.BLOCK_N, config.BLOCK_K, config.BLOCK_M
    return _product(problem, tile, tiles, triton.cdiv(rows, config.BLOCK_M), elements)


def _tiles(problem: Problem, block_rows: int, block_columns: int) -> tuple[int, int]:
    rows, columns = problem.sizes
    return triton.cdiv(rows, block_rows), triton.cdiv(columns, block_columns)


def _pass(moved: float, rows: str, columns: str, *, loops: bool = False, sliced: bool = True) -> Callable[..., Work]:
    """An element-wise operation that reads and writes ``moved`` bytes for each element, in tiles of the configuration's
    fields ``rows`` x ``columns``; ``loops``: a program takes a slice's tiles one after the other."""

    def work(problem: Problem, config: Any) -> Work:
        down, across = _tiles(problem, getattr(config, rows), getattr(config, columns))
        slices = slices_for(problem.sizes[1]) if sliced else 1
        size = problem.sizes[0] * problem.sizes[1] * slices * moved
        return Work(down * slices * (1 if loops else across), across if loops else 1, size)

    return work


def _shared_out(problem: Problem, config: Any, block_rows: int) -> Work:
    """A fixed number of programs, which share the tiles out."""
    down, across = _tiles(problem, block_rows, config.BLOCK_K)
    slices = slices_for(problem.sizes[1])
    programs = max(1, min(down * across, config.programs // slices))
    size = problem.sizes[0] * problem.sizes[1] * slices * problem.dtype.itemsize
    return Work(programs * slices, triton.cdiv(down * across, programs), size)


_WORK: dict[str, Callable[[Problem, Any], Work]] = {
    "absmax": _pass(2, "BLOCK_N", "BLOCK_K", loops=True),
    "adc": _pass(4.125, "BLOCK_M", "BLOCK_N", sliced=False),
    "adc_grad": _pass(4.125, "BLOCK_M", "BLOCK_N", sliced=False),
    "dac": _pass(4, "BLOCK_M", "BLOCK_K"),
    "dac_steps": _pass(3.25, "BLOCK_M", "BLOCK_K", sliced=False),
    "extrema": lambda problem, config: _shared_out(problem, config, config.BLOCK_M),
    "input_range_grad": _pass(6, "BLOCK_M", "BLOCK_K"),
    "matmul": _matmul,
    "matmul_dgrad": _matmul_dgrad,
    "matmul_wgrad": _matmul_wgrad,
    "noise": _pass(4, "BLOCK_M", "BLOCK_N", sliced=False),
    "std": lambda problem, config: _shared_out(problem, config, config.LOADS * config.BLOCK_M),
    "weight": _pass(4, "BLOCK_N", "BLOCK_K", loops=True),
    "weight_grad": _pass(6, "BLOCK_N", "BLOCK_K", loops=True),
}


def work_of(op: str, problem: Problem, config: Any) -> Work:
    """What the launch that ``config`` configures has to do. Other launches of an operation cost the same in all
    configurations."""
    return _WORK[op](problem, config)


# ---- Time ---------------------------------------------------------------------------------------------------------------


def microseconds(gpu: Gpu, work: Work, compiled: Compiled, num_warps: int, num_stages: int = 3) -> float:
    """How long a launch takes.

    Args:
        num_stages: Of the configuration: loads run so many rounds ahead, less one.
    """
    share = triton.cdiv(work.programs, gpu.multiprocessors)
    resident = min(compiled.occupancy, share)

    def issue(instructions: float) -> float:
        """Clocks of one program's share of the schedulers."""
        warps = num_warps / SCHEDULERS
        return instructions * warps / min(SCHEDULER_RATE, WARP_RATE * warps * resident)

    loop, product = compiled.hottest_loop, 0.0
    if work.flops:
        fixed, each = LOOP_INSTRUCTIONS
        plain = min(loop, fixed + each * compiled.tensor_core_instructions) if work.finishes else loop
        tensor = work.flops / (REACHABLE * gpu.flops / gpu.clock / gpu.multiprocessors)
        round_ = (tensor**3 + (work.loaded / LOAD_BYTES) ** 3 + issue(plain) ** 3) ** (1 / 3)
        product = work.rounds * max(round_, LATENCY / (max(1, num_stages - 1) * resident))
        rest = LATENCY + issue(compiled.instructions - loop + work.finishes * (loop - plain))
    else:
        rest = max(issue(compiled.instructions + (work.rounds - 1) * loop), work.rounds * LATENCY / resident)
    cycles = max(product, rest) + min(product, rest) * (OVERLAP if resident > 1 else 1)
    return 1e6 * max(share * cycles / gpu.clock, work.bytes / (COPY * gpu.bandwidth)) + START
