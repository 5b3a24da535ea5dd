"""One process or several: the same training, on whole models (DDP) or on sharded ones (FSDP2), as torchrun starts it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from teacher import blocks_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

KINDS = ("ddp", "fsdp")


@dataclass(frozen=True)
class Layout:
    kind: str | None
    """One of :data:`KINDS`, or None for one process."""
    device: torch.device
    rank: int = 0
    ranks: int = 1

    def spread(self, model: nn.Module, dtype: torch.dtype) -> Any:
        """``model`` over the processes, computing in ``dtype`` where they shard it."""
        model = model.to(self.device)
        if self.kind == "fsdp":
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            mesh = init_device_mesh(self.device.type, (self.ranks,))
            for part in (*blocks_of(model), model):
                fully_shard(part, mesh=mesh, mp_policy=policy)
        elif self.kind == "ddp" and any(parameter.requires_grad for parameter in model.parameters()):
            return DistributedDataParallel(model)
        return model

    def mean(self, number: Tensor) -> float:
        """Over the processes; waits for the device."""
        if self.kind is not None:
            dist.all_reduce(number := number.clone())
        return number.item() / self.ranks

    def first_says(self, decision: bool) -> bool:
        """What the first process has decided."""
        if self.kind is None:
            return decision
        said = torch.tensor(float(decision), device=self.device)
        dist.broadcast(said, 0)
        return bool(said)

    def wait(self) -> None:
        """For all others."""
        if self.kind is not None:
            dist.barrier()

    def end(self) -> None:
        if self.kind is not None:
            dist.destroy_process_group()


def layout_of(kind: str, device: str) -> Layout:
    """Of this process: alone, or one of those that torchrun has started."""
    if "WORLD_SIZE" not in os.environ:
        return Layout(None, torch.device(device))
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return Layout(kind, torch.device(device), dist.get_rank(), dist.get_world_size())
