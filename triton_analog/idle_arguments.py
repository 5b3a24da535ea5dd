"""Arguments of a call of the functional layer that do nothing, or were hardly meant: said once for each place in the code."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch

from triton_analog.calls import Numbers
from triton_analog.hints import bits_for_steps, warn_user

_said: set[tuple[str, int, str]] = set()


def remark(numbers: Numbers, stored_range: bool) -> None:
    """Warn of what is idle in a call with these ``numbers``, unless the library itself called: its configs tell of theirs.

    To be called by the function that the user calls. Compilers trace nothing of it.
    """
    if torch.compiler.is_compiling():
        return
    text = _text(numbers, stored_range)
    if text:
        caller: Any = sys._getframe(2)
        place = caller.f_code.co_filename, caller.f_lineno, text
        if place not in _said and not str(caller.f_globals.get("__name__")).startswith("triton_analog."):
            _said.add(place)
            warn_user(text)


@lru_cache(maxsize=1024)
def _text(numbers: Numbers, stored_range: bool) -> str:
    """Name, value, why and remedy of every argument that cannot act as the others are; empty if all of them do."""
    n = numbers
    kinds = "'per_tensor' or 'per_channel'"
    decays = stored_range and not n.fast_mode
    rules = (
        ("weight_noise_std", n.weight_noise_std > 0 and n.weight_noise == "none", "weight_noise is 'none'", kinds),
        ("weight_noise", n.weight_noise != "none" and n.weight_noise_std == 0, "weight_noise_std is 0", "a deviation"),
        ("weight_res", n.weight_res > 0 and n.weight_quantization == "none", "weight_quantization is 'none'", kinds),
        ("inp_sto_round", n.inp_sto_round and not n.inp_res > 0, "inp_res is off", "a resolution"),
        ("out_noise_per_channel", n.out_noise_per_channel and n.out_noise == 0, "out_noise is 0", "a deviation"),
        ("out_bound_per_channel", n.out_bound_per_channel and not n.out_bound > 0, "out_bound is off", "a bound"),
        ("fast_mode", n.fast_mode and not stored_range, "input_range is None", "a range per slice"),
        ("range_decay", n.range_decay > 0 and not stored_range, "input_range is None", "a range per slice"),
        ("range_decay", n.range_decay > 0 and stored_range and not decays, "fast_mode is True", "False"),
        ("input_min_percentage", n.input_min_percentage != 0.95 and not n.range_decay > 0, "range_decay is 0", "a decay"),
    )  # fmt: skip
    found = [
        f"{name}: got {getattr(n, name)!r}, which has no effect as {why}; pass {remedy} for {why.partition(' ')[0]}, "
        f"or leave {name} out"
        for name, idle, why, remedy in rules
        if idle
    ]
    resolutions = ("inp_res", "out_res", *(["weight_res"] if n.weight_quantization != "none" else []))
    few = {name: bits_for_steps(getattr(n, name)) for name in resolutions}
    found += [f"{name}: got {getattr(n, name)}, few steps; {told}" for name, told in few.items() if told]
    return "\n".join(found)
