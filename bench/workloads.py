"""What is trained: single layers and whole models, at sizes that fit the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.models import ENCODER, SMALL_DECODER, SMALL_ENCODER, SMOLLM2, Transformer
from bench.recipes import EVERYTHING, FLAGSHIP, LIGHTNING, Recipe

SUITES = ("ops", "layers", "models", "host")


@dataclass(frozen=True)
class Workload:
    """One race: a digital model in fp32 on the CPU, its input, and what is simulated."""

    name: str
    suite: str
    group: str
    """Workloads of a group are one line in a plot."""
    size: int
    """Where it is on that line; 0: on none."""
    build: Callable[[], nn.Module]
    input: Callable[[], Tensor]
    recipe: Recipe
    dtype: torch.dtype
    steps: bool = False
    """Whether a timed step also updates the weights."""
    compiled: bool = False
    """Whether the compiled contender takes part: each of its shapes takes long to compile."""
    inputs: int = 0
    """Of a linear layer, for what is known of it in theory; 0 for everything else."""
    outputs: int = 0
    rows: int = 0
    flops: float = 0.0
    """Of forward and backward of the digital model; 0: not stated."""
    tolerance: float = 1e-2

    @property
    def least_bytes(self) -> int:
        """What the three products of forward and backward have to move: every operand and every result once."""
        rows, k, n = self.rows, self.inputs, self.outputs
        return 3 * (rows * k + n * k + rows * n) * self.dtype.itemsize


def linear(
    group: str,
    name: str,
    rows: int,
    inputs: int,
    outputs: int,
    recipe: Recipe,
    dtype: torch.dtype,
    size: int = 0,
    **options: bool,
) -> Workload:
    return Workload(
        name, "layers", group, size,
        lambda: nn.Linear(inputs, outputs), lambda: torch.randn(rows, inputs), recipe, dtype,
        inputs=inputs, outputs=outputs, rows=rows, flops=6.0 * rows * inputs * outputs,
        tolerance=1e-2 if dtype == torch.float32 else 3e-2, **options,
    )  # fmt: skip


def lightnings_own(sizes: tuple[int, ...], dtype: torch.dtype) -> list[Workload]:
    """Square layers, 512 rows, forward, backward and AdamW step, on one tile and on tiles of 512 inputs."""
    return [
        linear(
            f"Lightning's own, {'one tile' if tile < 0 else f'tiles of {tile}'}, by inputs",
            f"{size} x {size}, {'one tile' if tile < 0 else f'{size // tile} slices'}",
            512, size, size, {**LIGHTNING, "mapping.max_input_size": tile}, dtype, size,
            steps=True, compiled=size == sizes[0],
        )
        for tile in (-1, 512)
        for size in sizes
    ]  # fmt: skip


def squares(sizes: tuple[int, ...], dtype: torch.dtype) -> list[Workload]:
    """The same layers with everything on, forward and backward."""
    return [
        linear(
            "everything on, tiles of 512, by inputs", f"512 x {size} to {size}, {size // 512} slices",
            512, size, size, EVERYTHING, dtype, size, compiled=size == sizes[0],
        )
        for size in sizes
    ]  # fmt: skip


def by_rows(rows: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype) -> list[Workload]:
    """One layer of a language model with everything on, forward and backward, for more and more tokens."""
    return [
        linear(
            f"everything on, {inputs} to {outputs}, by rows", f"{count} x {inputs} to {outputs}, {inputs // 512} slices",
            count, inputs, outputs, EVERYTHING, dtype, count, compiled=count == rows[-1],
        )
        for count in rows
    ]  # fmt: skip


def language_models(shapes: list[tuple[str, int, int, int]], dtype: torch.dtype) -> list[Workload]:
    """Layers of language models with everything on, forward and backward: model, rows, inputs, outputs."""
    return [
        linear(
            "everything on", f"{name}, {rows} x {inputs} to {outputs}", rows, inputs, outputs, EVERYTHING, dtype
        )
        for name, rows, inputs, outputs in shapes
    ]  # fmt: skip


def flagship(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Workload:
    group = "Analog Foundation Models' recipe"
    return linear(group, f"{rows} x {inputs} to {outputs}", rows, inputs, outputs, FLAGSHIP, dtype, steps=True)


def convolution(channels: int, side: int, batch: int, dtype: torch.dtype) -> Workload:
    return Workload(
        f"{batch} x {channels} x {side} x {side}, 3 x 3", "layers", "convolution, everything on", 0,
        lambda: nn.Conv2d(channels, channels, 3, padding=1), lambda: torch.randn(batch, channels, side, side),
        EVERYTHING, dtype, flops=6.0 * batch * side**2 * channels**2 * 9,
        tolerance=1e-2 if dtype == torch.float32 else 3e-2,
    )  # fmt: skip


def lstm(features: int, batch: int, length: int, dtype: torch.dtype) -> Workload:
    return Workload(
        f"{length} steps x {batch} x {features}", "layers", "LSTM, everything on", 0,
        lambda: nn.LSTM(features, features), lambda: torch.randn(length, batch, features),
        EVERYTHING, dtype, flops=6.0 * batch * length * 8 * features**2,
        tolerance=2e-2 if dtype == torch.float32 else 1e-1,
    )  # fmt: skip


def model(shape: Transformer, batch: int, length: int, dtype: torch.dtype) -> Workload:
    return Workload(
        f"{shape.name}, {batch} x {length} tokens", "models", "model", 0,
        shape.build, lambda: torch.randint(shape.vocabulary, (batch, length)), EVERYTHING, dtype,
        steps=True, flops=shape.flops(batch, length), tolerance=5e-2 if dtype == torch.float32 else 0.25,
    )  # fmt: skip


def cpu_workloads(quick: bool) -> list[Workload]:
    """What two cores do within minutes; ``quick`` leaves the larger layers out."""
    dtype = torch.float32
    return [
        *lightnings_own((1024, 2048) if quick else (1024, 2048, 3072, 4608), dtype),
        *squares((1024, 2048), dtype),
        *language_models([("SmolLM2-135M", 2048, 576, 1536), ("SmolLM2-135M", 2048, 1536, 576)], dtype),
        flagship(512, 1024, 1024, dtype),
        convolution(64, 16, 16, dtype),
        lstm(128, 16, 16, dtype),
        model(SMALL_DECODER, 2, 64, dtype),
        model(SMALL_ENCODER, 8, 32, dtype),
    ]


def gpu_workloads(quick: bool) -> list[Workload]:
    """The sizes that the field is measured at; ``quick`` leaves the ends of each line."""
    brain, half = torch.bfloat16, torch.float16
    shapes = [
        ("SmolLM2-135M", 8192, 576, 1536),
        ("Llama-1B", 8192, 2048, 8192),
        ("Phi-3-mini", 4096, 8192, 3072),
        ("Llama-8B", 8192, 4096, 14336),
    ]
    return [
        *by_rows((2048, 8192) if quick else (2048, 8192, 16384), 4096, 4096, brain),
        *lightnings_own((1024, 4608) if quick else (1024, 2048, 3072, 4608), half),
        flagship(8192, 3072, 8192, brain),
        *language_models(shapes[:2] if quick else shapes, brain),
        convolution(128, 32, 64, brain),
        lstm(512, 64, 32, brain),
        model(SMOLLM2, 8, 1024, brain),
        model(ENCODER, 64, 128, brain),
    ]


def workloads(device: torch.device, quick: bool) -> list[Workload]:
    """In the order of their importance, as time may run out."""
    return gpu_workloads(quick) if device.type == "cuda" else cpu_workloads(quick)
