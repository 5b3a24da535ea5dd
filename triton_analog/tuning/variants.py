"""What the inspector compiles: every operation, in variants that differ in what is switched on.

A new variant is one more pair of a label and a call of the launcher in :func:`variants`; nothing else has to know of it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor

from triton_analog.ops.absmax import launch_absmax
from triton_analog.ops.adc import launch_adc, launch_adc_grad
from triton_analog.ops.clip import clip_batches, launch_clip
from triton_analog.ops.dac import launch_dac, launch_dac_steps
from triton_analog.ops.input_range import (
    launch_extrema,
    launch_input_range_grad,
    launch_input_range_learn,
    launch_input_range_update,
)
from triton_analog.ops.matmul import launch_matmul
from triton_analog.ops.matmul_dgrad import launch_matmul_dgrad
from triton_analog.ops.matmul_wgrad import launch_matmul_wgrad
from triton_analog.ops.noise import launch_noise
from triton_analog.ops.program import launch_program
from triton_analog.ops.std import launch_moments, launch_std
from triton_analog.ops.weight import launch_weight, launch_weight_grad
from triton_analog.reference.adc import mask_shape

Variants = dict[str, list[tuple[str, Callable[[], object]]]]


def variants(dtype: torch.dtype, rows: int = 4096) -> Variants:
    """Per operation: a label for what is switched on, and a function that launches it on meta tensors.

    Args:
        dtype: Storage dtype of inputs and weights.
        rows: Number of input rows (the batch); features are as in large models.
    """
    M, N, K, S = rows, 2048, 2048, 4

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def numbers(*shape: int) -> Tensor:
        return meta(*shape, dtype=torch.float32)

    def clip(weight: Tensor, channel_dim: int | None) -> None:
        for batch in clip_batches([weight], [2.5], [channel_dim]):
            assert batch.table is not None
            launch_clip(weight, channel_dim, batch.table)

    def program(cell: str, log2_time: float, read: float, shift: float, spread: float, lowest: float) -> Tensor:
        return launch_program(
            w,
            wmax,
            seed,
            numbers(1024, 4),
            None,
            None,
            cell,
            (1.0,),
            0.0,
            25.0,
            log2_time,
            read,
            shift,
            spread,
            lowest,
            inf,
            -inf,
            inf,
            1,
        )

    x, y, w, bias = meta(M, K), meta(M, N), meta(N, K), meta(N)
    static, dynamic, wmax = numbers(S), numbers(S, M), numbers(S, N)
    seed, count = meta(1, dtype=torch.int64), meta(S, dtype=torch.int64)
    mask = meta(*mask_shape(S, M, N), dtype=torch.int32)
    steps, w8 = meta(M, K, dtype=torch.int8), meta(N, K, dtype=torch.int8)
    clipped = meta(2, M, K // 8, dtype=torch.uint8)
    off = (0.0, None, 0.0, None, -1.0, None)
    random: dict[str, Any] = {"inp_noise": 0.02, "inp_sto_round": True, "seed": seed}

    return {
        "absmax": [("plain", lambda: launch_absmax(w, S))],
        "adc": [
            ("noise+adc", lambda: launch_adc(y, static[:1], 0.04, wmax[0], 10.0, wmax[0], 254.0, seed, 0)),
            ("grad", lambda: launch_adc_grad(y, mask)),
        ],
        "clip": [
            ("channels", lambda: clip(w, 0)),
            ("transposed", lambda: clip(w, 1)),
            ("whole", lambda: clip(w, None)),
        ],
        "dac": [
            ("static", lambda: launch_dac(x, static, S, 254.0)),
            ("dynamic", lambda: launch_dac(x, dynamic, S, 254.0)),
            ("random", lambda: launch_dac(x, static, S, 254.0, **random)),
            ("steps", lambda: launch_dac_steps(x, static, S, 254.0)),
            ("random steps", lambda: launch_dac_steps(x, static, S, 254.0, True, seed)),
        ],
        "input_range": [
            ("grad", lambda: launch_input_range_grad(x, x, static, S, 0.01, 0.95, False)),
            ("update", lambda: launch_input_range_update(static, count, static, numbers(S, 3), 100, 3.0)),
            ("learn", lambda: launch_input_range_learn(x, static, count, static, S, 100, 3.0)),
            ("extrema", lambda: launch_extrema(x, S)),
        ],
        "matmul": [
            ("dac+noise+adc", lambda: launch_matmul(x, w, bias, static, S, 254.0, 0.04, wmax, 10.0, wmax, 254.0, seed)),
            ("dac+adc", lambda: launch_matmul(x, w, bias, static, S, 254.0, 0.0, None, 10.0, wmax, 254.0, None)),
            ("dac+noise", lambda: launch_matmul(x, w, bias, static, S, 254.0, 0.04, wmax, 0.0, None, -1.0, seed)),
            ("dac", lambda: launch_matmul(x, w, bias, static, S, 254.0, *off)),
            (
                "dynamic+noise+adc",
                lambda: launch_matmul(x, w, bias, dynamic, S, 254.0, 0.04, wmax, 10.0, wmax, 254.0, seed),
            ),
            ("dynamic+noise", lambda: launch_matmul(x, w, bias, dynamic, S, 254.0, 0.04, wmax, 0.0, None, -1.0, seed)),
            ("random+adc", lambda: launch_matmul(x, w, bias, static, S, 254.0, 0.0, None, 10.0, wmax, 254.0, **random)),
            ("int8", lambda: launch_matmul(x, w8, bias, static, S, 254.0, *off, wmax, 254.0)),
            (
                "int8+adc",
                lambda: launch_matmul(
                    x, w8, bias, static, S, 254.0, 0.0, None, 10.0, wmax, 254.0, None, wmax, 254.0, False
                ),
            ),
            ("plain", lambda: launch_matmul(x, w, None, None, S, -1.0, *off)),
        ],
        "matmul_dgrad": [
            (
                "range+mask+steps",
                lambda: launch_matmul_dgrad(y, w, x, None, static, S, mask, 0.01, 0.95, False, 254.0, True),
            ),
            (
                "range+steps",
                lambda: launch_matmul_dgrad(y, w, x, None, static, S, None, 0.01, 0.95, False, 254.0, True),
            ),
            (
                "int8+mask+steps",
                lambda: launch_matmul_dgrad(y, w, steps, clipped, static, S, mask, 0.01, 0.95, False, 254.0, True),
            ),
            ("plain", lambda: launch_matmul_dgrad(y, w, x, None, None, S, None, 0.0, 0.95, False)),
        ],
        "matmul_wgrad": [
            (
                "steps+mask+bias",
                lambda: launch_matmul_wgrad(y, x, static, S, mask, 254.0, dtype, converted=True, bias_dtype=dtype),
            ),
            ("dac", lambda: launch_matmul_wgrad(y, x, static, S, None, 254.0, dtype)),
            ("dynamic", lambda: launch_matmul_wgrad(y, x, dynamic, S, None, 254.0, dtype)),
            ("plain", lambda: launch_matmul_wgrad(y, x, None, S, None, -1.0, dtype)),
        ],
        "noise": [("plain", lambda: launch_noise(seed, M, N, stream=2, plane=0))],
        "program": [
            ("pair", lambda: program("pair", 12.0, 5.0, 0.0, 0.0, 0.0)),
            ("single", lambda: program("single", 0.0, 5.0, -0.5, 0.5, 9.0)),
            ("signed", lambda: program("signed", 0.0, 0.0, 0.0, 0.0, -inf)),
        ],
        "std": [
            ("plain", lambda: launch_std(x, S)),
            ("moments", lambda: launch_moments(x, S, meta(S, dtype=torch.bool))),
        ],
        "weight": [
            (
                "quantize+noise",
                lambda: launch_weight(w, S, None, "per_channel", 254.0, "per_channel", 0.02, seed, dtype),
            ),
            ("quantize", lambda: launch_weight(w, S, None, "per_channel", 254.0, "none", 0.0, None, dtype)),
            ("int8", lambda: launch_weight(w, S, None, "per_channel", 254.0, "none", 0.0, None, torch.int8)),
            (
                "per tensor",
                lambda: launch_weight(w, S, None, "per_tensor", 254.0, "per_tensor", 0.02, seed, dtype),
            ),
            ("clip", lambda: launch_weight(w, S, wmax, "none", 0.0, "none", 0.0, None, dtype)),
            ("grad", lambda: launch_weight_grad(w, w, wmax, S, "per_channel", 254.0)),
        ],
    }
