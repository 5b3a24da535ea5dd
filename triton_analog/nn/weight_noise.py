"""Weight noise that lasts for an optimizer step, so that every micro-batch of it sees the same noisy weight."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from triton_analog.calls import Numbers, draw_seed, input_dtype
from triton_analog.config import TorchInferenceRPUConfig
from triton_analog.functional import modified_weight
from triton_analog.hints import warn_user
from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.before_step import STEPS
from triton_analog.nn.frozen_noise import redraw_seeds, watch
from triton_analog.nn.settings import keeps_noise
from triton_analog.nn.sharding import is_gathered
from triton_analog.nn.versions import version_of
from triton_analog.ops._transforms import is_transforming
from triton_analog.seeds import mix_rank_again, noise_rank

TILE_SETTINGS = ("max_input_size", "weight_quantization", "weight_res", "weight_noise", "weight_noise_std", "groups")
"""The numbers that make the tiles' weight."""
STEPS_WITH_ONE_NOISE = 10


class _Snapshot:
    """Tensors as they were: knows them again as long as they are the same objects, unchanged and in the same memory.

    Every change in place raises the version of a tensor, a number on the host.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self._seen = [(weakref.ref(tensor), version_of(tensor), tensor.data_ptr()) for tensor in tensors]

    def shows(self, tensors: list[Tensor]) -> bool:
        return len(tensors) == len(self._seen) and all(
            seen() is tensor and version == version_of(tensor) and address == tensor.data_ptr()
            for tensor, (seen, version, address) in zip(tensors, self._seen, strict=True)
        )


class _Kept:
    """What a layer remembers of its noise from forward to forward in eager mode. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self.drawn_for: _Snapshot | None = None  # the weight that has the noise; None: whatever the next forward finds
        self.redrawn = False
        self.drawn_at = STEPS.taken
        self._tile: tuple[Tensor, Tensor] | None = None
        self._made_of: _Snapshot | None = None
        self._made_with: Any = None

    def __deepcopy__(self, memo: Any) -> _Kept:
        return _Kept()

    def __reduce__(self) -> Any:
        return _Kept, ()

    def tile(
        self, tensors: list[Tensor], settings: Any, make: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """What ``make()`` gave for the same tensors and settings before; made anew if any of them is another."""
        fits = self._made_of is not None and self._made_of.shows(tensors) and self._made_with == settings
        if self._tile is None or not fits:
            self.drop_tile()  # before the next one is made: only one at a time
            self._tile = make()
            self._made_of, self._made_with = _Snapshot(tensors), settings
        return self._tile

    def drop_tile(self) -> None:
        self._tile = self._made_of = self._made_with = None


class WeightNoise(AnalogLayerBase):
    """The part of a layer that makes its weight noise last, where ``modifier.refresh`` is ``WeightNoiseRefresh.STEP``.

    ``weight_noise_seed`` (int64 ``[1]`` on the weight's device, or None for noise that is new in every forward) then decides
    the noise, which stays until :meth:`redraw_weight_noise` draws another seed. ``AnalogOptimizer`` calls that after each of
    its steps. In eager mode a training forward also does it when the weight has changed since (its version, which every
    change in place raises), so that any optimizer will do. Noise of a weight that is frozen, as below digital adapters, is drawn
    anew after each step of any torch optimizer. It takes ``AnalogOptimizer``, ``attach`` or the call, though,

    - for a trained weight in a compiled forward, in one that is captured in a CUDA graph and in one under a transform of
      ``torch.func``, which only read the seed (``randomness`` of ``vmap`` is for noise that is drawn in the forward),
    - for a frozen weight where the optimizer's step is itself compiled, captured or not one of ``torch.optim.Optimizer``,
    - for a weight that FSDP2 or DeepSpeed's ZeRO stage 3 gathers for each forward,
    - for a weight that is changed behind autograd's back (``weight.data.add_``, a captured step that is replayed): the layer
      would go on with the noise, and with the noisy weight, of before.

    In eager mode the noisy weight itself is kept too, from the first forward of a step to its end: that saves a pass over
    the weight in every further forward and in every backward and takes the memory of one more weight, in the dtype of the
    inputs. It is made anew when the weight, the learned clip, the seed, the dtype or a number of the config changes, dropped
    by ``eval()``, by loading and by moving, and never part of a copy, a pickle or a state dict. A weight that is computed
    from other parameters (``weight_norm``), or gathered, is not kept; its noise is.

    Copies of a layer have its seed. The seed is no buffer: ``DistributedDataParallel`` would hand the first rank's to all
    others, in the middle of a step too, but every rank draws its own noise.
    """

    rpu_config: TorchInferenceRPUConfig
    learnable_weight_clip: Tensor | None
    weight_noise_seed: Tensor | None = None
    _kept_noise: _Kept
    _was_gathered = False
    _warned_of_old_noise = False
    _seed_rank = 0
    """The rank whose noise the seed stands for."""

    @torch.no_grad()
    def redraw_weight_noise(self) -> None:
        """Draw the next noise of the weight, in place and without waiting for the device.

        Nothing happens in a layer whose noise is new in every forward (``modifier.refresh``).
        """
        if self.weight_noise_seed is not None:
            redraw_seeds(self.weight_noise_seed)
            self.note_redraw()

    def note_redraw(self) -> None:
        """``weight_noise_seed`` has just been drawn anew, by this layer or by an optimizer."""
        self._kept_noise.drop_tile()
        self._kept_noise.drawn_for = None
        self._kept_noise.redrawn = True
        self._kept_noise.drawn_at = STEPS.taken
        self._seed_rank = noise_rank()

    @torch.no_grad()
    def _own_the_seed(self) -> None:
        """A seed that was drawn before this process knew its rank, or in another process, becomes that of this rank."""
        if self.weight_noise_seed is not None:
            mix_rank_again(self.weight_noise_seed, self._seed_rank)
            self._seed_rank = noise_rank()

    def was_redrawn(self) -> bool:
        """Whether :meth:`note_redraw` was called since this was last asked."""
        redrawn, self._kept_noise.redrawn = self._kept_noise.redrawn, False
        return redrawn

    def has_frozen_weight(self) -> bool:
        """Whether nothing that the weight consists of is trained."""
        return not any(source.requires_grad for source in self._weight_sources())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and pickles come here."""
        super().__setstate__(state)
        if self.weight_noise_seed is not None:
            watch(self)

    def train(self, mode: bool = True) -> Self:
        """As torch's; leaving the training mode also frees the noisy weight."""
        if not mode:
            self._kept_noise.drop_tile()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Whatever moves the parameters moves the seed."""
        super()._apply(fn, recurse)
        self._kept_noise = _Kept()
        seed = self.weight_noise_seed
        if seed is not None:
            moved = fn(seed)
            self.weight_noise_seed = draw_seed(moved.device) if seed.is_meta and not moved.is_meta else moved
        return self

    def _fit_weight_noise(self, device: torch.device) -> None:
        """A seed on ``device`` if the config asks for noise that lasts; nothing is kept from before."""
        self._kept_noise = _Kept()
        if not keeps_noise(self.rpu_config):
            self.weight_noise_seed = None
            return
        watch(self)
        if self.weight_noise_seed is None or self.weight_noise_seed.device != device:
            self.weight_noise_seed, self._seed_rank = draw_seed(device), noise_rank()

    def _weight_sources(self) -> list[Tensor]:
        """The parameters that the weight consists of: itself, or what a hook or parametrization computes it from."""
        weight = self._parameters.get("weight")
        if weight is not None:
            return [weight]
        others = ("bias", "input_range", "learnable_weight_clip")
        return [parameter for name, parameter in self.named_parameters() if name not in others]

    def _weight_is_gathered(self) -> bool:
        """Whether the weight was ever seen to be one that a library gathers for each forward: identity, version and address say
        nothing then, and to keep its noisy tiles would be to keep what the library frees."""
        if not self._was_gathered:
            self._was_gathered = is_gathered(self, "weight")
        return self._was_gathered

    def _warn_of_old_noise(self) -> None:
        """Once in a process, where steps are taken but nobody draws the next noise."""
        if STEPS.taken - self._kept_noise.drawn_at >= STEPS_WITH_ONE_NOISE and not WeightNoise._warned_of_old_noise:
            WeightNoise._warned_of_old_noise = True
            warn_user(
                f"modifier.refresh is STEP, but optimizers have taken {STEPS_WITH_ONE_NOISE} steps with one weight noise: that "
                "of a weight that is gathered for each forward takes triton_analog.optim.attach(model, optimizer), an "
                "AnalogOptimizer, or layer.redraw_weight_noise() after each step"
            )

    def _noise_lasts(self, numbers: Numbers) -> bool:
        """Whether this forward uses noise that other forwards share."""
        return numbers.disturbs_weight and self.weight_noise_seed is not None

    def _lasting_noise(self, x: Tensor, matrix: Tensor, numbers: Numbers) -> tuple[Tensor | None, ...]:
        """The seed of the forward, that of its weight noise, and the weight of the tiles with its scale: the noise of this
        step, in one way or the other."""
        assert self.weight_noise_seed is not None
        only_read = torch.compiler.is_compiling() or is_transforming()
        if only_read or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None, self.weight_noise_seed, None, None
        # One seed for each forward, for its output noise and, if that is due, for the next noise of the weight. It is drawn in
        # any case: a recomputed forward (activation checkpointing) must draw as often as the first one did.
        seed = draw_seed(x.device)
        kept, sources = self._kept_noise, self._weight_sources()
        if self._weight_is_gathered():
            self._warn_of_old_noise()
            kept.drop_tile()
            return seed, self.weight_noise_seed, None, None
        kept.drawn_for = kept.drawn_for or _Snapshot(sources)
        if self.weight_noise_seed.device != x.device:  # moved by something that does not move modules
            self.weight_noise_seed = seed.clone()
        elif not kept.drawn_for.shows(sources):
            self.weight_noise_seed.copy_(seed)
            kept.drop_tile()
            kept.drawn_for = _Snapshot(sources)
        if self._parameters.get("weight") is None or torch.is_inference_mode_enabled():
            return seed, self.weight_noise_seed, None, None
        clip, settings = self.learnable_weight_clip, {name: getattr(numbers, name) for name in TILE_SETTINGS}
        settings["dtype"] = input_dtype(x)
        tile = kept.tile(
            [*sources, self.weight_noise_seed, *([] if clip is None else [clip])],
            settings,
            lambda: modified_weight(matrix, weight_clip=clip, seed=self.weight_noise_seed, **settings),
        )
        return seed, None, *tile
