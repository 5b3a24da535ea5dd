"""The two forms in which a recurrent layer takes and returns states: torch's, and a list with an entry per layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_analog.nn.rnn_cells import LSTMState, State


class StateShape(NamedTuple):
    """What the states of a call look like."""

    num_layers: int
    directions: int
    sizes: tuple[int, ...]  # width of the hidden state, and of the cell state if there is one
    batch: int | None  # None: the input has no batch dimension, nor have its states
    dtype: torch.dtype
    device: torch.device
    casts: bool  # autocast, which casts states as it casts inputs

    @property
    def rows(self) -> int:
        return 1 if self.batch is None else self.batch


def is_torch_form(hx: Any) -> bool:
    """Whether ``hx`` is a tensor, or tensors; an entry of the list form is never a tensor."""
    return isinstance(hx, Tensor) or (
        isinstance(hx, tuple | list) and len(hx) > 0 and all(isinstance(part, Tensor) for part in hx)
    )


def zero_states(shape: StateShape) -> list[State]:
    """For every cell, layer by layer and direction by direction."""
    like: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
    zeros = tuple(torch.zeros(shape.rows, size, **like) for size in shape.sizes)
    return [zeros] * (shape.num_layers * shape.directions)


def from_torch(hx: Any, shape: StateShape) -> list[State]:
    """The state ``[B, size]`` of every cell from ``h0``, or ``(h0, c0)`` of an LSTM."""
    parts = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    if isinstance(hx, Tensor) != (len(shape.sizes) == 1) or len(parts) != len(shape.sizes):
        needed = "a tensor h0" if len(shape.sizes) == 1 else "a tuple (h0, c0)"
        given = "a tensor" if isinstance(hx, Tensor) else f"{len(parts)} tensors"
        raise ValueError(f"hx: got {given}; this cell needs {needed}, or a list with a state per layer")
    cells = shape.num_layers * shape.directions
    wide = []
    for name, part, size in zip(("h0", "c0"), parts, shape.sizes, strict=False):
        part = _checked(
            f"hx, {name}", part, (cells, size) if shape.batch is None else (cells, shape.batch, size), shape
        )
        wide.append(part.reshape(cells, shape.rows, size))
    return list(zip(*(part.unbind(0) for part in wide), strict=True))


def to_torch(states: list[State], shape: StateShape) -> Tensor | State:
    """The inverse of :func:`from_torch`."""
    parts = tuple(torch.stack(part) for part in zip(*states, strict=True))
    if shape.batch is None:
        parts = tuple(part.squeeze(1) for part in parts)
    return parts[0] if len(parts) == 1 else parts


def from_list(hx: Any, shape: StateShape) -> list[State]:
    """The state ``[B, size]`` of every cell from a list of ``(hx, cx)``, or of pairs of them with two directions."""
    entry = "(hx, cx)" if len(shape.sizes) == 2 else "(hx, None)"
    needed = (
        f"a list of {shape.num_layers}, one per layer, each {entry if shape.directions == 1 else f'a pair of {entry}'}"
    )
    if not isinstance(hx, tuple | list):
        raise TypeError(f"hx: got {type(hx).__name__}; tensors of torch's form are needed, or {needed}")
    if len(hx) != shape.num_layers:
        raise ValueError(f"hx: got {len(hx)} states; {needed} is needed")
    entries = list(hx) if shape.directions == 1 else [part for pair in hx for part in _pair(pair, needed)]
    states = []
    for index, state in enumerate(entries):
        known = [part for part in _pair(state, needed) if part is not None]
        if len(known) != len(shape.sizes):
            raise ValueError(f"hx: got a state with {len(known)} tensors; {needed} is needed")
        checked = []
        for name, part, size in zip(("hx", "cx"), known, shape.sizes, strict=False):
            here = f"hx, {name} of state {index}"
            part = _checked(here, part, (size,) if shape.batch is None else (shape.batch, size), shape)
            checked.append(part.reshape(shape.rows, size))
        states.append(tuple(checked))
    return states


def to_list(states: list[State], shape: StateShape) -> list[Any]:
    """The inverse of :func:`from_list`."""
    if shape.batch is None:
        states = [tuple(part.squeeze(0) for part in state) for state in states]
    named = [LSTMState(*state) for state in states]
    return named if shape.directions == 1 else list(zip(named[::2], named[1::2], strict=True))


def _pair(value: Any, needed: str) -> Any:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"hx: got a list that holds {type(value).__name__}; {needed} is needed")
    return value


def _checked(name: str, part: Any, needed: tuple[int, ...], shape: StateShape) -> Tensor:
    if not isinstance(part, Tensor):
        raise TypeError(f"{name}: got {type(part).__name__}; a torch.Tensor is needed")
    if part.shape != needed:
        raise ValueError(f"{name}: got shape {tuple(part.shape)}; {needed} is needed")
    if part.device != shape.device:
        raise ValueError(f"{name}: on {part.device}, but the input is on {shape.device}; move one of them")
    if part.dtype != shape.dtype and not shape.casts:
        raise TypeError(f"{name}: dtype {part.dtype}, but the input is {shape.dtype}; cast one of them")
    return part.to(shape.dtype)
