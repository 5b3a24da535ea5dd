"""Parameters that other libraries keep in parts: how a layer knows, and its own part of what belongs to a whole one."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

_FSDP2 = "torch.distributed.fsdp._fully_shard"
_FSDP1 = "torch.distributed.fsdp._flat_param"


def is_dtensor(tensor: Any) -> bool:
    """Whether ``tensor`` is a ``DTensor``, whose module is not imported for the question."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_gathered(layer: nn.Module, name: str) -> bool:
    """Whether the parameter ``name`` that a forward of ``layer`` sees is not the tensor that lasts: FSDP2 and DeepSpeed's
    ZeRO stage 3 gather it for the forward, and what is written into it then is lost."""
    parameter = layer._parameters.get(name)
    if hasattr(parameter, "ds_id") or is_dtensor(parameter):
        return True
    # FSDP2 shows a layer plain tensors while it runs, but leaves a hook with it.
    return any(getattr(hook, "__module__", "").startswith(_FSDP2) for hook in layer._state_dict_pre_hooks.values())


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed's ZeRO stage 3 has cut ``parameter``, so that no rank holds it."""
    return hasattr(parameter, "ds_id")


def has_deepspeed_master(parameter: Any) -> bool:
    """Whether DeepSpeed steps a copy of ``parameter`` in its place."""
    # On every rank, also where the mapping is None because another rank has the part with the parameter.
    return hasattr(parameter, "_hp_mapping") or is_partitioned(parameter)


def refuse_flat_parameters(layer: nn.Module) -> None:
    """No parameter of ``layer`` is a part of one of FSDP1's flat parameters.

    Raises:
        RuntimeError: one is.
    """
    flat: Any = sys.modules.get(_FSDP1)
    if flat is None:
        return
    for name in ("weight", "input_range", "learnable_weight_clip"):
        tensor = vars(layer).get(name, layer._parameters.get(name))
        of = getattr(tensor, "_base", None)
        if isinstance(tensor, flat.FlatParameter) or isinstance(of, flat.FlatParameter):
            raise RuntimeError(
                f"{name}: FullyShardedDataParallel (FSDP1) has put that of this {type(layer).__name__} into a flat parameter, "
                "which has neither the rows nor the slices of its tiles, and start-up, range decay and clip would be lost. Shard "
                "with torch.distributed.fsdp.fully_shard (FSDP2; fsdp_version: 2 in Accelerate), or use DistributedDataParallel"
            )


def own_part(layer: nn.Module, stepped: Tensor) -> slice:
    """Which numbers of a vector with one for each slice belong to this rank's part of the ``DTensor`` ``stepped``."""
    known = vars(layer).get("_range_part")
    if known is None or known[0] != id(stepped):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        distributed: Any = stepped
        shape, offset = compute_local_shape_and_global_offset(
            distributed.shape, distributed.device_mesh, distributed.placements
        )
        start = offset[0] if shape[0] else 0
        known = vars(layer)["_range_part"] = (id(stepped), start, start + shape[0])
    return slice(known[1], known[2])
