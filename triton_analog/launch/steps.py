"""The parts of a plan: allocations, operations of torch, and starts of kernels, each done with the tensors of one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

DESCRIPTORS = (TensorDescriptor, GluonDescriptor)

Slots = list[Any]
"""The tensors of one call: its inputs, then what is made from them."""


class Step(Protocol):
    def __call__(self, slots: Slots, stream: int | None) -> None:
        """Do a part of the work, on the stream; None where a profiler wants to be told of every start."""

    def reads(self) -> Iterator[int]:
        """The slots that it needs."""


class Place(NamedTuple):
    """A tensor of a call: a part of one of its slots."""

    slot: int
    offset: int
    """From the first element of the slot, in bytes."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    whole: bool

    def of(self, slots: Slots) -> Tensor:
        base = slots[self.slot]
        if self.whole:
            return base
        return base.as_strided(self.shape, self.stride, base.storage_offset() + self.offset // base.element_size())


class Described(NamedTuple):
    """A tensor descriptor of a place."""

    place: Place
    kind: type[Any]
    rest: dict[str, Any]
    """Its fields but the tensor."""

    def of(self, slots: Slots) -> Any:
        return self.kind(base=self.place.of(slots), **self.rest)


def _is_ours(value: Any) -> bool:
    return isinstance(value, (Place, Described))


def filled(value: Any, slots: Slots) -> Any:
    """A nested ``value`` with the tensors of a call in their places."""
    return tree_map(lambda part: part.of(slots) if _is_ours(part) else part, value, is_leaf=_is_ours)


def slots_of(value: Any) -> Iterator[int]:
    """The slots of all places in a nested ``value``."""
    for part in tree_leaves(value, is_leaf=_is_ours):
        if _is_ours(part):
            yield (part.place if isinstance(part, Described) else part).slot


class Allocate(NamedTuple):
    """A new tensor."""

    into: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __call__(self, slots: Slots, stream: int | None) -> None:
        slots[self.into] = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)

    def reads(self) -> Iterator[int]:
        return iter(())

    def bytes(self) -> int:
        """Size of its memory."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize


class Call(NamedTuple):
    """An operation of torch."""

    into: range
    """The slots of what it makes; none for a change in place."""
    function: Callable[..., Any]
    args: Any
    kwargs: Any

    def __call__(self, slots: Slots, stream: int | None) -> None:
        args, kwargs = filled((self.args, self.kwargs), slots)
        out = self.function(*args, **kwargs)
        if self.into:
            slots[self.into.start : self.into.stop] = tree_flatten(out)[0]

    def reads(self) -> Iterator[int]:
        return slots_of((self.args, self.kwargs))


class Start(NamedTuple):
    """A kernel started by Triton: in the interpreter, and on other devices than NVIDIA GPUs."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self, slots: Slots, stream: int | None) -> None:
        self.kernel[self.grid](*filled(self.args, slots), **self.options)

    def reads(self) -> Iterator[int]:
        return slots_of(self.args)


class _Address(NamedTuple):
    """All that a launcher asks of the tensor in a descriptor."""

    value: int

    def data_ptr(self) -> int:
        return self.value


