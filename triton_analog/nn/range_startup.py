"""The start-up of input ranges: the stored ranges of a layer learn from its first training batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self

from triton_analog.config import TorchInferenceRPUConfig
from triton_analog.functional import update_input_range
from triton_analog.nn.parts import refuse_flat
from triton_analog.nn.range_shift import RangeShift
from triton_analog.nn.ranks import is_paused, is_trial, refuse_unsaid_group
from triton_analog.nn.settings import constant
from triton_analog.nn.versions import version_of
from triton_analog.ops._transforms import is_transforming
from triton_analog.ops.input_range import recomputing

LEAST_TRACE = 2e-5
"""Above what AIHWKIT-Lightning's files hold in the buffer before any data, 1e-5; below what averaging leaves of a 1."""


class _Ranks:
    """Holds the process group of a layer, which copies of the layer share and pickles leave behind."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> _Ranks:
        return self

    def __reduce__(self) -> Any:
        return _Ranks, (None if self.group is None else "world",)


def _is_stand_in(range_: Tensor | None) -> bool:
    """Whether ``torch.func.functional_call`` put another tensor in the place of the layer's own. The host knows nothing of
    what that has seen."""
    return range_.__class__ is Tensor


class RangeStartup(RangeShift):
    """The part of a layer that sets its stored input ranges from data (SEMANTICS 7); by a shift, where the stored ones are kept
    in parts (:class:`RangeShift`).

    Each slice learns from its first ``init_from_data`` batches, by a counter on the device. So that nothing is launched for
    ever after, the host also counts: once a layer has run ``init_from_data`` training forwards, its start-up is over for all
    slices. Reading the device's counter instead would make the host wait. The two differ for a batch in which a slice does
    not deviate at all (all zeros, say) or is not finite: it counts on the host but not for that slice, which then has learned
    from fewer batches. (An empty batch does not count, except in a process group, where ranks must agree without asking.)
    :meth:`reset_analog_state` starts anew, and loading a state dict goes on where its slowest slice was.

    What averages models (EMA, SWA) may average the counters too, and rounds those down, whole numbers that they are: a start-up
    that was over would go on. So the buffer ``x_max``, or in the fast mode, which needs that, ``input_range_residual`` is 1 for a
    slice whose start-up is over: in an average it is well above 0 if any of the averaged models was that far, and then the
    start-up of the average is over as well. (The residual is not saved: who averages state dicts in the fast mode must copy
    counters.)

    A compiled forward must not change Python state, and the host knows nothing of the tensors that ``functional_call`` hands
    a layer. There the device alone ends the start-up, slice by slice, and the statistics go on being launched; they then read
    nothing but the counter. Transforms of ``torch.func`` cannot change a range in place, so they are refused until the
    layer's own start-up is over.
    """

    rpu_config: TorchInferenceRPUConfig
    groups: int
    input_range: nn.Parameter | None
    input_range_update_idx: Tensor | None
    x_min: Tensor | None
    x_max: Tensor | None
    input_range_residual: Tensor | None

    _process_group = _Ranks("world")
    _knows_ranks = False  # whether the group was looked at, where nothing was said of it
    _forwards_seen = 0  # training forwards that the ranges learned from, as the host counts them
    _counter_version = 0  # of the counters, when they were last changed from here

    @property
    def process_group(self) -> Any:
        """Ranks that share the statistics of the input range's start-up: ``"world"`` (the default) is every rank once
        ``torch.distributed`` is initialised, None is this rank alone, or a process group.

        Set it (:func:`triton_analog.distributed.set_parallel` does for a model) where not every rank runs the layer in
        every step (pipelines, experts): the ranks of the group wait for each other. Copies of the layer share the group; a
        pickle returns to ``"world"``.

        Raises:
            ValueError: set to something else.
        """
        return self._process_group.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        named = group is None or (isinstance(group, str) and group == "world")
        if not named and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise ValueError(
                f"process_group: got {group!r}; allowed are 'world' (every rank), None (this rank alone), and a process "
                "group that this rank is in, such as torch.distributed.new_group(ranks)"
            )
        self._process_group = _Ranks(group)

    def _statistics_group(self) -> Any:
        """The ranks to share statistics with, or None."""
        if not isinstance(self.process_group, str):
            return self.process_group
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return None
        if not (self._knows_ranks or "_process_group" in vars(self) or torch.compiler.is_compiling()):
            refuse_unsaid_group(self)
            vars(self)["_knows_ranks"] = True
        return dist.group.WORLD

    def _range_starts_up(self) -> bool:
        """Whether this forward belongs to the start-up of a stored range."""
        range_ = self.input_range if self.training else None
        if range_ is None:
            return False
        wanted = self.rpu_config.pre_post.input_range.init_from_data
        if wanted <= 0 or is_paused():
            return False
        if torch.compiler.is_compiling():
            return True
        if self._forwards_seen < wanted:
            return not is_trial()
        return _is_stand_in(range_) and not is_transforming()

    def _learn_range(self, x: Tensor) -> None:
        """Let the range learn from ``x``, in place; not in a forward recomputed in the backward, whose batch was counted."""
        compiling = torch.compiler.is_compiling()
        if not compiling and recomputing():
            return
        if not compiling:
            refuse_flat(self)
        if not compiling and is_transforming():
            self._refuse_transforms()
        assert self.input_range is not None
        assert self.input_range_update_idx is not None
        range_, group = self.rpu_config.pre_post.input_range, self._statistics_group()
        if not compiling:
            self._mend_counter()
            if self.input_range_residual is not None and self.input_range_residual.device != self.input_range.device:
                self._reset_residual()  # moved by something that does not know it
        rows = self.tile_rows(x.detach())
        apart = self._range_to_learn()
        update_input_range(
            rows,
            self.input_range if apart is None else apart,
            self.input_range_update_idx,
            max_input_size=constant(self.rpu_config.mapping.max_input_size),
            groups=self.groups,
            init_from_data=constant(range_.init_from_data),
            init_std_alpha=constant(range_.init_std_alpha),
            fast_mode=range_.fast_mode,
            x_min=self.x_min,
            x_max=self.x_max,
            act_range_momentum=constant(range_.act_range_momentum),
            residual=self.input_range_residual if apart is None else None,
            process_group=group,
        )
        if apart is not None:
            self._shift_to(apart)
        host_counts = not (compiling or _is_stand_in(self.input_range))
        if host_counts:
            self._counter_version = version_of(self.input_range_update_idx)
            if rows.numel() > 0 or group is not None:
                self._forwards_seen += 1
        if not host_counts or self._forwards_seen == range_.init_from_data:
            self._mark_the_end()

    @property
    def _trace(self) -> Tensor | None:
        """A buffer that the mode of the start-up does not use: above 0 for slices whose start-up is over."""
        return self.input_range_residual if self.rpu_config.pre_post.input_range.fast_mode else self.x_max

    @torch.no_grad()
    def _mark_the_end(self) -> None:
        """Leave a trace, which averaging does not remove, of the slices whose start-up is over."""
        counter, trace = self.input_range_update_idx, self._trace
        if counter is not None and trace is not None and trace.device == counter.device:
            trace.masked_fill_(counter >= constant(self.rpu_config.pre_post.input_range.init_from_data), 1.0)

    @torch.no_grad()
    def _mend_counter(self) -> None:
        """Set the counters of an average to the end where the trace says so, if something else has changed them."""
        counter, trace = self.input_range_update_idx, self._trace
        if counter is None or trace is None or version_of(counter) == self._counter_version or counter.is_meta:
            return
        over = self.rpu_config.pre_post.input_range.init_from_data
        counter.masked_fill_((trace > LEAST_TRACE) & (counter < over), over)
        self._counter_version = version_of(counter)

    def train(self, mode: bool = True) -> Self:
        """As torch's. (A compiled forward cannot mend an average.)"""
        if mode and not self.training:
            self._counter_version = -1  # what averages numbers but no counters leaves those as they were
            self._mend_counter()
        return super().train(mode)

    def _refuse_transforms(self) -> None:
        wanted = self.rpu_config.pre_post.input_range.init_from_data
        raise RuntimeError(
            f"pre_post.input_range.init_from_data: this {type(self).__name__} still learns its input range from data "
            f"({self._forwards_seen} of {wanted} training batches seen), which changes buffers in place: transforms of "
            "torch.func (vmap, grad) cannot follow that. Run those batches without transforms first, or "
            "calibrate_input_ranges, or set init_from_data = 0, or call model.eval()"
        )

    def _restart_range(self) -> None:
        """The range at its initial value, with the start-up still to come."""
        self._forwards_seen = 0
        if self.input_range is not None:
            self.input_range.fill_(self.rpu_config.pre_post.input_range.init_value)
            for buffer in (self.input_range_update_idx, self.x_min, self.x_max, self.input_range_residual):
                assert buffer is not None
                buffer.zero_()
            self.drop_shift()

    def tile_rows(self, x: Tensor) -> Tensor:
        """What the tiles multiply for an input ``x [..., K]`` of the product: rows ``[M, K]``.

        With ``G`` groups of tiles, the rows are ``[M, G * K]``. A layer whose product takes other inputs overrides this.
        """
        return x.reshape(-1, x.shape[-1])

    @torch.no_grad()
    def set_input_range(self, values: Tensor) -> None:
        """Copy ``values [S]`` into the stored ranges, in place, and end their start-up.

        Raises:
            TypeError: ``values`` is no tensor.
            ValueError: the layer stores no ranges, or another number of them; or one is infinite or no number.
        """
        if self.input_range is None or self.input_range_update_idx is None:
            raise ValueError(
                "input_range: this layer stores none; hand a config with pre_post.input_range.enable = True and dynamic = False "
                "to layer.reconfigure first"
            )
        if not isinstance(values, Tensor):
            raise TypeError(f"values: got {type(values).__name__}; a torch.Tensor is needed, one number for each slice")
        if values.shape != self.input_range.shape:
            raise ValueError(f"values: got shape {tuple(values.shape)}; {tuple(self.input_range.shape)} is needed")
        if not values.is_meta and not bool(values.isfinite().all()):
            raise ValueError(
                f"values: got {values.tolist()}; finite numbers are needed (forwards use their magnitudes)"
            )
        self.input_range.copy_(values)
        self._forwards_seen = max(self.rpu_config.pre_post.input_range.init_from_data, 0)
        self.input_range_update_idx.fill_(self._forwards_seen)
        self._counter_version = version_of(self.input_range_update_idx)
        self._reset_residual()
        self._mark_the_end()

    def _convert_counter(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Make the counter of AIHWKIT-Lightning's files one of ours; -inf there is a calibrated range, not to start up."""
        counter = state_dict.get(prefix + "input_range_update_idx")
        if counter is not None and counter.is_floating_point():
            over = self.rpu_config.pre_post.input_range.init_from_data
            # Rounded, as averages may be a little below a whole number.
            state_dict[prefix + "input_range_update_idx"] = (
                torch.where(counter.isfinite(), counter, over).round().long()
            )

    def _continue_loaded_range(self) -> None:
        """Count on from the counter that was loaded: the one time that a device's counter is read."""
        counter = self.input_range_update_idx
        self._counter_version = -1
        if type(counter) is Tensor and type(self.x_max) is Tensor:
            self._mend_counter()
        # Counting too little is harmless (the device knows better), so what has no number to read may be 0.
        readable = type(counter) is Tensor and not counter.is_meta
        self._forwards_seen = int(counter.min()) if counter is not None and readable else 0

    @torch.no_grad()
    def _reset_residual(self) -> None:
        """No rounding is left from before; anew where loading gave the range another device or dtype (``assign=True``)."""
        range_, residual = self.input_range, self.input_range_residual
        if range_ is None or residual is None:
            return
        self.drop_shift()
        if (residual.device, residual.dtype) == (range_.device, range_.dtype):
            residual.zero_()
        else:
            self.input_range_residual = torch.zeros(self.ranges_here(), dtype=range_.dtype, device=range_.device)
        if self.rpu_config.pre_post.input_range.fast_mode and not range_.is_meta:
            self._mark_the_end()
