"""How a layer that tensor parallelism has split computes its part: by outputs, or by slices of the inputs (SEMANTICS 9).

Everything between the collectives is :func:`triton_analog.calls.linear` on this rank's tensors.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

import triton_analog.ops as ops
from triton_analog.calls import Numbers, check_input, draw_seed, input_dtype
from triton_analog.nn.compilers import run_while_tracing
from triton_analog.nn.read_noise import reads
from triton_analog.nn.split import Split
from triton_analog.ops.input_range import _input_range_grad
from triton_analog.reference.grid import wide
from triton_analog.seeds import noise_rank, placed

GROUP = 16
"""Rows and columns of a field of noise that belong together."""


class SplitLinear(Split):
    """What both ways of splitting an ``AnalogLinear`` have in common.

    Args:
        layer: The whole layer.
        mesh: Of one dimension, the ranks that share it.
        input_layout: Of inputs that are no DTensors.
        output_layout: Of the outputs.
        use_local_output: Whether outputs are ordinary tensors, each rank's part.
    """

    def __init__(
        self, layer: Any, mesh: DeviceMesh, input_layout: Placement, output_layout: Placement, use_local_output: bool
    ) -> None:
        self.mesh, self.group = mesh, mesh.get_group()
        self.ranks, self.rank = mesh.size(), mesh.get_local_rank()
        self.input_layout, self.output_layout, self.use_local_output = input_layout, output_layout, use_local_output
        self.whole_outputs, self.whole_features = layer.tile_shape
        self.whole_slices = layer.slices
        self._agrees = False  # whether the ranks were seen to draw the same noise

    # ---- The forward, as ``AnalogMatrixLayer._matmul`` for a whole layer -----------------------------------------------

    def matmul(self, layer: Any, x: Any, product: Callable[..., Tensor]) -> Any:
        numbers = layer._numbers()
        if numbers.training and not layer.was_called:
            layer._begin_training()
        if not numbers.training and reads(layer.rpu_config.forward):
            raise ValueError(
                "forward.w_noise: tensor parallelism has split this layer, and read noise of weights needs whole ones; set it to "
                "0, or evaluate a model of the whole state dict: restore_analog(digital_model, state_dict)"
            )
        matrix, bias, stored, clip = self._operands(layer)
        given, layout = self._given(x)
        rows = self._gathered(given, layout)
        check_input(rows, matrix)
        if layer._range_starts_up():
            layer._learn_range(rows)
        range_ = layer.range_in_use(stored) if stored is not None and layer.is_shifted() else stored
        tally = layer._tally_of(range_) if numbers.training else None
        seed, weight_seed = self._seeds(layer, rows, matrix, numbers)
        if layer.training and layer.gaussian_clip() is not None:
            layer._watch_for_the_clip()
        y = self._product(
            product, numbers, given, layout, rows, matrix, bias, range_, clip, seed, weight_seed, tally
        )  # fmt: skip
        return self._outputs(y, bias)

    def matmul_without_range(self, layer: Any, numbers: Numbers, x: Any, product: Callable[..., Tensor]) -> Any:
        matrix, bias, _, clip = self._operands(layer)
        given, layout = self._given(x)
        rows = self._gathered(given, layout)
        y = self._product(product, numbers, given, layout, rows, matrix, bias, None, clip, None, None, None)
        return self._outputs(y, bias)

    @abstractmethod
    def _product(
        self,
        product: Callable[..., Tensor],
        numbers: Numbers,
        given: Tensor,
        layout: Placement,
        rows: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        range_: Tensor | None,
        clip: Tensor | None,
        seed: Tensor | None,
        weight_seed: Tensor | None,
        tally: Tensor | None,
    ) -> Tensor:
        """This rank's product: its outputs, or its share of all."""

    def _operands(self, layer: Any) -> tuple[Tensor, Any, Tensor | None, Tensor | None]:
        """Weight, bias, stored ranges and learned clip of the part. (A bias may be a DTensor.)"""
        weight = layer.weight
        if not isinstance(weight, DTensor):
            raise ValueError(
                f"weight: that of this {type(layer).__name__} was split over ranks, but is a {type(weight).__name__} now; put "
                "the DTensor back, or build the model anew and parallelize that"
            )
        range_, clip = layer.input_range, layer.learnable_weight_clip
        own = [None if parameter is None else parameter.to_local() for parameter in (range_, clip)]
        return weight.to_local(), self._bias(layer.bias), *own

    def _bias(self, bias: DTensor | None) -> Any:
        return bias

    # ---- Inputs and outputs -------------------------------------------------------------------------------------------

    def _distributed(self, x: Any) -> Any:
        """An input as a DTensor, in the dtype in which it is multiplied."""
        x = x.to(input_dtype(x))
        if not isinstance(x, DTensor):
            return DTensor.from_local(x, self.mesh, [self.input_layout], run_check=False)
        if x.device_mesh != self.mesh:
            raise ValueError(
                f"input: a DTensor on {x.device_mesh}, but this layer was split on {self.mesh}; redistribute it, or hand over a "
                "local tensor in the layout input_layouts"
            )
        return x

    @abstractmethod
    def _given(self, x: Any) -> tuple[Tensor, Placement]:
        """This rank's part of an input, and the layout in which it is one."""

    @abstractmethod
    def _gathered(self, given: Tensor, layout: Placement) -> Tensor:
        """What is multiplied, without a gradient unless it is ``given`` itself."""

    @abstractmethod
    def _outputs(self, y: Tensor, bias: Any) -> Any:
        """Outputs in their layout."""

    @torch.no_grad()
    def inputs(self, x: Any) -> Tensor:
        return self._gathered(*self._given(x)).detach()

    # ---- Noise ----------------------------------------------------------------------------------------------------------

    def _seeds(self, layer: Any, rows: Tensor, matrix: Tensor, numbers: Numbers) -> tuple[Tensor | None, Tensor | None]:
        """The seeds of the forward and of its weight, drawn as a whole layer draws them and placed where this part is."""
        if not (numbers.draws_signals or numbers.disturbs_weight):
            return None, None
        if not self._agrees:
            _agree_on_noise(self, layer)
        seed: Tensor | None = None
        weight_seed: Tensor | None = None
        if layer._noise_lasts(numbers):
            seed, weight_seed, *_ = layer._lasting_noise(rows, matrix, numbers)
        if seed is None and (numbers.draws_signals or weight_seed is None):
            seed = draw_seed(rows.device)
        weight_seed = seed if weight_seed is None else weight_seed
        if numbers.disturbs_weight:
            weight_seed = self._place(weight_seed, *self._place_of_weight())
        if seed is not None and numbers.draws_signals:
            disturbs_outputs = numbers.training and numbers.out_noise > 0
            seed = self._place(seed, *self._place_of_outputs(disturbs_outputs))
        return seed, weight_seed

    @staticmethod
    def _place(seed: Tensor | None, *place: int) -> Tensor:
        assert seed is not None
        return placed(seed, *place) if any(place) else seed

    @abstractmethod
    def _place_of_weight(self) -> tuple[int, int, int]:
        """First row, column and plane of the part's weight in the whole's noise."""

    @abstractmethod
    def _place_of_outputs(self, disturbed: bool) -> tuple[int, int, int]:
        """Those of its product; ``disturbed``: whether outputs have noise, and not the inputs alone."""

    def _refuse_uneven_noise(self, size: int, what: str, remedy: str) -> None:
        """Parts of ``size`` begin where a group of numbers of the whole's noise does. All ranks come to the same answer."""
        if size % GROUP and self.ranks > 1:
            raise ValueError(
                f"weight: tensor parallelism has split this layer into parts of {size} {what}, but a part has its noise of the "
                f"whole layer in groups of {GROUP}; {remedy}, or switch the noise off (modifier.noise_type, forward.out_noise)"
            )

    def saved(self, buffer: Tensor) -> Tensor:
        return buffer


