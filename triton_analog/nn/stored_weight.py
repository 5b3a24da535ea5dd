"""The weight that a layer stores: setting, clipping, quantizing and resizing it."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

import triton_analog.ops as ops
import triton_analog.reference as reference
from triton_analog.config import TorchInferenceRPUConfig, WeightClipType
from triton_analog.functional import modified_weight
from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.before_step import STEPS
from triton_analog.nn.outside import follow_shape
from triton_analog.nn.parts import (
    Slot,
    gathered,
    has_master,
    is_dtensor,
    is_managed,
    is_partitioned,
    is_stepped_elsewhere,
    read_master,
    refuse_flat,
    whole,
    whole_of,
    write_master,
)
from triton_analog.nn.parts_clip import PartsClip, clip_parts
from triton_analog.nn.programmed import refuse_chips
from triton_analog.nn.settings import GAUSSIAN_CLIP, QUANTIZATION
from triton_analog.nn.sharding import is_gathered
from triton_analog.reference import num_slices, split_sizes

STEPS_WITHOUT_CLIP = 100
"""So many steps of optimizers, without the clip that the config of a layer asks for, are worth a warning."""


class StoredWeight(AnalogLayerBase):
    """The part of a layer that changes its stored weight, in place, and what belongs to that."""

    weight: Tensor
    bias: Any
    learnable_weight_clip: nn.Parameter | None
    rpu_config: TorchInferenceRPUConfig
    groups: int = 1
    weight_index: int | None = None
    """Which of the weights that are stacked in one parameter is this layer's; None: it has a parameter of its own."""
    CHANNEL_DIM: ClassVar[int] = 0
    """The dimension of ``weight`` that counts outputs."""
    tile_shape: tuple[int, ...]
    _last_seen = (0, 0)  # version of the weight, and steps taken
    _steps_without_clip = 0

    # ---- On tiles -----------------------------------------------------------------------------------------------------

    @property
    def matrix(self) -> Tensor:
        """The weight as the tiles see it: ``[N, K]``."""
        return self.weight.flatten(1)

    @property
    def weight_source(self) -> nn.Parameter | None:
        """The parameter that holds the weight; None where a hook or parametrization computes the weight."""
        return self._parameters.get("weight")

    def weight_part(self, source: Tensor) -> Tensor:
        """The weight of this layer in ``source``, a tensor of the shape of :attr:`weight_source`: a view."""
        return source if self.weight_index is None else source[self.weight_index]

    @property
    def slices(self) -> int:
        """Number of slices ``S`` of the ``K`` inputs (of one group)."""
        return num_slices(self.tile_shape[1], self.rpu_config.mapping.max_input_size)

    def get_split_sizes(self) -> list[int]:
        """Width of every slice."""
        return split_sizes(self.tile_shape[1], self.rpu_config.mapping.max_input_size)

    @property
    def in_sizes(self) -> list[int]:
        """Another name for :meth:`get_split_sizes`."""
        return self.get_split_sizes()

    # ---- Changes ------------------------------------------------------------------------------------------------------

    def parameter_slots(self) -> list[Slot]:
        """Where the parameters are that belong to this layer."""
        return [(self, name) for name in self._parameters]

    def whole(self, *names: str, write: bool = False, of_first: bool = False) -> AbstractContextManager[None]:
        """While it lasts, the parameters of these ``names`` are whole tensors, whatever shards them (``parts.whole``)."""
        if write and "weight" in names:
            refuse_chips(self, "a change of the weight")
        return whole([slot for slot in self.parameter_slots() if slot[1] in names], write, of_first)

    @property
    def weight_name(self) -> str:
        """That of :attr:`weight_source`."""
        return "weight"

    @property
    def bias_name(self) -> str:
        """That of the parameter that holds the bias."""
        return "bias"

    @torch.no_grad()
    def reset_weight_clip(self) -> None:
        """Set a learned clip to the largest weight of each slice and channel, in place."""
        if self.learnable_weight_clip is None or self.learnable_weight_clip.is_meta:
            return
        with self.whole(self.weight_name, "learnable_weight_clip", write=True):
            self.learnable_weight_clip.copy_(ops.absmax(self.matrix, self.slices))

    def resized(self) -> Self:
        """Make the tiles follow ``weight``, which was replaced by one of another shape; returns this layer.

        A learned clip keeps its values for outputs that were there, and starts from the weight for others. Input ranges stay,
        unless there are other inputs: then they start anew. Both are new parameters where they change their shape, which an
        optimizer that exists does not know. Nothing happens to a layer whose weight has the shape of its tiles.

        Raises:
            ValueError: the bias, the groups or the kernel do not fit the weight. The layer is then unchanged.
        """
        stored_weight(self)
        follow_shape(self)
        return self

    def take_shape(self) -> None:
        """Set the sizes that the torch layer knows to those of ``weight``.

        Raises:
            ValueError: it cannot have such a weight.
        """
        raise NotImplementedError(f"{type(self).__name__} must define take_shape")

    @torch.no_grad()
    def set_weights(self, weight: Tensor) -> None:
        """Copy ``weight`` (of the shape of ``self.weight``) into the layer; a learned clip starts anew from it, in place.

        Raises:
            TypeError: ``weight`` is no tensor.
            ValueError: another shape, or the layer's weight is computed from other parameters.
        """
        with self.whole(self.weight_name, "learnable_weight_clip", write=True):
            own = stored_weight(self)
            _check_shape("weight", weight, own)
            own.copy_(whole_of(weight))
            self.reset_weight_clip()

    @torch.no_grad()
    def set_weights_and_biases(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """:meth:`set_weights`, and copy ``bias [N]`` if one is given.

        Raises:
            TypeError: ``weight`` or ``bias`` is no tensor.
            ValueError: another shape, or a bias for a layer without one.
        """
        if bias is not None and self.bias is None:
            raise ValueError("bias: given, but this layer was built with bias=False; pass None or build it with a bias")
        with self.whole(self.weight_name, self.bias_name, "learnable_weight_clip", write=True):
            if bias is not None:
                _check_shape("bias", bias, self.bias)
            self.set_weights(weight)
            if bias is not None:
                self.bias.copy_(whole_of(bias))

    def get_weights_and_biases(self) -> tuple[Tensor, Tensor | None]:
        """Copies of weight and bias (None without one), detached."""
        with self.whole(self.weight_name, self.bias_name):
            return self.weight.detach().clone(), None if self.bias is None else self.bias.detach().clone()

    def gaussian_clip(self) -> tuple[float, int | None] | None:
        """The Gaussian clip of the config: ``clip.sigma``, and the dimension of ``weight`` each of whose indices has a deviation
        of its own (None: there is one for the whole weight). None for the other kinds of clip."""
        clip = self.rpu_config.clip
        if clip.type not in GAUSSIAN_CLIP:
            return None
        return clip.sigma, None if clip.type is WeightClipType.LAYER_GAUSSIAN else self.CHANNEL_DIM

    @torch.no_grad()
    def clip_weights(self, master: Tensor | None = None) -> None:
        """Clamp the stored weight to ``clip.sigma`` standard deviations of the matrix, or of each output's part of it.

        Only for the Gaussian kinds of clip; others do nothing here. The deviation is the unbiased one, in fp32. Nothing
        waits for the device.

        Args:
            master: A copy of the weight, of its shape, that an optimizer steps in its place. It is clamped, by its own
                deviation, and the weight takes its values.

        Raises:
            ValueError: the weight is computed from other parameters, so that there is nothing to clamp.
        """
        self.note_clip()
        clip = self.gaussian_clip()
        if clip is None:
            return
        sigma, channel_dim = clip
        if master is None and is_dtensor(self.weight_source):
            clip_parts([PartsClip(self.weight_source, self.weight_index, sigma, channel_dim)])
            return
        if master is None and (is_partitioned(self.weight_source) or has_master(self.weight_source)):
            self._clip_with_master(cast(Tensor, self.weight_source))
            return
        weight = stored_weight(self).detach()
        stepped = weight if master is None else master.detach()
        reference.clip([stepped], [sigma], channel_dim)  # a single weight is not worth a table for the kernel
        if master is not None:
            weight.copy_(stepped)

    def _clip_with_master(self, source: Tensor) -> None:
        """Clip a weight that DeepSpeed has cut or steps a copy of."""
        with gathered([source], change=True):
            master = read_master(source)
            copy = source.detach().clone() if master is None else master
            self.clip_weights(self.weight_part(copy))
            if master is not None:
                write_master(source, master)

    @torch.no_grad()
    def quantize_weights(self) -> None:
        """Replace the stored weight by its clipped and quantized value and switch both off in this layer's config.

        A learned clip is dropped with it, and with a clip per channel the bound of the ADC becomes one per slice.

        Raises:
            ValueError: the weight is computed from other parameters, so that there is nothing to replace, or a learned clip is
                one of those that a sharding library manages. Nothing is changed then.
        """
        self.check_quantizable()
        modifier = self.rpu_config.modifier
        with self.whole(self.weight_name, "learnable_weight_clip", write=True):
            weight = stored_weight(self)
            quantized, _ = modified_weight(
                self.matrix,
                max_input_size=self.rpu_config.mapping.max_input_size,
                weight_clip=self.learnable_weight_clip,
                weight_quantization=QUANTIZATION[modifier.quantization_type],
                weight_res=modifier.res,
                groups=self.groups,
            )
            weight.copy_(quantized.movedim(0, self.CHANNEL_DIM).view_as(weight))
        self.stop_quantizing()

    def check_quantizable(self) -> None:
        """:meth:`quantize_weights` will not be refused for what shards the layer.

        Raises:
            ValueError: it will.
        """
        if self.learnable_weight_clip is not None and is_managed(self):
            raise ValueError(
                "learnable_weight_clip: quantize_weights drops it, but what has sharded the model keeps it; quantize the model "
                "before it is sharded, or one that is made of a full state dict: restore_analog(digital_model, state_dict)"
            )

    def stop_quantizing(self) -> None:
        """Switch weight quantization and clip off in this layer's config."""
        raise NotImplementedError(f"{type(self).__name__} must define stop_quantizing")

    # ---- Clipping by somebody else ----------------------------------------------------------------------------------

    def _watch_for_the_clip(self) -> None:
        """Warn once if optimizers go on taking steps but the weight is never clipped: then another one than its own takes them.

        Forwards would be the wrong thing to count: a recurrent layer, or the accumulation of gradients, runs many of them per
        step. Every change in place raises the version of a tensor, a number on the host. That of one that is gathered for each
        forward says nothing: steps of optimizers are counted then. A compiled forward must not change Python state, so it does
        not watch.
        """
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return
        version, steps = self.weight._version, STEPS.taken
        if (version, steps) == self._last_seen:
            return
        (last_version, last_steps), self._last_seen = self._last_seen, (version, steps)
        is_apart = is_gathered(self, "weight") or is_stepped_elsewhere(self.weight_source)
        if steps == last_steps if is_apart else version == last_version:
            return
        self._steps_without_clip += 1
        if self._steps_without_clip == STEPS_WITHOUT_CLIP:
            warnings.warn(
                f"clip.type is {self.rpu_config.clip.type.name}, but optimizers have taken {STEPS_WITHOUT_CLIP} steps "
                "without clip_weights() being called. Train with triton_analog.optim.AnalogOptimizer, which clips after "
                "each step, or call model.clip_weights() after each step of your own optimizer.",
                stacklevel=2,
            )

    def note_clip(self) -> None:
        """The weight has just been clipped, by this layer, one that shares it or an optimizer."""
        # A module takes a microsecond to set an attribute, in every step and layer.
        vars(self)["_steps_without_clip"] = 0


def stored_weight(module: nn.Module) -> Tensor:
    """The weight of ``module`` as it is stored: its parameter, or its part of one.

    Raises:
        ValueError: it has none, as a hook or parametrization computes the weight: a change of that would be lost.
    """
    refuse_chips(module, "a change of the weight")
    refuse_flat(module)
    weight = module.weight_source if isinstance(module, StoredWeight) else module._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"weight: that of this {type(module).__name__} is not a parameter but computed from others "
            "(weight_norm, pruning, a parametrization); remove that first, or leave the layer digital"
        )
    return module.weight_part(weight) if isinstance(module, StoredWeight) else weight


def _check_shape(name: str, given: Any, own: Tensor) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: got {type(given).__name__}; a torch.Tensor is needed")
    if given.shape != own.shape:
        raise ValueError(f"{name}: got shape {tuple(given.shape)}; {tuple(own.shape)} is needed")
