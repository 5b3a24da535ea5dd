"""What waits for an optimizer's step: changes of a stored range where that is kept in parts, and what decides about its decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from triton_analog.config import TorchInferenceRPUConfig
from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.before_step import watch
from triton_analog.nn.compilers import run_while_tracing
from triton_analog.nn.parts import is_dtensor, is_stepped_elsewhere
from triton_analog.nn.sharding import is_gathered, own_part
from triton_analog.nn.split import Split, stored_range
from triton_analog.ops._transforms import is_transforming

SHIFTS = ("input_range_shift", "input_range_shift_rest")
"""Buffers of a layer."""


class RangeShift(AnalogLayerBase):
    """The part of a layer that its input ranges need around the steps of an optimizer.

    **The shift.** FSDP2, DeepSpeed's ZeRO and other masters keep the tensor that is stepped apart from the one that a forward
    sees, and what a start-up wrote into the latter would be lost. There it writes ``input_range_shift [S]`` instead: what the
    stored range still lacks, and in ``input_range_shift_rest [S]`` what their sum rounds off (buffers in fp32 or more that are
    not saved). So the range in use is to the last bit what it is elsewhere, which a clamp at the largest input of all asks
    for. Forwards add both, state dicts have the sum, and before the next step it goes into what is stepped
    (:mod:`triton_analog.nn.before_step`). Elsewhere they stay 0, and nothing is launched for them.

    **The tally.** How many inputs a backward found unclipped arrives as the gradient of ``range_tally [2, S]``, so that autograd
    adds up micro-batches and nothing scales it with the loss. Range decay is decided by it once per step. It is no buffer:
    ``DistributedDataParallel`` would hand the first rank's to all others.
    """

    rpu_config: TorchInferenceRPUConfig
    groups: int
    input_range: nn.Parameter | None
    input_range_shift: Tensor | None
    input_range_shift_rest: Tensor | None
    range_tally: Tensor | None = None
    split: Split | None = None
    """Which part of the layer is this rank's, under tensor parallelism."""

    has_range_master = False
    """Whether an optimizer steps a copy of the range in its place."""
    _is_shifted = False  # whether the shift may be other than 0, as the host knows
    _shifts_in_graphs = False  # a compiled forward tells the host nothing

    # ---- The shift ------------------------------------------------------------------------------------------------------

    def stores_range_apart(self) -> bool:
        """Whether what a forward writes into the range would be lost."""
        parameter = self._parameters.get("input_range")
        return self.has_range_master or is_stepped_elsewhere(parameter) or is_gathered(self, "input_range")

    def _refuse_unknown_master(self) -> None:
        """DeepSpeed's optimizers step flat tensors, in which nothing finds this layer's range by itself.

        Raises:
            RuntimeError: nothing knows the range's master.
        """
        range_ = self._parameters.get("input_range")
        if range_ is not None and range_.requires_grad and is_stepped_elsewhere(range_) and not self.has_range_master:
            raise RuntimeError(
                f"input_range: DeepSpeed steps a copy of that of this {type(self).__name__}, and what the range learns from "
                "data, and its decay, would be lost. Call triton_analog.optim.attach(engine, optimizer), with what "
                "deepspeed.initialize gave, or train with AnalogCallback in a Trainer, before the first training forward"
            )

    def is_shifted(self) -> bool:
        """Whether the range in use may be another than the stored one."""
        return self._is_shifted or self._shifts_in_graphs

    @torch.no_grad()
    def _range_to_learn(self) -> Tensor | None:
        """A copy of the range in use, to be changed in place, where the stored one must not be; else None."""
        assert self.input_range is not None
        assert self.input_range_shift is not None
        compiling = torch.compiler.is_compiling()
        if not (_shifts_in_graph(self) if compiling else self.stores_range_apart()):
            return None
        range_ = stored_range(self)
        if compiling or self.is_shifted():
            return self.range_in_use(range_)
        return range_.to(self.input_range_shift.dtype, copy=True)

    @torch.no_grad()
    def _shift_to(self, range_: Tensor) -> None:
        """Let ``range_`` be the range in use."""
        assert self.input_range is not None
        assert self.input_range_shift is not None
        assert self.input_range_shift_rest is not None
        stored = stored_range(self)
        self.input_range_shift.copy_(range_ - stored)
        self.input_range_shift_rest.copy_(range_ - (stored + self.input_range_shift))
        if not torch.compiler.is_compiling():
            self._is_shifted = True

    def range_in_use(self, stored: Tensor) -> Tensor:
        """The stored range and what it lacks; differentiable by ``stored``."""
        assert self.input_range_shift is not None
        assert self.input_range_shift_rest is not None
        return stored + self.input_range_shift + self.input_range_shift_rest

    @torch.no_grad()
    def fold_shift(self, stepped: Tensor, start: int = 0) -> None:
        """Put the shift into ``stepped``: what an optimizer steps for the range, or a part of it that begins at ``start``. The
        shift stays until :meth:`drop_shift`."""
        local: Any = stepped
        part = slice(start, start + stepped.numel())
        if is_dtensor(stepped):
            local, part = local.to_local(), own_part(self, stepped)
        for lacking in (self.input_range_shift, self.input_range_shift_rest):
            assert lacking is not None
            local.add_(lacking[part].to(local.device))

    @torch.no_grad()
    def drop_shift(self) -> None:
        """The stored range is the one in use."""
        self._is_shifted = False
        for lacking in (self.input_range_shift, self.input_range_shift_rest):
            if lacking is not None:
                lacking.zero_()

    @torch.no_grad()
    def _saved_range(self, saved: Any) -> Any:
        """The range in use, in the form of ``saved``, what a state dict has of the stored one."""
        if not self.is_shifted() or saved.numel() == 0:
            return saved
        local, part = (saved.to_local(), own_part(self, saved)) if is_dtensor(saved) else (saved.detach(), slice(None))
        in_use = local
        for lacking in (self.input_range_shift, self.input_range_shift_rest):
            assert lacking is not None
            in_use = in_use + lacking[part].to(local.device)
        in_use = in_use.to(local.dtype)
        if not is_dtensor(saved):
            return in_use
        return type(saved).from_local(
            in_use, saved.device_mesh, saved.placements, run_check=False, shape=saved.shape, stride=saved.stride()
        )

    # ---- The tally ------------------------------------------------------------------------------------------------------

    def _tally_of(self, range_: Tensor | None) -> Tensor | None:
        """Where a training forward with ``range_`` counts for its decay; None where that cannot decay."""
        if range_ is None or not range_.requires_grad:
            return None
        tally = self.range_tally
        moved = tally is None or tally.device != range_.device  # by something that does not move modules
        if moved and not (torch.compiler.is_compiling() or is_transforming()):
            self._renew_tally()
        config = self.rpu_config.pre_post.input_range
        return self.range_tally if config.decay > 0 and not config.fast_mode and not torch.jit.is_tracing() else None

    def _renew_tally(self) -> None:
        range_ = self.input_range
        self.range_tally = None if range_ is None else _wide_zeros(range_, 2, self.ranges_here()).requires_grad_()

    def take_tally(self) -> Tensor | None:
        """What was counted since this was last called, ``[2, S]``: unclipped inputs, and all of them. None if nothing was."""
        if self.range_tally is None:
            return None
        counted, self.range_tally.grad = self.range_tally.grad, None
        return counted

    # ---- State ----------------------------------------------------------------------------------------------------------

    def ranges_here(self) -> int:
        """How many input ranges the part of the layer has that this rank computes."""
        assert self.input_range is not None
        return self.input_range.numel() if self.split is None else self.split.slices

    def _fit_shift(self) -> None:
        """A shift and a tally exactly where there is a range."""
        range_ = self.input_range
        if range_ is None:
            self.input_range_shift = self.input_range_shift_rest = self.range_tally = None
            self._is_shifted = False
            return
        shift, fresh = self.input_range_shift, _wide_zeros(range_, self.ranges_here())
        is_narrow = shift is not None and torch.promote_types(shift.dtype, fresh.dtype) != shift.dtype
        if shift is None or is_narrow or (shift.shape, shift.device) != (fresh.shape, fresh.device):
            self.input_range_shift, self.input_range_shift_rest = fresh, fresh.clone()
            self._is_shifted = False
            self._renew_tally()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """The shift keeps the precision that it has, whatever becomes of the range."""
        super()._apply(fn, recurse)
        for name in SHIFTS:
            lacking = getattr(self, name)
            if lacking is not None and lacking.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, lacking.float())
        if self.range_tally is not None:
            self._renew_tally()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and pickles come here; files of before have neither."""
        super().__setstate__(state)
        for name in SHIFTS:
            if name not in self._buffers:
                self.register_buffer(name, None, persistent=False)
        self._fit_shift()
        watch(self)


@run_while_tracing
def _shifts_in_graph(layer: RangeShift) -> bool:
    """Whether the graph that is traced writes a shift. Whatever it is then, the host does not know it."""
    apart = layer.stores_range_apart()
    layer._shifts_in_graphs = layer._shifts_in_graphs or apart
    return apart


def _wide_zeros(range_: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.promote_types(range_.dtype, torch.float32), device=range_.device)
