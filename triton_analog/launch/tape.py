"""Writing down what a launcher does."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from triton.compiler import CompiledKernel

from triton_analog.launch.steps import DESCRIPTORS, Allocate, Call, Described, DirectStart, Place, Start, Step

_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}

_running = threading.local()


def tape() -> Tape | None:
    """The one on which this thread is writing down a launcher's work."""
    return getattr(_running, "tape", None)


@contextmanager
def untaped() -> Iterator[None]:
    """Write nothing down: Triton's interpreter handles tensors by operations of torch, and tuning runs whole operations."""
    notes = tape()
    if notes is None:
        yield
        return
    notes.is_paused, _running.tape = True, None
    try:
        yield
    finally:
        notes.is_paused, _running.tape = False, notes


class Tape(TorchDispatchMode):
    """Notes every operation of torch and every start of a kernel while it runs.

    ``inputs`` are the first slots, each an object of its own, even where two are the same tensor.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.bases: list[Tensor] = []  # one for each slot
        self._places: dict[int, Place] = {}
        self._kept: list[Tensor] = []  # or another object could get the id of one that is gone
        self.is_paused = False
        for tensor in inputs:
            self._add_slot(tensor)

    def __enter__(self) -> Tape:
        _running.tape = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _running.tape = None
        super().__exit__(*error)

    def placed(self, value: Any) -> Any:
        """A nested ``value`` with places for its tensors and descriptors."""
        return tree_map(self._placed, value)

    def _placed(self, part: Any) -> Any:
        if isinstance(part, Tensor):
            return self._places[id(part)]
        if isinstance(part, DESCRIPTORS):
            rest = {name: value for name, value in vars(part).items() if name != "base"}
            return Described(self._places[id(part.base)], type(part), rest)
        return part

    def _add_slot(self, tensor: Tensor) -> None:
        self._note(tensor, Place(len(self.bases), 0, tuple(tensor.shape), tensor.stride(), True))
        self.bases.append(tensor)

    def _note(self, tensor: Tensor, place: Place) -> None:
        self._places[id(tensor)] = place
        self._kept.append(tensor)

    def _note_view(self, tensor: Tensor, source: Tensor) -> None:
        slot = self._places[id(source)].slot
        base = self.bases[slot]
        assert tensor.dtype == base.dtype, "a launcher's view has another dtype than its tensor"
        offset = int(tensor.storage_offset() - base.storage_offset()) * tensor.element_size()
        shape, stride = tuple(tensor.shape), tensor.stride()
        whole = offset == 0 and shape == tuple(base.shape) and stride == base.stride()
        self._note(tensor, Place(slot, offset, shape, stride, whole))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.is_paused:
            return out
        made = [one for one in tree_flatten(out)[0] if isinstance(one, Tensor)]
        aliases = [result.alias_info for result in func._schema.returns]
        in_place = any(alias is not None and alias.is_write for alias in aliases)
        # Some operations give a view where they can and a copy elsewhere.
        if any(alias is not None and not alias.is_write for alias in aliases) and _share_memory(args[0], *made):
            for view in made:
                self._note_view(view, args[0])
            return out
        slot = len(self.bases)
        if func in _EMPTY:
            self.steps.append(Allocate(slot, tuple(out.shape), out.stride(), out.dtype, out.device))
        else:
            into = range(slot, slot + (0 if in_place else len(made)))
            self.steps.append(Call(into, func, *self.placed((args, kwargs))))
        if not in_place:
            for tensor in made:
                self._add_slot(tensor)
        return out

    def started(self, kernel: Any, grid: tuple[int, ...], args: Any, options: dict[str, Any], compiled: Any) -> None:
        """``kernel[grid](*args, **options)`` was started, as ``compiled`` if it can be started directly."""
        placed = tuple(self._placed(arg) for arg in args)
        if isinstance(compiled, CompiledKernel):
            constants = [options[name] for name in kernel.arg_names[len(args) :]]
            self.steps.append(DirectStart(compiled, grid, [*placed, *constants]))
        else:
            self.steps.append(Start(kernel, grid, placed, options))


def _share_memory(first: Tensor, *others: Tensor) -> bool:
    return all(other.untyped_storage()._cdata == first.untyped_storage()._cdata for other in others)
