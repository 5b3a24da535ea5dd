"""The Gaussian clip of weights that are cut over the ranks of a mesh: every rank clamps its part, by the deviation of the whole.

Where the parts hold whole channels, as those of ``fully_shard`` do, there is nothing to say between the ranks. Otherwise they
merge count, mean and sum of squares: one small message for all weights together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import triton_analog.reference as reference
from triton_analog.nn.parts import part_here
from triton_analog.reference.grid import wide


class PartsClip(NamedTuple):
    """One clip."""

    source: Any
    """The DTensor that holds the weight."""
    expert: int | None
    """Which of the weights that are stacked in it; None: it is the weight."""
    sigma: float
    channel_dim: int | None
    """The dimension of the weight each of whose indices has a deviation of its own; None: there is one for the whole weight."""

    @property
    def local(self) -> Tensor:
        """What this rank has of the weight: a view, which may be empty."""
        local = self.source.to_local().detach()
        if self.expert is None:
            return local
        here = part_here(torch.arange(len(self.source)), self.source, dims=[0]).tolist()
        return local[here.index(self.expert)] if self.expert in here else local[:0].flatten(0, 1)

    @property
    def axes(self) -> list[int]:
        """The dimensions of the mesh over which the moments are merged."""
        dim = self.channel_dim
        if self.expert is not None:
            dim = None if dim is None else dim + 1
        whole_here = {dim} if self.expert is None else {dim, 0}
        return [
            axis
            for axis, place in enumerate(self.source.placements)
            if not place.is_replicate() and place.dim not in whole_here
        ]


@torch.no_grad()
def clip_parts(clips: Iterable[PartsClip]) -> None:
    """Clamp each weight in place. All ranks that hold a part must come here, with the same clips in the same order."""
    together: dict[Any, list[PartsClip]] = {}
    for clip in clips:
        if not clip.axes:
            reference.clip([clip.local], [clip.sigma], clip.channel_dim)
        else:
            key = clip.source.device_mesh, tuple(clip.axes), wide(clip.source.to_local()[:0]).dtype
            together.setdefault(key, []).append(clip)
    for (mesh, axes, _), alike in together.items():
        _clip_together(mesh, axes, alike)


def _clip_together(mesh: Any, axes: Sequence[int], clips: list[PartsClip]) -> None:
    parts = [clip.local for clip in clips]
    found = [_moments(part, clip.channel_dim) for part, clip in zip(parts, clips, strict=True)]
    moments = torch.cat(found).to(mesh.device_type)
    for axis in axes:
        everyone = [torch.empty_like(moments) for _ in range(mesh.size(axis))]
        dist.all_gather(everyone, moments, group=mesh.get_group(axis))
        moments = reference.merge_moments(torch.stack(everyone))
    bounds = torch.where(moments[:, 0] > 1, reference.std_of(moments), torch.inf)  # a single number has no deviation
    for part, clip, bound in zip(parts, clips, bounds.split([len(own) for own in found]), strict=True):
        shape = [-1 if dim == clip.channel_dim else 1 for dim in range(part.ndim)]
        limit = (clip.sigma * bound).to(part.device).view(shape)
        part.clamp_(-limit, limit)


def _moments(part: Tensor, channel_dim: int | None) -> Tensor:
    """Count, mean and sum of squared distances of each channel of ``part``, or of all of it: ``[C, 3]``."""
    rows = part.reshape(1, -1) if channel_dim is None else part.movedim(channel_dim, 0).flatten(1)
    rows = wide(rows)
    count = rows.new_full((len(rows),), rows.shape[1])
    if rows.shape[1] == 0:
        return torch.stack([count, count, count], 1)
    mean = rows.mean(1)
    return torch.stack([count, mean, (rows - mean[:, None]).square().sum(1)], 1)
