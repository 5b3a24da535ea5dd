"""Parameters that a library keeps in parts, and those that it steps elsewhere: their numbers as a whole, and back again.

Known are DTensors (``fully_shard``, tensor parallelism) and the three stages of DeepSpeed's ZeRO. FSDP's first version, which
lays the parameters of many layers into a flat one, has no rows of a weight and is refused. None of them is imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from types import SimpleNamespace
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from triton_analog.nn.versions import version_of

Slot = tuple[nn.Module, str]
"""A module, and the name of a parameter of its own."""

_open: set[int] = set()
"""The ids of ZeRO's parameters that are whole already."""


def is_dtensor(tensor: Any) -> TypeGuard[Any]:
    """Whether ``tensor`` is cut over the ranks of a mesh, or copied to them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_partitioned(parameter: Any) -> bool:
    """Whether DeepSpeed's ZeRO stage 3 has cut ``parameter``."""
    return hasattr(parameter, "ds_id")


def has_master(parameter: Any) -> bool:
    """Whether DeepSpeed steps a copy of ``parameter`` in its place.

    On every rank, also where the mapping is None because another rank has the part with the parameter.
    """
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")


def is_stepped_elsewhere(parameter: Any) -> bool:
    """Whether DeepSpeed steps a copy, or parts, of ``parameter`` in its place."""
    return has_master(parameter) or is_partitioned(parameter)


def is_in_parts(parameter: Any) -> bool:
    """Whether no rank holds ``parameter`` as one ordinary tensor."""
    return is_dtensor(parameter) or is_partitioned(parameter) or hasattr(parameter, "_fsdp_flattened")


def is_managed(module: nn.Module) -> bool:
    """Whether a sharding library knows the parameters of ``module``, so that none may come or go."""
    known = any(is_in_parts(parameter) or has_master(parameter) for parameter in module._parameters.values())
    return known or getattr(module, "_is_fsdp_managed_module", False)


def numbers_in(parameter: Tensor) -> int:
    """How many there are in the whole of it."""
    return getattr(parameter, "ds_numel", parameter.numel())


def shape_of(parameter: Tensor) -> torch.Size:
    """That of the whole of it."""
    return getattr(parameter, "ds_shape", parameter.shape)


# ---- FSDP's first version -----------------------------------------------------------------------------------------------


def refuse_flat(layer: nn.Module) -> None:
    """The weight of ``layer`` has rows.

    Raises:
        ValueError: ``FullyShardedDataParallel`` has laid it into a flat parameter.
    """
    if not getattr(layer, "_is_fsdp_managed_module", False):
        return
    found = [tensor for tensor in (*layer._parameters.values(), *vars(layer).values()) if isinstance(tensor, Tensor)]
    weight = layer._parameters.get("weight")
    if any(getattr(tensor._base, "_is_flat_param", False) for tensor in found) or (
        hasattr(weight, "_fsdp_flattened") and weight.ndim < 2  # type: ignore[union-attr]
    ):
        raise ValueError(
            f"weight: that of this {type(layer).__name__} lies in a flat parameter of FullyShardedDataParallel, which cuts it "
            "anywhere, so that no rank has whole rows to clip, quantize or start ranges with; shard the model with "
            "torch.distributed.fsdp.fully_shard instead (FSDP2; fsdp_version 2 of accelerate)"
        )


def refuse_parts(model: nn.Module, what: str) -> None:
    """No layer of ``model`` is managed by a sharding library: a copy of it, or another layer in its place, would not be.

    Raises:
        ValueError: one is. The message says that ``what`` needs a model of whole tensors, and how to get one.
    """
    for name, module in model.named_modules():
        sharded = [key for key, parameter in module._parameters.items() if is_in_parts(parameter)]
        if sharded or (getattr(module, "_is_fsdp_managed_module", False) and module._parameters):
            raise ValueError(
                f"model: {'.'.join(filter(None, (name, *sharded[:1])))} is sharded, and {what} needs a model of whole tensors; "
                "take the whole state dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with "
                "StateDictOptions(full_state_dict=True); of DeepSpeed's stage 3 what its zero_to_fp32 makes), and use "
                "restore_analog(digital_model, state_dict)"
            )


def is_sharded(model: nn.Module) -> bool:
    """Whether a sharding library keeps any parameter of ``model`` in parts."""
    return any(
        any(map(is_in_parts, module._parameters.values()))
        or (getattr(module, "_is_fsdp_managed_module", False) and bool(module._parameters))
        for module in model.modules()
    )


