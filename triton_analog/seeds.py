"""Which noise ranks draw that are seeded alike: data-parallel ones different noise, parts of one replica the same."""

from __future__ import annotations

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
        rank: The number, ``>= 0``. None, the default: the rank in the world where ``torch.distributed`` is initialised, else 0.

    Raises:
        ValueError: ``rank`` is something else.
    """
    global _chosen
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 0):
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
