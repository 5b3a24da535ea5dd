"""What can be tuned: an operation's configurations, which of them a problem allows, and the formula where none was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import product
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import triton

from triton_analog.launch.devices import Hardware
from triton_analog.launch.occupancy import MULTIPROCESSORS
from triton_analog.launch.store import Key

Config = TypeVar("Config")

POWERS = tuple(2**i for i in range(15))


class Problem(NamedTuple):
    """What a configuration is chosen for. What sizes and flags mean, its :class:`Space` says."""

    hardware: Hardware
    dtype: torch.dtype
    sizes: tuple[int, ...]
    flags: tuple[bool, ...] = ()


@dataclass(frozen=True, eq=False)
class Space(Generic[Config]):
    """An operation's configurations, declared next to its kernel.

    Problems that differ in the number of rows alone share a configuration between powers of two.
    """

    op: str
    config: type[Config]
    sizes: tuple[str, ...]
    """Names of a problem's sizes; ``"rows"`` is the one that changes from call to call."""
    formula: Callable[[Problem], Config]
    """The configuration where none was found; it belongs to the space."""
    values: Mapping[str, Sequence[int]]
    """What each field may be."""
    flags: tuple[str, ...] = ()
    """Names of what changes the code."""
    others: tuple[ModuleType, ...] = ()
    """Modules beside the configuration's own whose kernels it may choose."""
    fits: Callable[[Problem, Config], bool] = lambda problem, config: True
    """Whether a configuration can run a problem, and is not known to be slow there."""

    def key(self, problem: Problem) -> Key:
        """The problem as tuning files name it."""
        sizes = zip(self.sizes, problem.sizes, strict=True)
        return Key(
            str(problem.dtype).removeprefix("torch."),
            tuple((name, triton.next_power_of_2(size) if name == "rows" else size) for name, size in sizes),
            tuple(name for name, on in zip(self.flags, problem.flags, strict=True) if on),
        )

    def problem(self, hardware: Hardware, key: Key) -> Problem:
        """The inverse of :meth:`key`.

        Raises:
            ValueError: The key is not of this space.
        """
        sizes = dict(key.sizes)
        dtype = getattr(torch, key.dtype, None)
        if (
            not isinstance(dtype, torch.dtype)
            or str(dtype) != f"torch.{key.dtype}"  # a second name, such as "half"
            or set(sizes) != set(self.sizes)
            or not set(key.flags) <= set(self.flags)
        ):
            raise ValueError(
                f"key: got {key}; {self.op} has the sizes {', '.join(self.sizes)} and the flags "
                f"{', '.join(self.flags) or '(none)'}"
            )
        return Problem(
            hardware, dtype, tuple(sizes[name] for name in self.sizes), tuple(name in key.flags for name in self.flags)
        )

    def accepts(self, problem: Problem, values: Mapping[str, Any]) -> Config | None:
        """The configuration of these values if it belongs to the space and can run ``problem``."""
        if set(values) != {field.name for field in fields(self.config)}:  # type: ignore[arg-type]
            return None
        for name, allowed in self.values.items():
            if values[name] not in allowed or isinstance(values[name], bool) is not isinstance(allowed[0], bool):
                return None
        config = self.config(**values)
        return config if self.fits(problem, config) else None

    def candidates(self, problem: Problem) -> list[Config]:
        """The formula's configuration, then all others that fit."""
        first = self.formula(problem)
        others = (
            self.config(**dict(zip(self.values, chosen, strict=True))) for chosen in product(*self.values.values())
        )
        return [first, *(config for config in others if config != first and self.fits(problem, config))]


# ---- What bounds a tile ----------------------------------------------------------------------------------------------


def covers(block: int, size: int, smallest: int = 16) -> bool:
    """Whether a block is not twice as large as it has to be, or ``smallest``."""
    return block <= max(smallest, triton.next_power_of_2(size))


def tile_fits(problem: Problem, rows: int, columns: int, *, least: int, most: int, smallest: int = 1) -> bool:
    """Whether tiles of ``rows`` x ``columns`` suit a problem of two sizes: ``least`` to ``most`` numbers (fewer where the
    problem is small), not beyond its edges. ``smallest``: the fewest rows that a kernel takes."""
    all_rows, all_columns = problem.sizes
    numbers = rows * columns
    # Between powers of two the answer is the same, as the configuration has to be.
    few = rows >= all_rows or triton.next_power_of_2(all_rows) * all_columns <= 2**20
    return (
        numbers <= most
        and (numbers >= least or few)
        and covers(rows, all_rows, smallest)
        and covers(columns, all_columns, 32)
    )


def large_enough(block_rows: int, block_columns: int, rows: int, columns: int) -> bool:
    """Whether a product's tile has the 64 x 64 numbers below which loads cost more than products, or covers all rows or all
    columns."""
    return block_rows * block_columns >= 4096 or block_rows >= rows or block_columns >= columns


def operands_fit(hardware: Hardware, rows: int, row_bytes: int, stages: int) -> bool:
    """Whether shared memory holds ``stages`` of two operands' tiles with so many rows together. (AMD's compiler keeps one
    stage of them in registers.)"""
    limits = MULTIPROCESSORS.get(hardware.target)
    available = limits.shared_bytes_per_program if limits else 64 * 1024
    return rows * row_bytes * (stages if hardware.capability else stages - 1) <= available


# ---- Configurations given from outside --------------------------------------------------------------------------------

_forced: dict[str, Any] = {}


@contextmanager
def forced(space: Space[Config], config: Config) -> Iterator[None]:
    """Run every operation of ``space`` inside the ``with`` block in ``config``. For sweeps and tests; not thread safe.

    Raises:
        TypeError: ``config`` is not one of the space's.
    """
    if not isinstance(config, space.config):
        raise TypeError(f"config: got {type(config).__name__}; {space.op} takes {space.config.__name__}")
    previous = dict(_forced)
    _forced[space.op] = config
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(previous)


def is_forced() -> bool:
    """Whether :func:`forced` asks for any configuration."""
    return bool(_forced)


def forced_config(space: Space[Config]) -> Config | None:
    """What :func:`forced` asks for, if it does."""
    return _forced.get(space.op) if _forced else None


def as_values(config: Any) -> dict[str, int | bool]:
    """A configuration as a tuning file holds it."""
    return asdict(config)