def refuse_parts_but_rows(model: nn.Module, what: str) -> None:
    """As :func:`refuse_parts`, but ``fully_shard`` may have sharded ``model``, if nothing else has.

    Raises:
        ValueError: as there.
    """
    if not is_sharded(model):
        return
    modules = list(model.modules())
    for module in modules:
        _put_away(module)
    cut = [(module, p) for module in modules for p in module._parameters.values() if is_in_parts(p)]
    if not cut or not all(_is_cut_once(module, parameter) for module, parameter in cut):
        refuse_parts(model, what)


def _is_cut_once(module: nn.Module, parameter: Any) -> bool:
    """Whether ``fully_shard`` alone has cut ``parameter``."""
    if not is_dtensor(parameter) or not getattr(module, "_is_fsdp_managed_module", False):
        return False
    cuts = [place for place in parameter.placements if not place.is_replicate()]
    return len(cuts) <= 1 and not any(hasattr(place, "split_factor") for place in cuts)


# ---- As a whole ---------------------------------------------------------------------------------------------------------


@contextmanager
def whole(slots: Iterable[Slot], write: bool, of_first: bool = False) -> Iterator[None]:
    """While it lasts, these parameters are whole tensors on every rank. All ranks that hold a part must come here.

    Nothing in it is differentiated. Afterwards they are what they were. With ``write``, those that were changed in place keep
    the change, in copies that are stepped in their place too; after an error none does.

    Args:
        slots: Where the parameters are; those without any, and those that are whole, may be among them.
        write: Whether changes stay. All ranks must then make the same ones.
        of_first: Unless those of the first rank are to be taken, as of random numbers.
    """
    slots = [(module, name) for module, name in slots if module._parameters.get(name) is not None]
    for module in {id(module): module for module, _ in slots}.values():
        refuse_flat(module)
        _put_away(module)
    found: dict[int, Any] = {id(module._parameters[name]): module._parameters[name] for module, name in slots}
    parameters = [parameter for parameter in found.values() if not parameter.is_meta]
    with torch.no_grad(), gathered(parameters, write):
        fulls = {id(p): nn.Parameter(_gather(p), p.requires_grad) for p in parameters if is_dtensor(p)}
        seen = {id(p): version_of(fulls.get(id(p), p)) for p in parameters}
        try:
            for module, name in slots:
                module._parameters[name] = fulls.get(id(module._parameters[name]), module._parameters[name])
            yield
        finally:
            own = {id(full): found[key] for key, full in fulls.items()}
            for module, name in slots:
                module._parameters[name] = own.get(id(module._parameters[name]), module._parameters[name])
        if write:
            for parameter in parameters:
                full = fulls.get(id(parameter), parameter)
                if version_of(full) != seen[id(parameter)]:
                    _store(parameter, full.detach(), of_first)


@contextmanager
def gathered(parameters: Iterable[Tensor], change: bool) -> Iterator[None]:
    """While it lasts, those of ``parameters`` that ZeRO stage 3 has cut are whole. A ``change`` of the first rank stays."""
    cut = [parameter for parameter in parameters if is_partitioned(parameter) and id(parameter) not in _open]
    if not cut:
        yield
        return
    _open.update(map(id, cut))
    try:
        with sys.modules["deepspeed"].zero.GatheredParameters(cut, 0 if change else None):
            yield
    finally:
        _open.difference_update(map(id, cut))


def read_master(parameter: Tensor) -> Tensor | None:
    """A copy of what DeepSpeed steps in place of ``parameter``; None where it steps none."""
    if not (has_master(parameter) and parameter.requires_grad):
        return None
    return sys.modules["deepspeed.utils"].safe_get_full_fp32_param(parameter)


def write_master(parameter: Tensor, value: Tensor) -> None:
    """Let what DeepSpeed steps in place of ``parameter`` be ``value``."""
    if not (has_master(parameter) and parameter.requires_grad):
        return
    utils, value = sys.modules["deepspeed.utils"], value.float()
    if not is_partitioned(parameter):
        utils.safe_set_full_fp32_param(parameter, value)
        return
    cut: Any = parameter  # DeepSpeed's own setter cannot cut what does not divide
    size, here = cut.ds_tensor.ds_numel, dist.get_rank(cut.ds_process_group)
    part = value.new_zeros(size)
    own = value.flatten()[here * size : (here + 1) * size]
    part[: len(own)] = own
    utils.safe_set_local_fp32_param(parameter, part)


