"""AIHWKIT-Lightning in its Triton mode, made to run on the Triton versions of today.

Its kernels are compiled as they are. Three things around them stopped working, and are replaced in the imported modules:
a global number has to be a ``constexpr``, the check for kernels that are not autotuned looks into a launcher, and the
weight kernel is handed block sizes that its autotuner chooses as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn
from triton.runtime.autotuner import Autotuner

from bench.peers.base import UnsupportedError
from bench.peers.lightning import Lightning
from bench.recipes import Recipe

SWITCH = "AIHWKIT_USE_TRITON"
"""It reads this variable in every forward; any text switches it on."""


def names_blocks(kernel: Any, grid: Any) -> bool:
    """Whether a kernel's block sizes are the caller's to give."""
    return not isinstance(kernel, Autotuner) and any("BLOCK_SIZE" in name for name in kernel.arg_names)


class WithoutBlocks:
    """An autotuned kernel that drops the block sizes it is given."""

    def __init__(self, kernel: Autotuner) -> None:
        self.kernel = kernel
        self.given = [name for name in kernel.arg_names if "BLOCK_SIZE" not in name]

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args: self.kernel[grid](*args[: len(self.given)])


def round_half_to_even(x: Any) -> Any:
    """For the interpreter, which has no libdevice; right up to 2**22."""
    return (x.to(tl.float32) + 12582912.0) - 12582912.0


@cache
def adapt() -> None:
    """Once in a process."""
    from aihwkit_lightning.nn.modules.triton_utils import triton_abs_max, triton_linear, triton_std

    for module in (triton_abs_max, triton_linear, triton_std):
        module.requires_blocksizes = names_blocks
        tiny = getattr(module, "FLOAT32_TINY", None)
        if isinstance(tiny, float):
            module.FLOAT32_TINY = tl.constexpr(tiny)
    if isinstance(triton_linear.modifier_kernel, Autotuner):
        triton_linear.modifier_kernel = WithoutBlocks(triton_linear.modifier_kernel)
    if triton.knobs.runtime.interpret:
        tl.extra.cuda.libdevice.rint = round_half_to_even


class TritonMode(nn.Module):
    """A model whose forwards run with the switch on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.analog_layers = model.analog_layers

    def forward(self, *args: Any) -> Any:
        os.environ[SWITCH] = "1"
        try:
            return self.model(*args)
        finally:
            del os.environ[SWITCH]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.named_parameters(*args, **kwargs)


class LightningTriton(Lightning):
    name = "aihwkit-lightning (Triton)"
    known_defects = frozenset({"noise", "weights", "input_range"})
    """Its output noise depends on block sizes, its weight noise stays in the weights, and every slice's input range gets the
    gradients of all slices."""

    def absent(self, device: torch.device) -> str | None:
        missing = super().absent(device)
        if missing is None and device.type != "cuda" and not triton.knobs.runtime.interpret:
            return "it needs a GPU"
        return missing

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Its kernels cast whatever is not fp32 to fp16, and fail on bf16."""
        return torch.float16 if dtype == torch.bfloat16 else dtype

    def convert(self, digital: nn.Module, recipe: Recipe) -> nn.Module:
        if any(isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) for module in digital.modules()):
            raise UnsupportedError("its convolutions call the kernel without one of the arguments")
        adapt()
        return TritonMode(super().convert(digital, recipe))
