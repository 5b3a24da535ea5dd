"""Parameters that other libraries keep in parts: how a layer knows, and its own part of what belongs to a whole one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from triton_analog.nn.parts import is_dtensor, is_partitioned

_FSDP2 = "torch.distributed.fsdp._fully_shard"


def is_gathered(layer: nn.Module, name: str) -> bool:
    """Whether the parameter ``name`` that a forward of ``layer`` sees is not the tensor that lasts: FSDP2 and DeepSpeed's
    ZeRO stage 3 gather it for the forward, and what is written into it then is lost."""
    parameter = layer._parameters.get(name)
    if is_partitioned(parameter) or is_dtensor(parameter):
        return True
    # FSDP2 shows a layer plain tensors while it runs, but leaves a hook with it.
    return any(getattr(hook, "__module__", "").startswith(_FSDP2) for hook in layer._state_dict_pre_hooks.values())


def own_part(layer: nn.Module, stepped: Tensor) -> slice:
    """Which numbers of a vector with one for each slice of ``layer`` (of its part, if it is split) belong to this rank's part of
    the ``DTensor`` ``stepped``."""
    known = vars(layer).get("_range_part")
    if known is None or known[0] != id(stepped):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        distributed: Any = stepped
        shape, offset = compute_local_shape_and_global_offset(
            distributed.shape, distributed.device_mesh, distributed.placements
        )
        split: Any = layer.split
        start = offset[0] - (0 if split is None else split.first_slice) if shape[0] else 0
        known = vars(layer)["_range_part"] = (id(stepped), start, start + shape[0])
    return slice(known[1], known[2])