class DirectStart:
    """A compiled kernel started by its own launcher, which takes addresses as numbers and so need not look them up."""

    def __init__(self, compiled: CompiledKernel, grid: tuple[int, ...], args: Sequence[Any]) -> None:
        self.compiled = compiled
        self.grid: Any = (*grid, 1, 1)[:3]
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata
        self.args = [None if _is_ours(arg) else arg for arg in args]
        placed = list(enumerate(args))
        self.pointers = [(i, arg.slot, arg.offset) for i, arg in placed if isinstance(arg, Place)]
        self.descriptors = [
            (i, arg.place.slot, arg.place.offset, arg.kind, arg.rest) for i, arg in placed if isinstance(arg, Described)
        ]

    def __call__(self, slots: Slots, stream: int | None) -> None:
        args = self.args.copy()
        for i, slot, offset in self.pointers:
            args[i] = slots[slot].data_ptr() + offset
        for i, slot, offset, kind, rest in self.descriptors:
            described = args[i] = object.__new__(kind)
            described.__dict__.update(rest, base=_Address(slots[slot].data_ptr() + offset))
        if stream is None:
            self.compiled[self.grid](*args)
        else:
            x, y, z = self.grid
            self.run(x, y, z, stream, self.function, self.metadata, None, None, None, *args)

    def reads(self) -> Iterator[int]:
        yield from (slot for _, slot, _ in self.pointers)
        yield from (slot for _, slot, *_ in self.descriptors)

    def move(self, slot: int, into: int, by: int) -> None:
        """What was ``slot`` lies in the slot ``into``, ``by`` bytes from its beginning."""
        self.pointers = [
            (i, into, offset + by) if own == slot else (i, own, offset) for i, own, offset in self.pointers
        ]
        self.descriptors = [
            (i, into, offset + by, kind, rest) if own == slot else (i, own, offset, kind, rest)
            for i, own, offset, kind, rest in self.descriptors
        ]


class Forget(NamedTuple):
    """Give back what no later step needs."""

    slots: tuple[int, ...]

    def __call__(self, slots: Slots, stream: int | None) -> None:
        for slot in self.slots:
            slots[slot] = None

    def reads(self) -> Iterator[int]:
        return iter(())


# ---- Memory ---------------------------------------------------------------------------------------------------------

ALIGNMENT = 512
"""In bytes; as torch's allocator for GPUs, and more than any kernel asks for."""


def _last_reads(steps: Sequence[Step]) -> dict[int, int]:
    """The last step that needs each slot."""
    return {slot: index for index, step in enumerate(steps) for slot in step.reads()}


def with_one_workspace(steps: Sequence[Step], kept: set[int], workspace: int) -> list[Step]:
    """``steps`` in which all memory that only directly started kernels see is allocated at once, as slot ``workspace``.

    Whatever is not needed at the same time shares its bytes. ``kept``: slots that outlast the steps.
    """
    seen = {slot for step in steps if not isinstance(step, DirectStart) for slot in step.reads()}
    made = {step.into: step for step in steps if isinstance(step, Allocate)}
    scratch = {slot: step for slot, step in made.items() if slot not in kept | seen}
    if len(scratch) < 2:
        return list(steps)
    last = _last_reads(steps)
    places: dict[int, tuple[int, int]] = {}  # first byte and end of what is alive
    offsets: dict[int, int] = {}
    for index, step in enumerate(steps):
        if isinstance(step, Allocate) and step.into in scratch:
            begin = 0
            size = -(-step.bytes() // ALIGNMENT) * ALIGNMENT
            for first, end in sorted(places.values()):
                if begin + size <= first:
                    break
                begin = max(begin, end)
            offsets[step.into] = begin
            places[step.into] = begin, begin + size
        for slot in [slot for slot in places if last.get(slot, -1) <= index and slot in step.reads()]:
            del places[slot]
    some = next(iter(scratch.values()))
    sizes = [offset + scratch[slot].bytes() for slot, offset in offsets.items()]
    packed: list[Step] = [Allocate(workspace, (max(sizes),), (1,), torch.uint8, some.device)]
    for step in steps:
        if isinstance(step, DirectStart):
            for slot, offset in offsets.items():
                step.move(slot, workspace, offset)
        if not (isinstance(step, Allocate) and step.into in scratch):
            packed.append(step)
    return packed


def with_forgetting(steps: Sequence[Step], kept: set[int], inputs: int) -> list[Step]:
    """``steps``, each followed by giving back what it was the last to need; the ``inputs`` are the caller's."""
    last = _last_reads(steps)
    after: dict[int, list[int]] = {}
    for slot, index in last.items():
        if slot >= inputs and slot not in kept:
            after.setdefault(index, []).append(slot)
    forgetting: list[Step] = []
    for index, step in enumerate(steps):
        forgetting.append(step)
        if index in after and index < len(steps) - 1:
            forgetting.append(Forget(tuple(after[index])))
    return forgetting
