"""A cell over all time steps of a sequence, packed or not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from triton_analog.nn.one_forward import OneForward
from triton_analog.nn.rnn_cells import AnalogRNNCellBase, Shared, State


class Rows(NamedTuple):
    """The inputs of all time steps below each other, as in a ``PackedSequence``: no row is padding."""

    data: Tensor  # [sum(sizes), features]
    sizes: list[int]  # rows of each time step; they never grow, as longer sequences come first


def rows_of(input: Tensor | PackedSequence, batch_first: bool) -> Rows:
    """The rows of ``[T, B, I]`` (``[B, T, I]`` with ``batch_first``), of ``[T, I]``, or of a packed sequence."""
    if isinstance(input, PackedSequence):
        return Rows(input.data, input.batch_sizes.tolist())
    if input.ndim == 2:
        return Rows(input, [1] * input.shape[0])
    if batch_first:
        input = input.transpose(0, 1)
    steps, batch, features = input.shape
    return Rows(input.reshape(steps * batch, features), [batch] * steps)


def in_form_of(input: Tensor | PackedSequence, data: Tensor, batch_first: bool) -> Tensor | PackedSequence:
    """The outputs ``data [rows, features]`` in the form of the ``input`` that :func:`rows_of` took."""
    if isinstance(input, PackedSequence):
        return PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
    if input.ndim == 2:
        return data
    if batch_first:
        return data.view(input.shape[1], input.shape[0], data.shape[-1]).transpose(0, 1)
    return data.view(*input.shape[:2], data.shape[-1])


def run(cell: AnalogRNNCellBase, rows: Rows, state: State) -> tuple[Tensor, State]:
    """From the first time step to the last: the outputs ``[sum(sizes), H]`` and the state after each sequence's end."""
    outputs, ended, shared = [], [], _shared_by_steps(cell, rows)
    for projected, size in zip(cell.project_input(rows.data).split(rows.sizes), rows.sizes, strict=True):
        if size < state[0].shape[0]:
            ended.append(tuple(part[size:] for part in state))
            state = tuple(part[:size] for part in state)
        state = cell.step(projected, state, shared)
        outputs.append(state[0])
    if ended:
        state = _below(state, *reversed(ended))
    return torch.cat(outputs), state


def run_reverse(cell: AnalogRNNCellBase, rows: Rows, state: State) -> tuple[Tensor, State]:
    """From the last time step of each sequence to its first."""
    outputs, shared = [], _shared_by_steps(cell, rows)
    initial, state = state, tuple(part[: rows.sizes[-1]] for part in state)
    steps = list(zip(cell.project_input(rows.data).split(rows.sizes), rows.sizes, strict=True))
    for projected, size in reversed(steps):
        running = state[0].shape[0]
        if size > running:
            state = _below(state, tuple(part[running:size] for part in initial))
        state = cell.step(projected, state, shared)
        outputs.append(state[0])
    return torch.cat(outputs[::-1]), state


def _shared_by_steps(cell: AnalogRNNCellBase, rows: Rows) -> Shared:
    """For all products of ``cell``; :meth:`AnalogRNNCellBase.project_input` has no use for it."""
    return {name: OneForward(len(rows.sizes)) for name, _ in cell.named_children()}


def _below(*states: State) -> State:
    """The rows of all ``states`` below each other."""
    return tuple(torch.cat(parts) for parts in zip(*states, strict=True))