def _put_away(module: nn.Module) -> None:
    """Let ``fully_shard`` drop the whole copies of parameters that a forward has left, as it does before they are saved: what
    is written to such a copy is lost."""
    for hook in module._state_dict_pre_hooks.values():
        if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp."):
            hook(module, "", False)


def _gather(parameter: Any) -> Tensor:
    mesh, local = parameter.device_mesh, parameter.to_local()
    if local.device.type != mesh.device_type:  # offloaded: what joins the parts does not know its device
        parameter = parameter.from_local(
            local.to(mesh.device_type), mesh, parameter.placements, run_check=False, shape=parameter.shape,
            stride=parameter.stride(),
        )  # fmt: skip
    full = parameter.full_tensor().detach()
    return full.clone() if full.untyped_storage().data_ptr() == local.untyped_storage().data_ptr() else full


def _store(parameter: Any, full: Tensor, of_first: bool) -> None:
    if is_dtensor(parameter):
        if of_first:
            for dim in range(parameter.device_mesh.ndim):
                dist.broadcast(full, group=parameter.device_mesh.get_group(dim), group_src=0)
        parameter.to_local().copy_(part_here(full, parameter))
    elif has_master(parameter):
        if of_first:  # every rank writes its part of the master
            dist.broadcast(full, 0)
        write_master(parameter, full)


def whole_of(tensor: Tensor) -> Tensor:
    """All of ``tensor``, which a user gave and which may be a DTensor; all ranks that hold a part must come here."""
    return _gather(tensor) if is_dtensor(tensor) else tensor


def rows_here(full: Tensor, like: Any) -> Tensor:
    """``full`` as a DTensor on the mesh of the DTensor ``like``: where that is cut, each rank keeps rows of its own."""
    tensors = sys.modules["torch.distributed.tensor"]
    cuts = [place if place.is_replicate() else tensors.Shard(0) for place in like.placements]
    part = part_here(full, SimpleNamespace(device_mesh=like.device_mesh, placements=cuts)).clone()
    mesh, shape, stride = like.device_mesh, full.shape, full.stride()
    return tensors.DTensor.from_local(part, mesh, cuts, run_check=False, shape=shape, stride=stride)


def cut_for(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Cut what is whole in ``state_dict`` as the parameters of ``module`` are into which it is to be loaded."""
    for name, own in module._parameters.items():
        given = state_dict.get(prefix + name)
        if is_dtensor(own) and isinstance(given, Tensor) and not is_dtensor(given) and given.shape == own.shape:
            local = part_here(given.detach(), own).to(own.to_local().device)
            state_dict[prefix + name] = own.from_local(
                local, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
            )


def uneven_files(parameters: Iterable[nn.Parameter], state_dict: dict[str, Any], prefix: str) -> str | None:
    """What is wrong where the ranks that share ``parameters`` were given different keys to load; None if nothing is.

    ``broadcast_from_rank0`` of torch hands the others only those keys that are names of parameters in the tree of modules.
    """
    own = sorted(key for key in state_dict if key.startswith(prefix))
    for parameter in parameters:
        if is_dtensor(parameter) and not parameter.is_meta:
            mesh = parameter.device_mesh
            number = torch.tensor([int(sha256("\n".join(own).encode()).hexdigest()[:15], 16)], device=mesh.device_type)
            for axis in range(mesh.ndim):
                everyone = [torch.empty_like(number) for _ in range(mesh.size(axis))]
                dist.all_gather(everyone, number, group=mesh.get_group(axis))
                if any(not torch.equal(number, other) for other in everyone):
                    return (
                        f"{prefix}: the ranks that share these parameters were given different keys, {len(own)} of them here; "
                        "hand the file to every rank (full_state_dict=True without broadcast_from_rank0), or load it with "
                        "torch.distributed.checkpoint"
                    )
            return None
    return None


def part_here(full: Tensor, like: Any, dims: Iterable[int] | None = None) -> Tensor:
    """What this rank has of ``full`` where it is cut as the DTensor ``like``, or as its ``dims`` are: a view.

    Strided placements, of what ``fully_shard`` cuts after tensor parallelism did, are the last to cut.
    """
    mesh = like.device_mesh
    cuts = [(hasattr(place, "split_factor"), axis, place) for axis, place in enumerate(like.placements)]
    for _, axis, place in sorted(cuts, key=lambda cut: cut[:2]):
        if place.is_replicate() or (dims is not None and place.dim not in dims):
            continue
        pieces, here = full.chunk(mesh.size(axis), place.dim), mesh.get_local_rank(axis)
        full = pieces[here] if here < len(pieces) else full.narrow(place.dim, 0, 0)
    return full
