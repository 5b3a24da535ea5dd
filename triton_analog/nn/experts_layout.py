"""How modules keep the experts of a mixture: their matrices stacked in parameters, and what happens between the two."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Layout(NamedTuple):
    """Where the matrices of ``E`` experts are, each ``[E, N, K]``, or ``[E, K, N]`` if ``transposed``."""

    up: str
    """The parameter for the first matrix: ``[gate; up]`` if ``gated``."""
    down: str
    """The parameter for the second."""
    transposed: bool
    gated: bool

    def outputs(self, module: nn.Module) -> int:
        """The width of an expert's output."""
        stack = module._parameters[self.down]
        assert stack is not None
        return stack.shape[2 if self.transposed else 1]


def find_layout(module: nn.Module) -> Layout:
    """The layout of a module with parameters ``gate_up_proj`` or ``up_proj``, and ``down_proj``.

    The attributes ``is_transposed`` and ``has_gate`` say what the shapes leave open.

    Raises:
        ValueError: such parameters are missing or do not fit each other.
    """
    kind = type(module).__name__
    up = next((name for name in ("gate_up_proj", "up_proj") if module._parameters.get(name) is not None), None)
    if up is None or module._parameters.get("down_proj") is None:
        raise ValueError(
            f"module: {kind} has not the parameters gate_up_proj (or up_proj) and down_proj; give its class an analog one of "
            "your own in conversion_map"
        )
    first, second = stack_of(module, up), stack_of(module, "down_proj")
    found = [
        Layout(up, "down_proj", transposed, gated)
        for transposed in _choices(module, "is_transposed")
        for gated in _choices(module, "has_gate")
        if _fits(first, second, transposed, gated)
    ]
    if len(found) != 1:
        problem = "fit no experts" if not found else "leave open which dimension counts inputs"
        raise ValueError(
            f"module: {up} {tuple(first.shape)} and down_proj {tuple(second.shape)} of {kind} {problem}; [E, 2 * I, H] and "
            "[E, H, I] (without a gate [E, I, H]) are needed, or each with its last two dimensions exchanged; set "
            "module.is_transposed and module.has_gate to say which"
        )
    return found[0]


def _choices(module: nn.Module, name: str) -> tuple[bool, ...]:
    said = getattr(module, name, None)
    return (False, True) if said is None else (bool(said),)


def _fits(first: Tensor, second: Tensor, transposed: bool, gated: bool) -> bool:
    (outer, inputs), (outputs, inner) = (
        reversed(stack.shape[1:]) if transposed else stack.shape[1:] for stack in (first, second)
    )
    return len(first) == len(second) and outer == inner * (2 if gated else 1) and inputs == outputs


def stack_of(module: nn.Module, name: str) -> Tensor:
    """The parameter ``name`` with a matrix for each expert.

    Raises:
        ValueError: there is none, or it is no stack of matrices that tiles can hold.
    """
    stack = module._parameters.get(name)
    if stack is None or stack.ndim != 3 or stack.numel() == 0 or stack.dtype not in FLOATS:
        given = "missing" if stack is None else f"{stack.dtype} of shape {tuple(stack.shape)}"
        raise ValueError(
            f"module: {name} of {type(module).__name__} is {given}; float32, bfloat16, float16 or float64 of shape [E, N, K], "
            "a matrix for each of E experts, is needed"
        )
    return stack


def has_interface(module: nn.Module) -> bool:
    """Whether ``module`` keeps to the interface for experts of transformers: its forward is then known from its attributes,
    which transformers itself uses to exchange it."""
    if isinstance(module, torch.jit.ScriptModule):  # whose class cannot be asked for its forward
        return False
    forward: Any = type(module).forward
    said = {"has_gate", "has_bias", "is_transposed"} <= vars(module).keys()
    if not (said and hasattr(forward, "__wrapped__") and hasattr(module, "_apply_gate")) or "forward" in vars(module):
        return False
    try:
        find_layout(module)
    except ValueError:
        return False
    return True
