"""Which noise ranks draw that are seeded alike: data-parallel ones different noise, parts of one replica the same."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_AVAILABLE = dist.is_available()
_chosen: int | None = None


def set_noise_rank(rank: int | None) -> None:
    """Say which noise this process draws, of all that processes with the same state of torch's generator may draw.

    Processes of one number draw the same noise if they are seeded alike; those of different numbers never do. So the number is
    the process's coordinate among data-parallel replicas: ranks that hold parts of one replica (tensor parallelism) have it in
    common. ``set_noise_rank(0)`` on every rank is the same noise everywhere, and what one process alone draws.

    Args:
        rank: The number, ``>= 0`` and below ``2**63``. None, the default: the rank in the world where ``torch.distributed`` is
            initialised, else 0.

    Raises:
        ValueError: ``rank`` is something else.
    """
    global _chosen
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < 2**63):
        raise ValueError(
            f"rank: got {rank!r}; the number of this process among data-parallel replicas is needed, 0 for the same noise "
            "everywhere, or None for the rank in the world"
        )
    _chosen = rank


def noise_rank() -> int:
    """The number that :func:`set_noise_rank` describes."""
    if _chosen is not None:
        return _chosen
    return dist.get_rank() if _AVAILABLE and dist.is_initialized() else 0


def placed(seed: Tensor, first_row: int = 0, first_column: int = 0, first_plane: int = 0) -> Tensor:
    """``seed`` for a tensor that is a part of a larger one, so that the part's noise is that part of the whole's noise.

    Rows and columns are those of what is disturbed: of a weight output and input features, of a product tokens and output
    features (the inputs behind it are from the same row on, and all of their columns). Planes are slices; that of a weight is 0.

    Args:
        seed: int64 ``[1]``, that of the whole.
        first_row: Where the part begins in the whole, a multiple of 16 below ``2**33``.
        first_column: Likewise, below ``2**34``.
        first_plane: The slice of the whole that is the part's first one, below ``2**31``.

    Returns:
        int64 ``[4]`` on the device of ``seed``, made without waiting for it; for any operation with a ``seed`` but ``program``.

    Raises:
        TypeError: ``seed`` is not one int64 number.
        ValueError: a place that the whole's field has no part from.
    """
    if seed.dtype != torch.int64 or tuple(seed.shape) != (1,):
        raise TypeError(f"seed: got {seed.dtype} of shape {tuple(seed.shape)}; int64 of shape (1,) is needed")
    limits = {"first_row": (first_row, 16, 2**33), "first_column": (first_column, 16, 2**34)}
    for name, (value, unit, limit) in (limits | {"first_plane": (first_plane, 1, 2**31)}).items():
        if not (0 <= value < limit and value % unit == 0):
            below = f"2**{limit.bit_length() - 1}"
            allowed = f"0 to {below} - 1" if unit == 1 else f"multiples of {unit} below {below}"
            raise ValueError(f"{name}: got {value}; allowed are {allowed}, as noise is laid out in groups of that size")
    return torch.cat([seed, *(seed.new_full((1,), value) for value in (first_row, first_column, first_plane))])


def mix_rank(seeds: Tensor) -> Tensor:
    """``seeds`` (int64, of 63 bits), changed in place to those of this process, without waiting for the device."""
    rank = noise_rank()
    return seeds if rank == 0 else seeds.bitwise_xor_(_bits(rank))


def mix_rank_again(seeds: Tensor, before: int) -> None:
    """:func:`mix_rank` of ``seeds`` that were made those of process ``before``."""
    if before != noise_rank():
        seeds.bitwise_xor_(_bits(before))
        mix_rank(seeds)


def _bits(rank: int) -> int:
    """63 bits for a rank, 0 for the first: a step of SplitMix64."""
    word = rank * 0x9E3779B97F4A7C15 % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return (word ^ word >> 31) % 2**63
