"""What is trained: single layers and whole models, at sizes that fit the machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.models import ENCODER, SMALL_DECODER, SMALL_ENCODER, SMOLLM2, Transformer
from bench.recipes import EVERYTHING, FLAGSHIP, LIGHTNING, Recipe

SUITES = ("ops", "layers", "models")


@dataclass(frozen=True)
class Workload:
    """One race: a digital model in fp32 on the CPU, its input, and what is simulated."""

    name: str
    suite: str
    group: str
    """Workloads of a group are one line in a plot."""
    size: int
    """Where it is on that line."""
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
    group: str, name: str, rows: int, inputs: int, outputs: int, recipe: Recipe, dtype: torch.dtype, **options: bool
) -> Workload:
    return Workload(
        name, "layers", group, inputs,
        lambda: nn.Linear(inputs, outputs), lambda: torch.randn(rows, inputs), recipe, dtype,
        inputs=inputs, outputs=outputs, rows=rows, flops=6.0 * rows * inputs * outputs,
        tolerance=1e-2 if dtype == torch.float32 else 3e-2, **options,
    )  # fmt: skip


def lightnings_own(sizes: tuple[int, ...], dtype: torch.dtype, compiled: int) -> list[Workload]:
    """Square layers, 512 rows, forward, backward and AdamW step, on one tile and on tiles of 512 inputs."""
    return [
        linear(
            f"Lightning's own, {'one tile' if tile < 0 else f'tiles of {tile}'}",
            f"{size} x {size}, {'one tile' if tile < 0 else f'{size // tile} slices'}",
            512, size, size, {**LIGHTNING, "mapping.max_input_size": tile}, dtype,
            steps=True, compiled=size == compiled,
        )
        for tile in (-1, 512)
        for size in sizes
    ]  # fmt: skip


def language_models(shapes: list[tuple[str, int, int, int]], dtype: torch.dtype, compiled: str) -> list[Workload]:
    """Layers of language models with everything on: model, rows, inputs, outputs."""
    return [
        linear(
            "everything on, tiles of 512", f"{model}: {rows} x {inputs} to {outputs}",
            rows, inputs, outputs, EVERYTHING, dtype, compiled=model == compiled,
        )
        for model, rows, inputs, outputs in shapes
    ]  # fmt: skip


def flagship(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Workload:
    group = "Analog Foundation Models' recipe"
    return linear(group, f"{rows} x {inputs} to {outputs}", rows, inputs, outputs, FLAGSHIP, dtype, steps=True)


def convolution(channels: int, side: int, batch: int, dtype: torch.dtype) -> Workload:
    return Workload(
        f"{batch} x {channels} x {side} x {side}, 3 x 3", "layers", "convolution, everything on", channels,
        lambda: nn.Conv2d(channels, channels, 3, padding=1), lambda: torch.randn(batch, channels, side, side),
        EVERYTHING, dtype, flops=6.0 * batch * side**2 * channels**2 * 9,
        tolerance=1e-2 if dtype == torch.float32 else 3e-2,
    )  # fmt: skip


def lstm(features: int, batch: int, length: int, dtype: torch.dtype) -> Workload:
    return Workload(
        f"{length} steps x {batch} x {features}", "layers", "LSTM, everything on", features,
        lambda: nn.LSTM(features, features), lambda: torch.randn(length, batch, features),
        EVERYTHING, dtype, flops=6.0 * batch * length * 8 * features**2,
        tolerance=2e-2 if dtype == torch.float32 else 1e-1,
    )  # fmt: skip


def model(shape: Transformer, batch: int, length: int, dtype: torch.dtype) -> Workload:
    tokens = batch * length
    return Workload(
        f"{shape.name}, {batch} x {length} tokens", "models", shape.name, tokens,
        shape.build, lambda: torch.randint(shape.vocabulary, (batch, length)), EVERYTHING, dtype,
        steps=True, flops=shape.flops(batch, length), tolerance=5e-2 if dtype == torch.float32 else 0.25,
    )  # fmt: skip


def cpu_workloads() -> list[Workload]:
    """What two cores do within minutes."""
    dtype = torch.float32
    return [
        *lightnings_own((1024, 2048, 3072, 4608), dtype, compiled=1024),
        *language_models(
            [("SmolLM2-135M", 2048, 576, 1536), ("SmolLM2-135M", 2048, 1536, 576), ("square", 512, 1024, 1024),
             ("square ", 512, 2048, 2048)],
            dtype, "square",
        ),
        flagship(512, 1024, 1024, dtype),
        convolution(64, 16, 16, dtype),
        lstm(128, 16, 16, dtype),
        model(SMALL_DECODER, 2, 64, dtype),
        model(SMALL_ENCODER, 8, 32, dtype),
    ]  # fmt: skip


def gpu_workloads(quick: bool) -> list[Workload]:
    """The sizes that the field is measured at; ``quick`` leaves the ends of each line."""
    half, wide = torch.bfloat16, torch.float16
    shapes = [
        ("Llama-8B", 8192, 4096, 4096), ("SmolLM2-135M", 8192, 576, 1536), ("Llama-1B", 8192, 2048, 8192),
        ("Phi-3-mini", 2048, 8192, 3072), ("Llama-8B ", 16384, 4096, 14336),
    ]  # fmt: skip
    return [
        *language_models(shapes[:2] if quick else shapes, half, "Llama-8B"),
        *lightnings_own((1024, 4608) if quick else (1024, 2048, 3072, 4608), wide, compiled=1024),
        flagship(8192, 3072, 8192, half),
        convolution(128, 32, 64, half),
        lstm(512, 64, 32, half),
        model(SMOLLM2, 8, 1024, half),
        model(ENCODER, 64, 128, half),
    ]


def workloads(device: torch.device, quick: bool) -> list[Workload]:
    """In the order of their importance, as time may run out."""
    return gpu_workloads(quick) if device.type == "cuda" else cpu_workloads()
