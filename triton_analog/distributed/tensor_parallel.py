"""Tensor parallelism: the styles of ``torch.distributed.tensor.parallel`` for analog layers."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.placement_types import Placement

from triton_analog.distributed.split_layers import ColumnSplit, RowSplit, SplitLinear
from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.linear import AnalogLinear
from triton_analog.nn.parts import is_dtensor, is_in_parts
from triton_analog.nn.split import RANGE_BUFFERS


class AnalogColwise(ColwiseParallel):
    """``ColwiseParallel`` for ``AnalogLinear``: each rank has some of the outputs. Digital layers it treats as that does.

    The layer computes what it does on one device, with the same noise: scales per slice are over all outputs, and the input
    range's gradient is of the whole gradient of the input. In its backward each layer adds up its own gradient of the input
    (torch's style adds up that of layers which share one): the rule of a range needs it.

    Args:
        input_layouts: Layout of an input that is no DTensor: ``Replicate()`` (default), or ``Shard`` of any dimension, such as
            ``Shard(1)`` below ``SequenceParallel``. A DTensor has its own.
        output_layouts: Layout of the output; default ``Shard(-1)``.
        use_local_output: Give this rank's part of the output as an ordinary tensor (default) instead of a DTensor.

    Raises (in ``parallelize_module``):
        NotImplementedError: another kind of analog layer.
        ValueError: a weight that is computed from others, shared out already in another way or on a chip; fewer outputs than
            ranks; or a partial layout.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, AnalogLayerBase):
            return super()._apply(module, device_mesh)
        layer = _splittable(module, device_mesh, self)
        outputs, ranks = layer.tile_shape[0], device_mesh.size()
        if (ranks - 1) * -(-outputs // ranks) >= outputs:
            raise ValueError(
                f"out_features: {outputs} outputs leave some of {ranks} ranks without any; use fewer ranks, or leave the layer "
                "whole"
            )
        cuts = {"weight": Shard(0), "bias": Shard(0), "input_range": Replicate(), "learnable_weight_clip": Shard(1)}
        return _split(layer, ColumnSplit(layer, device_mesh, *_layouts(self)), cuts, self)


class AnalogRowwise(RowwiseParallel):
    """``RowwiseParallel`` for ``AnalogLinear``: each rank has some of the slices, as far as their converters, behind which the
    products are added up. Digital layers it treats as that does.

    The layer computes what it does on one device, with the same noise if there are output converters; without them the ranks
    have noise of their own for their slices, which adds up to the same deviation. The bias comes behind the sum.

    Args:
        input_layouts: Layout of an input that is no DTensor; default ``Shard(-1)``. A DTensor has its own.
        output_layouts: Layout of the output: ``Replicate()`` (default), or ``Shard`` of any dimension, such as ``Shard(1)``
            below ``SequenceParallel``.
        use_local_output: Give this rank's part of the output as an ordinary tensor (default) instead of a DTensor.

    Raises (in ``parallelize_module``):
        NotImplementedError: another kind of analog layer.
        ValueError: slices that cannot be shared out evenly; a weight that is computed from others, shared out already in
            another way or on a chip; or a partial layout.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, AnalogLayerBase):
            return super()._apply(module, device_mesh)
        layer = _splittable(module, device_mesh, self)
        _refuse_border_in_a_tile(layer, device_mesh.size())
        cuts = {"weight": Shard(1), "bias": Replicate(), "input_range": Shard(0), "learnable_weight_clip": Shard(0)}
        return _split(layer, RowSplit(layer, device_mesh, *_layouts(self)), cuts, self)


def _layouts(style: Any) -> tuple[Placement, Placement, bool]:
    (given,), (wanted,) = style.input_layouts, style.output_layouts
    for name, layout in (("input_layouts", given), ("output_layouts", wanted)):
        if layout.is_partial():
            raise ValueError(
                f"{name}: got {layout}; Replicate() or Shard(dim) is needed, as a sum comes before a converter"
            )
    return given, wanted, style.use_local_output


def _splittable(module: AnalogLayerBase, mesh: DeviceMesh, style: Any) -> AnalogLinear:
    """``module``, an ``AnalogLinear`` that ``style`` can split over ``mesh``."""
    kind, name = type(style).__name__, type(module).__name__
    if not isinstance(module, AnalogLinear):
        raise NotImplementedError(
            f"{kind}: got a {name}, and only AnalogLinear can be split over ranks; leave this one out of the plan, so that every "
            "rank has all of it (fully_shard may shard it, and experts may be shared out whole)"
        )
    if module.split is not None:
        raise ValueError(f"{kind}: this {name} was split before; name it once in the plan")
    if mesh.ndim != 1:
        raise ValueError(
            f"{kind}: got a mesh of {mesh.ndim} dimensions; hand over that of tensor parallelism, mesh['tp']"
        )
    weight = module.weight_source
    if weight is None:
        raise ValueError(
            f"weight: that of this {name} is computed from other parameters (weight_norm, pruning, a parametrization); remove "
            "that first, or leave the layer whole"
        )
    if module.programmed is not None:
        raise ValueError(
            f"{kind}: this {name} is on a simulated chip, which shares its parameters; take the model it was made of"
        )
    if any(is_in_parts(p) and not (is_dtensor(p) and p.device_mesh == mesh) for p in module._parameters.values()):
        raise ValueError(
            f"{kind}: the parameters of this {name} are sharded already; convert first, then parallelize_module, and fully_shard "
            "or DistributedDataParallel after that"
        )
    return module


def _refuse_border_in_a_tile(layer: AnalogLinear, ranks: int) -> None:
    (_, features), widths = layer.tile_shape, layer.get_split_sizes()
    slices = len(widths)
    if slices % ranks == 0 and len(set(widths)) == 1:
        return
    fitting = [number for number in range(1, slices + 1) if slices % number == 0 and len(set(widths)) == 1]
    shapes = (
        f"{slices} slices of {widths[0]}"
        if len(set(widths)) == 1
        else f"{slices} slices of {widths[0]} or {widths[-1]}"
    )
    which = ", ".join(map(str, fitting)) or "no number of ranks but 1"
    raise ValueError(
        f"mapping.max_input_size: {layer.rpu_config.mapping.max_input_size} cuts {features} inputs into {shapes}, which {ranks} "
        f"ranks cannot share: the border of a part must be that of a tile. Ranks that fit: {which}. Choose another "
        "max_input_size, another number of ranks, or AnalogColwise"
    )


def _split(layer: AnalogLinear, split: SplitLinear, cuts: dict[str, Placement], style: Any) -> AnalogLinear:
    """Cut the parameters and buffers of ``layer``, and tell it."""
    for name, placement in cuts.items():
        parameter: Any = layer._parameters[name]
        if parameter is None:
            continue
        if is_dtensor(parameter):  # shared with a module that was parallelized before
            if tuple(parameter.placements) != (placement,):
                raise ValueError(
                    f"{name}: it is a DTensor of placements {tuple(parameter.placements)}, shared with another module; "
                    f"{placement} is needed here: split both alike"
                )
            continue
        cut = distribute_tensor(parameter, split.mesh, [placement], src_data_rank=style.src_data_rank)
        layer.register_parameter(name, nn.Parameter(cut, requires_grad=parameter.requires_grad))
    for name in RANGE_BUFFERS:
        buffer = layer._buffers[name]
        if buffer is not None:
            layer._buffers[name] = buffer[split.own_ranges].clone()
    layer.split = split
    layer._fit_shift()
    layer._mark_undecayed()
    return layer
