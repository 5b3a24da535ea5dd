"""Which ranks of a job see other data, and which hold other parts of the same layers."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from triton_analog.nn.base import named_analog_layers
from triton_analog.nn.range_startup import RangeStartup
from triton_analog.seeds import set_noise_rank


def set_parallel(model: nn.Module, statistics: Any, tp: Any = None) -> None:
    """Say which ranks merge the statistics of input ranges: in their start-up, and in a calibration.

    That are the ranks that run the same layers on other data: those of data and context parallelism, sharded or not, but
    not those of other pipeline stages, which run other layers, nor those of tensor parallelism, which see the same data.
    Without a word it is every rank, as data parallelism alone needs it; where a layer sees that the job has more dimensions,
    its first training forward raises until this was called. Call it on every rank, before the first forward. With ``tp`` it also
    says which noise this process draws (:func:`triton_analog.seeds.set_noise_rank`): ranks of one ``tp`` draw the same, as parts
    of one layer, and others different noise. ::

        mesh = init_device_mesh("cuda", (2, 4, 2), mesh_dim_names=("pp", "dp", "tp"))
        set_parallel(model, statistics=mesh["dp"], tp=mesh["tp"])

    Args:
        model: Holds analog layers; all of them are set (``layer.process_group`` of each).
        statistics: A mesh of one or more dimensions, such as ``mesh["dp", "cp"]``, a process group, ``"world"`` (every
            rank), or None (each rank for itself).
        tp: The mesh or group of tensor parallelism, if there is one: none of its other ranks must be among ``statistics``. Their
            generators must be seeded alike (``torch.manual_seed``).

    Raises:
        TypeError: ``model`` is no module, or a group is something else.
        ValueError: ``model`` has no analog layers, this rank is not in a group, or the two share other ranks. Nothing is
            changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; a torch.nn.Module is needed")
    layers = [layer for _, layer in named_analog_layers(model) if isinstance(layer, RangeStartup)]
    if not layers:
        raise ValueError(f"model: this {type(model).__name__} has no analog layers; convert it first")
    group = statistics if _is_world(statistics) else _group_of("statistics", statistics)
    beside = _group_of("tp", tp)
    shared = (_ranks(group) & _ranks(beside)) - {dist.get_rank()} if beside is not None else set()
    if shared:
        raise ValueError(
            f"statistics: it holds the ranks {sorted(shared)}, which by tp see the same data as this one; give the mesh of data "
            'parallelism alone, such as mesh["dp"]'
        )
    for layer in layers:
        layer.process_group = group
    if beside is not None:
        set_noise_rank(
            min(_ranks(beside))
        )  # not the rank among replicas: stages of a pipeline draw different noise too


def _is_world(group: Any) -> bool:
    return isinstance(group, str) and group == "world"


def _group_of(name: str, given: Any) -> Any:
    """The process group of a mesh or group; None for None."""
    if given is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{name}: got {given!r}, but torch.distributed is not initialised; call init_process_group first"
        )
    if given is dist.GroupMember.NON_GROUP_MEMBER:
        raise _not_in(name)
    if isinstance(given, dist.ProcessGroup):
        group = given
    elif isinstance(given, dist.DeviceMesh):
        group = given.get_group() if given.ndim == 1 else given._flatten().get_group()
    else:
        raise TypeError(
            f"{name}: got {given!r}; a DeviceMesh such as mesh['dp'], a process group or None is needed"
            + (", or 'world'" if name == "statistics" else "")
        )
    if dist.get_rank(group) < 0:
        raise _not_in(name)
    return group


def _not_in(name: str) -> ValueError:
    return ValueError(f"{name}: rank {dist.get_rank()} is not in it; give each rank the group that it belongs to")


def _ranks(group: Any) -> set[int]:
    if group is None:
        return set()
    return set(dist.get_process_group_ranks(dist.group.WORLD if _is_world(group) else group))
