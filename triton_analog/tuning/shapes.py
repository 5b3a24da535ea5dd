"""Which problems a sweep tunes: layers of known models, or given ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import triton

from triton_analog.launch import Hardware, aligned
from triton_analog.launch.space import Problem, Space
from triton_analog.reference.slicing import num_slices


class Layer(NamedTuple):
    """Features in and out of a linear layer."""

    inputs: int
    outputs: int


MODELS = {
    "llama-8b": (Layer(4096, 4096), Layer(4096, 1024), Layer(4096, 14336), Layer(14336, 4096)),
    "phi-3-mini": (Layer(3072, 9216), Layer(3072, 3072), Layer(3072, 16384), Layer(8192, 3072)),
    "smollm2-135m": (Layer(576, 576), Layer(576, 192), Layer(576, 1536), Layer(1536, 576)),
}
"""Distinct linear layers of a decoder block: Llama-3 8B, Phi-3-mini (its fused projections), SmolLM2-135M."""

ROWS = (2048, 8192)
SLICE = 512
"""Inputs of a tile unless another size is asked for."""

TRAINING_FLAGS: dict[str, tuple[tuple[bool, ...], ...]] = {
    "adc": ((True, True),),
    "dac": ((False,),),
    "matmul": ((True, True, False), (True, False, False), (False, True, False), (False, False, False)),
    "matmul_dgrad": ((True,),),
}
"""What is switched on while training with a static input range. Flags that follow from a layer's shape are not listed."""


def _sizes_and_flags(
    space: Space[Any], layer: Layer, rows: int, slices: int, on: Sequence[str] | None
) -> tuple[tuple[int, ...], tuple[tuple[bool, ...], ...]]:
    """A problem's sizes, and the combinations of its flags."""
    width, even = triton.cdiv(layer.inputs, slices), aligned(layer.inputs, slices)
    if space.op == "weight":
        return (layer.outputs, width + (0 if even else 15)), tuple(
            (noise, even) for noise in ((True, False) if on is None else ("noise" in on,))
        )
    if space.op in ("weight_grad", "absmax"):
        rows = layer.outputs
    named = {"rows": rows, "columns": layer.outputs, "width": width, "features": layer.inputs}
    if space.flags == ("wide_loads",):
        flags: tuple[tuple[bool, ...], ...] = ((layer.inputs % 16 == 0,),)
    elif on is None:
        flags = TRAINING_FLAGS.get(space.op, ((),))
    else:
        flags = (tuple(name in on for name in space.flags),)
    return tuple(named[name] for name in space.sizes), flags


def problems(
    space: Space[Any],
    hardware: Hardware,
    layers: Sequence[Layer],
    rows: Sequence[int] = ROWS,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    max_input_size: int = SLICE,
    on: Sequence[str] | None = None,
) -> Iterator[Problem]:
    """What ``space`` has to solve in these layers, each problem once.

    Args:
        on: The flags that are on; None for all combinations of training.
    """
    seen = set()
    for dtype, layer, batch in product(dtypes, layers, rows):
        sizes, flags = _sizes_and_flags(space, layer, batch, num_slices(layer.inputs, max_input_size), on)
        for chosen in flags:
            problem = Problem(hardware, torch.float32 if space.op == "noise" else dtype, sizes, chosen)
            key = space.key(problem)
            if key not in seen:
                seen.add(key)
                yield problem
