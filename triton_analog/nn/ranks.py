"""What a layer can see of the ranks around it: a pipeline, meshes, and whether a forward is training at all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from triton_analog.nn.parts import is_dtensor

_paused = 0
_PIPELINING = "torch.distributed.pipelining.stage"
_TRIALS = ("_forward_metadata_inference", "_shape_inference")
"""Functions there that run a stage to learn the shapes of what it gives."""


@contextmanager
def start_up_paused() -> Iterator[None]:
    """While it lasts, no training forward counts for the start-up of input ranges.

    For forwards on made-up data: a dry run that measures memory or warms a compiler up. Those by which
    ``torch.distributed.pipelining`` finds the shapes of a stage are known without it, unless they are compiled.
    """
    global _paused
    _paused += 1
    try:
        yield
    finally:
        _paused -= 1


def is_paused() -> bool:
    """Whether :func:`start_up_paused` lasts."""
    return _paused > 0


def pipeline_function() -> str | None:
    """The function of ``torch.distributed.pipelining`` that runs this forward; None outside of it."""
    if _PIPELINING not in sys.modules:
        return None
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == _PIPELINING and frame.f_code.co_name not in ("_compute_outputs",):
            return frame.f_code.co_name
        frame = frame.f_back
    return None


def is_trial() -> bool:
    """Whether this forward is one by which a pipeline finds shapes."""
    return pipeline_function() in _TRIALS


def refuse_unsaid_group(layer: nn.Module) -> None:
    """Every rank is the right group for the statistics of ``layer``, as far as it can see.

    Raises:
        ValueError: it is not: a pipeline or a mesh says that other ranks run other layers, or see the same data.
    """
    mesh = _mesh_of(layer)
    world = dist.get_world_size()
    if pipeline_function() is not None:
        why = "other ranks run other stages of the pipeline, so that they would wait for each other for ever"
    elif mesh is None and any(is_dtensor(parameter) for parameter in layer._parameters.values()):
        why = "its parameters are DTensors, so that other ranks may hold other parts of it and see the same data"
    elif mesh is not None and mesh.size() != world:
        why = f"it is sharded over {mesh.size()} of {world} ranks, so that the mesh has other dimensions"
    else:
        return
    raise ValueError(
        f"process_group: this {type(layer).__name__} would merge the statistics of its input range over all {world} ranks, but "
        f"{why}; say which ranks see other data: triton_analog.distributed.set_parallel(model, statistics=mesh['dp'])"
    )


def _mesh_of(layer: nn.Module) -> Any:
    """The mesh of ``fully_shard`` around ``layer``, whose parameters are whole in a forward; None without."""
    for hook in layer._state_dict_pre_hooks.values():
        if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp."):
            for cell in getattr(hook, "__closure__", None) or ():
                info = getattr(cell.cell_contents, "mesh_info", None)
                if info is not None:
                    return info.mesh
    return None