@run_while_tracing
def _agree_on_noise(split: SplitLinear, layer: Any) -> None:
    """See, once, that the ranks will draw the same seeds; one that lasts becomes that of the first rank."""
    device = split.mesh.device_type
    state = torch.get_rng_state() if device == "cpu" else torch.get_device_module(device).get_rng_state()
    digest = sha256(state.numpy().tobytes() + str(noise_rank()).encode()).hexdigest()
    own = torch.tensor([int(digest[:15], 16)], device=device)
    everyone = [torch.empty_like(own) for _ in range(split.ranks)]
    dist.all_gather(everyone, own, group=split.group)
    if any(not torch.equal(own, other) for other in everyone):
        raise ValueError(
            "seed: the ranks that share this layer would draw different noise for its parts. Give them the same numbers: "
            "torch.manual_seed(seed) with the same seed on all ranks of the tensor-parallel mesh (other seeds on other replicas "
            "do no harm), and triton_analog.distributed.set_parallel(model, statistics=mesh['dp'], tp=mesh['tp'])"
        )
    if layer.weight_noise_seed is not None:
        dist.broadcast(layer.weight_noise_seed, group=split.group, group_src=0)
    split._agrees = True


# ---- By outputs -----------------------------------------------------------------------------------------------------------


class ColumnSplit(SplitLinear):
    """Each rank has some of the outputs, and multiplies all inputs."""

    def __init__(self, layer: Any, mesh: DeviceMesh, *layouts: Any) -> None:
        super().__init__(layer, mesh, *layouts)
        self.features, self.slices, self.first_slice = self.whole_features, self.whole_slices, 0
        self.most_outputs = -(-self.whole_outputs // self.ranks)

    def _bias(self, bias: DTensor | None) -> Tensor | None:
        return None if bias is None else bias.to_local()

    def _given(self, x: Any) -> tuple[Tensor, Placement]:
        if not isinstance(x, DTensor) and self.input_layout.is_replicate():
            return x.to(input_dtype(x)), self.input_layout
        x = self._distributed(x)
        (layout,) = x.placements
        is_cut_along_rows = (
            layout.is_shard() and layout.dim % x.ndim != x.ndim - 1
        )  # the rule of a range adds over rows
        if not (layout.is_replicate() or is_cut_along_rows):
            layout = Replicate()
            x = x.redistribute(placements=[layout])
        return x.to_local(grad_placements=[layout]), layout

    @torch.no_grad()
    def _gathered(self, given: Tensor, layout: Placement) -> Tensor:
        if layout.is_replicate():
            return given.detach()
        return self._between(given, layout, Replicate())

    def _between(self, local: Tensor, layout: Placement, wanted: Placement) -> Tensor:
        """``local`` in another layout, without a gradient."""
        found: Any = DTensor.from_local(local.detach(), self.mesh, [layout], run_check=False)
        return found.redistribute(placements=[wanted]).to_local()

    def _product(
        self, product: Any, numbers: Numbers, given: Tensor, layout: Placement, rows: Tensor, matrix: Tensor, bias: Any,
        range_: Tensor | None, clip: Tensor | None, seed: Tensor | None, weight_seed: Tensor | None, tally: Tensor | None,
    ) -> Tensor:  # fmt: skip
        wmax, slice_wmax = self._scales(matrix, clip, numbers)
        rows = _InputOfAll.apply(given, range_, tally, rows, self, layout, numbers.fast_mode)
        if clip is not None:
            clip = _ScaledGradient.apply(clip, (len(matrix) / self.whole_outputs) ** 0.5)
        if layout.is_replicate():  # the backward needs the input itself anyway
            numbers = numbers._replace(save_input="full")
        numbers = numbers._replace(clips_gradient=False)
        range_ = None if range_ is None else range_.detach()
        return product(
            rows, matrix, bias, range_, clip, seed, weight_seed, None, wmax, numbers, None, slice_wmax
        )  # fmt: skip

    @torch.no_grad()
    def _scales(self, matrix: Tensor, clip: Tensor | None, numbers: Numbers) -> tuple[Tensor | None, Tensor | None]:
        """The scale of this rank's outputs, if it was found on the way, and each slice's largest on all ranks; None where scales
        are per channel."""
        disturbs_outputs = numbers.training and numbers.out_noise > 0
        per_slice = (
            numbers.weight_quantization == "per_tensor"
            or (numbers.disturbs_weight and numbers.weight_noise == "per_tensor")
            or (numbers.out_bound > 0 and not numbers.out_bound_per_channel)
            or (disturbs_outputs and not numbers.out_noise_per_channel)
        )
        if not per_slice:
            return None, None
        wmax = ops.absmax(matrix, self.slices) if clip is None else wide(clip).abs()
        largest = wmax.amax(1, keepdim=True)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return (wmax if clip is None else None), largest

    def _outputs(self, y: Tensor, bias: Any) -> Any:
        last = y.ndim - 1
        layout = self.output_layout
        is_cut_along_outputs = layout.is_shard() and layout.dim % y.ndim == last  # type: ignore[attr-defined]
        if is_cut_along_outputs and self.use_local_output:
            return y
        shape = (*y.shape[:-1], self.whole_outputs)
        stride = torch.empty(shape, device="meta").stride()
        out: Any = DTensor.from_local(
            y, self.mesh, [Shard(last)], run_check=False, shape=torch.Size(shape), stride=stride
        )
        if not is_cut_along_outputs:
            out = out.redistribute(placements=[layout])
        return out.to_local() if self.use_local_output else out

    def _place_of_weight(self) -> tuple[int, int, int]:
        self._refuse_uneven(True)
        return self.rank * self.most_outputs, 0, 0

    def _place_of_outputs(self, disturbed: bool) -> tuple[int, int, int]:
        self._refuse_uneven(disturbed)
        return 0, self.rank * self.most_outputs if disturbed else 0, 0

    def _refuse_uneven(self, disturbed: bool) -> None:
        if disturbed:
            self._refuse_uneven_noise(
                self.most_outputs,
                "outputs",
                f"choose outputs of which each of {self.ranks} ranks has a multiple of {GROUP}",
            )

    def whole_ranges(self, found: Tensor | None) -> Tensor | None:
        """The ranks saw the same inputs; those that draw rows of them may have drawn others."""
        if found is not None:
            found = found.to(self.mesh.device_type)
            dist.broadcast(found, group=self.group, group_src=0)
        return found


class _InputOfAll(torch.autograd.Function):
    """The input of all ranks, on its way to their parts. What they make of its gradient is added up before a range clips it: the
    rule of the range (SEMANTICS 6) is not linear in it."""

    @staticmethod
    def forward(
        ctx: Any, given: Tensor, range_: Tensor | None, tally: Tensor | None, rows: Tensor, split: ColumnSplit,
        layout: Placement, fast_mode: bool,
    ) -> Tensor:  # fmt: skip
        ctx.has_range = range_ is not None
        ctx.save_for_backward(*((given, range_) if ctx.has_range else ()))
        ctx.split, ctx.layout, ctx.fast_mode, ctx.counts = split, layout, fast_mode, tally is not None
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        split, layout = ctx.split, ctx.layout
        grad = split._between(grad, Partial(), layout)
        drange = tally = None
        if ctx.has_range:
            given, range_ = ctx.saved_tensors
            shape, rule = grad.shape, (-1.0 if ctx.counts else 0.0, 1.0, ctx.fast_mode)
            flat, x = grad.reshape(-1, shape[-1]), given.reshape(-1, shape[-1])
            flat, found = _input_range_grad(flat, x, range_.contiguous(), split.slices, *rule)
            grad = flat.view(shape)
            if not layout.is_replicate():
                dist.all_reduce(found, group=split.group)
            drange = found
            if found.ndim == 2:
                drange, tally = found[0], found[1:]
            drange = drange.to(range_.dtype)
        return grad, drange, tally, None, None, None, None


class _ScaledGradient(torch.autograd.Function):
    """A tensor whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


# ---- By slices of the inputs ----------------------------------------------------------------------------------------------


class RowSplit(SplitLinear):
    """Each rank has some of the slices of the inputs, and what their converters give is added up."""

    def __init__(self, layer: Any, mesh: DeviceMesh, *layouts: Any) -> None:
        super().__init__(layer, mesh, *layouts)
        self.features, self.slices = self.whole_features // self.ranks, self.whole_slices // self.ranks
        self.first_slice = self.rank * self.slices

    def _given(self, x: Any) -> tuple[Tensor, Placement]:
        own = Shard(x.ndim - 1)
        layout: Any = self.input_layout
        if not isinstance(x, DTensor) and layout.is_shard() and layout.dim % x.ndim == x.ndim - 1:
            return x.to(input_dtype(x)), own
        return self._distributed(x).redistribute(placements=[own]).to_local(grad_placements=[own]), own

    def _gathered(self, given: Tensor, layout: Placement) -> Tensor:
        return given

    def _product(
        self, product: Any, numbers: Numbers, given: Tensor, layout: Placement, rows: Tensor, matrix: Tensor, bias: Any,
        range_: Tensor | None, clip: Tensor | None, seed: Tensor | None, weight_seed: Tensor | None, tally: Tensor | None,
    ) -> Tensor:  # fmt: skip
        numbers = numbers._replace(out_noise=numbers.out_noise * (self.slices / self.whole_slices) ** 0.5)
        return product(rows, matrix, None, range_, clip, seed, weight_seed, None, None, numbers, tally)

    def _outputs(self, y: Tensor, bias: Any) -> Any:
        layout: Any = self.output_layout
        share: Any = DTensor.from_local(y, self.mesh, [Partial()], run_check=False)
        own = share.redistribute(placements=[layout]).to_local()
        if bias is not None:
            own = (own + self._bias_of(bias, y.ndim)).to(y.dtype)
        if self.use_local_output:
            return own
        return DTensor.from_local(own, self.mesh, [layout], run_check=False, shape=y.shape, stride=y.stride())

    def _bias_of(self, bias: Any, dims: int) -> Tensor:
        """What this rank adds to its part of the outputs."""
        layout: Any = self.output_layout
        if layout.is_replicate():
            return bias.to_local()
        if layout.dim % dims == dims - 1:
            return bias.redistribute(placements=[Shard(0)]).to_local()
        return _SummedGradient.apply(bias.to_local(), self.group)

    def _place_of_weight(self) -> tuple[int, int, int]:
        self._refuse_uneven_noise(
            self.features,
            "inputs",
            f"choose slices (mapping.max_input_size) of which each rank has a multiple of {GROUP} inputs",
        )
        return 0, self.rank * self.features, 0

    def _place_of_outputs(self, disturbed: bool) -> tuple[int, int, int]:
        return 0, 0, self.first_slice

    def whole_ranges(self, found: Tensor | None) -> Tensor | None:
        own = torch.full((self.slices,), torch.nan, dtype=torch.float64, device=self.mesh.device_type)
        if found is not None:
            own.copy_(found)
        everyone = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(everyone, own, group=self.group)
        whole = torch.cat(everyone)
        return None if bool(whole.isnan().all()) else whole.nan_to_num(0.0, posinf=torch.inf)

    def saved(self, buffer: Tensor) -> Tensor:
        return DTensor.from_local(buffer.detach(), self.mesh, [Shard(0)], run_check=False)


class _SummedGradient(torch.autograd.Function):
    """A tensor whose gradient is the sum of those of all ranks of a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
