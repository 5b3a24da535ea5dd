"""The state and the product of a layer with one matrix: what linear and convolutional layers are made of."""

from __future__ import annotations

import copy
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

import triton_analog.ops as ops
import triton_analog.reference as reference
from triton_analog.calls import Numbers, check_input, draw_seed, input_dtype, linear
from triton_analog.config import (
    ConfigError,
    TorchInferenceRPUConfig,
    WeightClipType,
    WeightQuantizationType,
    changes,
    effects,
)
from triton_analog.functional import modified_weight
from triton_analog.nn.config_slot import SLOT, BuffersWithConfig
from triton_analog.nn.one_forward import OneForward
from triton_analog.nn.outside import complaint_of_shape, follow_or_refuse, follow_shape
from triton_analog.nn.programmed import ProgrammedTile
from triton_analog.nn.range_startup import RangeStartup
from triton_analog.nn.settings import (
    GAUSSIAN_CLIP,
    QUANTIZATION,
    UNDECAYED,
    check_config,
    constant,
    decode,
    encode,
    fault,
    is_static,
    keeps_noise,
    learns_clip,
    settings,
)
from triton_analog.nn.weight_noise import TILE_SETTINGS, WeightNoise
from triton_analog.reference import Patches, num_slices, split_sizes

CHANGES_WITHOUT_CLIP = 100
"""So many changes of a weight, without the clip that its config asks for, are worth a warning."""


class AnalogMatrixLayer(RangeStartup, WeightNoise):
    """A layer around one analog product with ``weight``, seen as a matrix ``[N, K]``.

    A subclass also derives from the torch layer that it stands for, calls :meth:`init_analog` once that has created
    ``weight`` and ``bias``, and :meth:`analog_matmul` in its forward. With ``G`` groups, each with its own ``K`` inputs cut
    into ``S`` slices and its own ``N / G`` outputs, the layer may also hold

    - ``input_range [G * S]``: the stored input ranges, group by group (a parameter; its magnitude counts),
    - ``learnable_weight_clip [S, N]``: the learned clip (a parameter; its magnitude counts),
    - ``input_range_update_idx``, ``x_min``, ``x_max``, each ``[G * S]``: batches seen by the start-up of the ranges, and
      the running extreme values of its fast mode (buffers),
    - ``input_range_residual [G * S]``: what the dtype of the ranges rounded off in the start-up (a buffer that is not saved),
    - ``weight_noise_seed [1]``: the seed of weight noise that lasts for a step (neither buffer nor saved).

    ``tile_shape`` is ``(N, K)``, also while a sharding library keeps the weight in another shape. ``rpu_config`` is this
    layer's own copy. Numbers in it may be changed at any time (a compiled layer is then compiled anew);
    :meth:`reconfigure` also adds and removes the parameters that another config needs. The config travels in the state
    dict (``_extra_state``) and is restored from it; without that key the layer keeps its own.
    """

    ANALOG_NAMES: ClassVar[frozenset[str]] = frozenset(
        {
            *("input_range", "learnable_weight_clip"),
            *("input_range_update_idx", "x_min", "x_max", "input_range_residual"),
            *("rpu_config", "tile_shape", "_process_group", "_forwards_seen", "_counter_version", "_checked", "_told"),
            *("_of_modes", "_numbers_of", "was_called", "programmed"),
            *("_missed_config", SLOT),
            *("_weight_version", "_changes_without_clip", "weight_noise_seed", "_kept_noise"),
        }
    )
    """What an instance holds beyond its torch layer, and leaves behind when it becomes digital."""

    weight: Tensor
    bias: Any
    input_range: nn.Parameter | None
    learnable_weight_clip: nn.Parameter | None
    input_range_update_idx: Tensor | None
    x_min: Tensor | None
    x_max: Tensor | None
    input_range_residual: Tensor | None
    rpu_config: TorchInferenceRPUConfig
    tile_shape: tuple[int, ...]
    groups: int = 1
    programmed: ProgrammedTile | None = None
    """What the devices of a simulated chip hold in place of the weight."""
    weight_index: int | None = None
    """Which of the weights that are stacked in one parameter is this layer's; None: it has a parameter of its own."""
    CHANNEL_DIM: ClassVar[int] = 0
    """The dimension of ``weight`` that counts outputs."""
    _checked: TorchInferenceRPUConfig | None
    """A copy of the config when it was checked."""
    _told: effects.Told
    """What has been said of the configs of this model."""
    _of_modes: tuple[Numbers, ...]
    """The config as ``analog_linear`` takes it, in evaluation and in training."""
    _numbers_of: tuple[TorchInferenceRPUConfig, int] | None
    """The config that they are of, and how many changes of configs there had been."""

    was_called = False
    """Whether a forward of this layer has run, or was compiled. A layer that never is computes nothing."""

    _weight_version = 0
    _changes_without_clip = 0
    _missed_config = False

    # ---- Construction -------------------------------------------------------------------------------------------------

    def init_analog(self, rpu_config: TorchInferenceRPUConfig | None) -> None:
        """Take a copy of ``rpu_config`` and create the parameters and buffers that it needs.

        Raises:
            ConfigError: no config, something that is no config, or one that is not valid.
        """
        self.rpu_config, self._told = copy.deepcopy(check_config(rpu_config)), effects.told_of(rpu_config)
        effects.warn_of([self.rpu_config], self._told)
        self.tile_shape = tuple(self.matrix.shape)
        for name in ("input_range", "learnable_weight_clip"):
            self.register_parameter(name, None)
        for name in ("input_range_update_idx", "x_min", "x_max"):
            self.register_buffer(name, None)
        self.register_buffer("input_range_residual", None, persistent=False)
        self.__dict__["_buffers"] = BuffersWithConfig(self, self._buffers)
        self._fit_state()

    def take_parameters(self, module: nn.Module) -> None:
        """Continue with the parameters (the same objects), device and mode of the digital ``module``.

        Raises:
            ValueError: its weight is not a parameter but computed by a hook or parametrization.
        """
        self.weight, self.bias = _stored_weight(module), module._parameters["bias"]
        self.training = module.training
        self.input_range = self.learnable_weight_clip = None
        self._fit_state()

    def reset_parameters(self) -> None:
        """Initialise weight and bias as torch does, and the analog state anew."""
        super().reset_parameters()  # type: ignore[misc]
        if "input_range" in self._parameters:  # torch's constructor comes here before there is any analog state
            self.reset_analog_state()

    @torch.no_grad()
    def reset_analog_state(self) -> None:
        """Ranges at their initial value with the start-up still to come; a learned clip at the largest weights; new noise."""
        self._restart_range()
        self.reset_weight_clip()
        self.redraw_weight_noise()

    @torch.no_grad()
    def reset_weight_clip(self) -> None:
        """Set a learned clip to the largest weight of each slice and channel, in place."""
        if self.learnable_weight_clip is not None:
            self.learnable_weight_clip.copy_(ops.absmax(self.matrix, self.slices))

    def _fit_state(self) -> None:
        """Create the parameters and buffers that the config needs and that are missing; drop those it does not."""
        range_ = self.rpu_config.pre_post.input_range
        like: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        if not is_static(self.rpu_config):
            self.input_range = self.input_range_update_idx = self.x_min = self.x_max = self.input_range_residual = None
        elif self.input_range is None:
            self._forwards_seen = 0
            stored = self.groups * self.slices
            start = torch.full((stored,), range_.init_value, **like)
            self.input_range = nn.Parameter(start, requires_grad=range_.learn_input_range)
            # An integer: a counter in half precision stops growing at 256.
            self.input_range_update_idx = torch.zeros(stored, dtype=torch.int64, device=self.weight.device)
            self.x_min, self.x_max, self.input_range_residual = (torch.zeros(stored, **like) for _ in range(3))
        if not learns_clip(self.rpu_config):
            self.learnable_weight_clip = None
        elif self.learnable_weight_clip is None:
            self.learnable_weight_clip = nn.Parameter(torch.empty(self.slices, self.tile_shape[0], **like))
            self.reset_weight_clip()
        self._fit_weight_noise(self.weight.device)
        self._mark_undecayed()
        self._checked = self._numbers_of = None

    def _mark_undecayed(self) -> None:
        """Many trainers look for this attribute of a parameter before they let it decay."""
        for name in UNDECAYED:
            parameter = self._parameters.get(name)
            if parameter is not None:
                parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and pickles come here; a copy of a parameter has none of its attributes."""
        super().__setstate__(state)
        self.__dict__["_buffers"] = BuffersWithConfig(self, self._buffers)
        self._mark_undecayed()

    # ---- Configuration ------------------------------------------------------------------------------------------------

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

    @property
    def patches(self) -> Patches | None:
        """Which elements of its input a convolution multiplies; None: the product takes the input as it is."""
        return None

    def get_split_sizes(self) -> list[int]:
        """Width of every slice."""
        return split_sizes(self.tile_shape[1], self.rpu_config.mapping.max_input_size)

    @property
    def in_sizes(self) -> list[int]:
        """Another name for :meth:`get_split_sizes`."""
        return self.get_split_sizes()

    def reconfigure(self, rpu_config: TorchInferenceRPUConfig) -> None:
        """Change to a copy of ``rpu_config``, adding and removing parameters as it needs; the others keep their values.

        An optimizer that exists already does not know parameters added here.

        Raises:
            ConfigError: the config is not valid or cuts the inputs into other slices. The layer is then unchanged.
        """
        check_config(rpu_config)
        new, old = split_sizes(self.tile_shape[1], rpu_config.mapping.max_input_size), self.get_split_sizes()
        if new != old:
            raise ConfigError(
                f"mapping.max_input_size: got {rpu_config.mapping.max_input_size}, which cuts {sum(new)} inputs into slices "
                f"of {new}, but this layer has slices of {old}; build the layer with that max_input_size instead"
            )
        learned = self.rpu_config.pre_post.input_range.learn_input_range
        self.rpu_config = copy.deepcopy(rpu_config)
        effects.warn_of([self.rpu_config], self._told)
        if self.input_range is not None and rpu_config.pre_post.input_range.learn_input_range != learned:
            self.input_range.requires_grad_(not learned)
        self._fit_state()

    def _check_state(self) -> None:
        """The config, changed by hand since it was last seen, fits the parameters there are. Compilers trace this."""
        S, N, ranges = self.slices, self.tile_shape[0], self.groups * self.slices
        if not (
            _has_shape(self.input_range, is_static(self.rpu_config), ranges)
            and _has_shape(self.learnable_weight_clip, learns_clip(self.rpu_config), S, N)
            and _has_shape(self.weight_noise_seed, keeps_noise(self.rpu_config), 1)
        ):
            self._complain_of_state(S, N, ranges)

    def _complain_of_state(self, S: int, N: int, ranges: int) -> None:
        for path, parameter, shape in (
            ("pre_post.input_range", self.input_range, (ranges,) if is_static(self.rpu_config) else None),
            ("clip.type", self.learnable_weight_clip, (S, N) if learns_clip(self.rpu_config) else None),
            ("modifier.refresh", self.weight_noise_seed, (1,) if keeps_noise(self.rpu_config) else None),
        ):
            own = None if parameter is None else tuple(parameter.shape)
            if own != shape:
                raise ConfigError(
                    f"{path}: the config was changed and now needs {shape or 'no parameter'} here, but the layer was built "
                    f"with {own or 'none'}; hand a changed copy of the config to layer.reconfigure, or build a new layer"
                )

    def _numbers(self) -> Numbers:
        """The config as ``analog_linear`` takes it, checked again whenever it has changed."""
        if torch.compiler.is_compiling():  # only reads the config: what is read is guarded
            _note_call(self)
            wrong = fault(self.rpu_config)
            if wrong is not None:
                raise ConfigError(wrong)
            self._check_state()
            known = settings(self.rpu_config)
            values = constant(tuple(known.values()))
            return Numbers(
                **dict(zip(known, values, strict=True)),
                training=self.training,
                groups=self.groups,
                patches=self.patches,
            )
        seen, now = self._numbers_of, changes()
        if seen is None or seen[0] is not self.rpu_config or seen[1] != now:
            if self._missed_config:
                self._complain_of_missed_config()
            if self.rpu_config != self._checked:
                self.rpu_config.validate()
                self._check_state()
                # Else the config is one for a while, as while ranges are calibrated.
                if "analog_matmul" not in vars(self):
                    effects.warn_of([self.rpu_config], self._told)
                self._checked = copy.deepcopy(self.rpu_config)
                self.was_called = True
                known = settings(self.rpu_config)
                self._of_modes = tuple(Numbers(**known, training=mode, groups=self.groups) for mode in (False, True))
            self._numbers_of = self.rpu_config, now
        numbers, patches = self._of_modes[self.training], self.patches
        return numbers if patches is None else numbers._replace(patches=patches)

    # ---- Forward ------------------------------------------------------------------------------------------------------

    def analog_matmul(self, x: Tensor, one_forward: OneForward | None = None) -> Tensor:
        """``x [..., G * K]`` times the analog matrix, plus the bias: ``[..., N]``; with :attr:`patches` as
        :func:`triton_analog.functional.analog_linear` takes and gives them.

        In training, a stored input range first learns from ``x`` while its start-up lasts (see :class:`RangeStartup`), and
        weight noise may be that of other forwards (:class:`WeightNoise`). Calls with the same ``one_forward`` share their
        weight (:class:`OneForward`). A refused call changes nothing.

        Raises:
            TypeError, ValueError: the input does not fit, or the weight was replaced by one of another shape.
        """
        try:
            return self._matmul(x, one_forward)
        except (TypeError, ValueError) as error:
            complaint = complaint_of_shape(self)  # which explains it better
            if complaint is None:
                raise
            raise ValueError(complaint) from error

    def _matmul(self, x: Tensor, one_forward: OneForward | None) -> Tensor:
        numbers, matrix, bias = self._numbers(), self.matrix, self.bias
        input_range: Tensor | None = self.input_range
        seed = weight_seed = tile = wmax = None
        if self.programmed is not None:
            tile, wmax = self.programmed.as_(input_dtype(x), self.training)
            return linear(x, matrix, bias, input_range, None, seed, weight_seed, tile, wmax, numbers)
        starts_up, noise_lasts = self._range_starts_up(), self._noise_lasts(numbers)
        if starts_up or noise_lasts:
            # The call would refuse it only after the layer has changed.
            check_input(x, matrix, numbers.groups, numbers.patches)
        if starts_up:
            self._learn_range(x)
            assert input_range is not None
            # The next forward changes the range in place, and the backward of this one may still be to come.
            input_range = input_range.clone()
        elif one_forward is not None:
            input_range = one_forward.own("input_range", input_range)
        if one_forward is not None:
            bias = one_forward.own("bias", bias)
            if one_forward.tile is None:
                one_forward.tile = self._tile_of_all(one_forward, x, matrix, numbers)
            tile, wmax = one_forward.tile
            if numbers.training and numbers.out_noise > 0:
                seed = one_forward.seed(x.device)
        elif noise_lasts:
            seed, weight_seed, tile, wmax = self._lasting_noise(x, matrix, numbers)
        if self.training and self.rpu_config.clip.type in GAUSSIAN_CLIP:
            self._watch_for_the_clip()
        return linear(x, matrix, bias, input_range, self.learnable_weight_clip, seed, weight_seed, tile, wmax, numbers)

    def _tile_of_all(
        self, one_forward: OneForward, x: Tensor, matrix: Tensor, numbers: Numbers
    ) -> tuple[Tensor | None, Tensor | None]:
        """The weight of the tiles and its scale for calls that share them; None where the stored weight will do."""
        clip, dtype = self.learnable_weight_clip, input_dtype(x)
        settings = {name: getattr(numbers, name) for name in TILE_SETTINGS}
        seed = None
        if self._noise_lasts(numbers):
            _, seed, tile, wmax = self._lasting_noise(x, matrix, numbers)
            if tile is not None:
                return tile, wmax
        elif numbers.disturbs_weight:
            seed = one_forward.seed(x.device)
        else:
            settings["weight_noise"] = "none"
            is_modified = clip is not None or numbers.weight_quantization != "none" or dtype != matrix.dtype
            if not (is_modified or numbers.out_noise > 0 or numbers.out_bound > 0):
                return None, None
        return modified_weight(matrix, weight_clip=clip, seed=seed, dtype=dtype, **settings)

    def _watch_for_the_clip(self) -> None:
        """Warn once if the weight goes on changing but is never clipped: then some other optimizer takes the steps.

        Every change in place raises the version of a tensor, a number on the host. Forwards would be the wrong thing to
        count: a recurrent layer, or the accumulation of gradients, runs many of them per step. A compiled forward must not
        change Python state, so it does not watch.
        """
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return
        version = self.weight._version
        if version == self._weight_version:
            return
        self._weight_version = version
        self._changes_without_clip += 1
        if self._changes_without_clip == CHANGES_WITHOUT_CLIP:
            warnings.warn(
                f"clip.type is {self.rpu_config.clip.type.name}, but the weight has changed {CHANGES_WITHOUT_CLIP} times "
                "without clip_weights() being called. Train with triton_analog.optim.AnalogOptimizer, which clips after "
                "each step, or call model.clip_weights() after each step of your own optimizer.",
                stacklevel=2,
            )

    def note_clip(self) -> None:
        """The weight has just been clipped, by this layer, one that shares it or an optimizer."""
        # A module takes a microsecond to set an attribute, in every step and layer.
        vars(self)["_changes_without_clip"] = 0

    # ---- Weights ------------------------------------------------------------------------------------------------------

    def resized(self) -> Self:
        """Make the tiles follow ``weight``, which was replaced by one of another shape; returns this layer.

        A learned clip keeps its values for outputs that were there, and starts from the weight for others. Input ranges stay,
        unless there are other inputs: then they start anew. Both are new parameters where they change their shape, which an
        optimizer that exists does not know. Nothing happens to a layer whose weight has the shape of its tiles.

        Raises:
            ValueError: the bias, the groups or the kernel do not fit the weight. The layer is then unchanged.
        """
        _stored_weight(self)
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
        own = _stored_weight(self)
        _check_shape("weight", weight, own)
        own.copy_(weight)
        self.reset_weight_clip()

    @torch.no_grad()
    def set_weights_and_biases(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """:meth:`set_weights`, and copy ``bias [N]`` if one is given.

        Raises:
            TypeError: ``weight`` or ``bias`` is no tensor.
            ValueError: another shape, or a bias for a layer without one.
        """
        if bias is not None:
            if self.bias is None:
                raise ValueError(
                    "bias: given, but this layer was built with bias=False; pass None or build it with a bias"
                )
            _check_shape("bias", bias, self.bias)
        self.set_weights(weight)
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)

    def get_weights_and_biases(self) -> tuple[Tensor, Tensor | None]:
        """Copies of weight and bias (None without one), detached."""
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
        weight = _stored_weight(self).detach()
        stepped = weight if master is None else master.detach()
        reference.clip([stepped], [sigma], channel_dim)  # a single weight is not worth a table for the kernel
        if master is not None:
            weight.copy_(stepped)

    @torch.no_grad()
    def quantize_weights(self) -> None:
        """Replace the stored weight by its clipped and quantized value and switch both off in this layer's config.

        A learned clip is dropped with it, and with a clip per channel the bound of the ADC becomes one per slice.

        Raises:
            ValueError: the weight is computed from other parameters, so that there is nothing to replace.
        """
        weight, modifier = _stored_weight(self), self.rpu_config.modifier
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

    def stop_quantizing(self) -> None:
        """Switch weight quantization and clip off in this layer's config."""
        self.rpu_config.modifier.quantization_type = WeightQuantizationType.NONE
        self.rpu_config.clip.type = WeightClipType.NONE
        self._told.remarks.update(effects.remarks(self.rpu_config))  # they have done their work
        self._fit_state()

    # ---- State --------------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        follow_or_refuse(self, prefix.rstrip("."))  # a file with tiles of another shape than the weight would not load
        self._mend_counter()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def get_extra_state(self) -> Tensor:
        """The config as JSON in a ``uint8`` tensor, which every checkpoint format can hold."""
        return encode(self.rpu_config)

    @property
    def _extra_state(self) -> Tensor:
        """What a loader that sets tensors one by one finds under the name of the config (:class:`BuffersWithConfig`)."""
        return self.get_extra_state()

    def take_config(self, state: Tensor) -> None:
        """:meth:`set_extra_state`, from such a loader. It expects buffers to have memory, and has not all of them to load."""
        if state.is_meta:  # it has put the config itself elsewhere, onto a disk
            self._missed_config, self._numbers_of = True, None
        else:
            self.set_extra_state(state)
        device = torch.device("cpu") if state.is_meta else state.device
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_meta:
                self._buffers[name] = torch.zeros_like(buffer, device=device)
        if self.weight_noise_seed is not None and self.weight_noise_seed.is_meta:
            self.weight_noise_seed = draw_seed(device)

    def _complain_of_missed_config(self) -> None:
        self._missed_config = False
        warnings.warn(
            "the config of an analog layer in the checkpoint was offloaded to a disk, unread: the layer goes on with the config "
            "that it was converted with. Load with load_checkpoint_and_dispatch from triton_analog.integrations.accelerate, "
            "which reads all configs first",
            stacklevel=2,
        )

    def set_extra_state(self, state: Any) -> None:
        """Change to the config in ``state``, as :meth:`reconfigure` does.

        Raises:
            ConfigError: ``state`` holds no config, or one that does not fit. The layer is then unchanged.
        """
        self.reconfigure(decode(state, type(self.rpu_config)))
        self._missed_config = False

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # The config comes first: it decides which parameters there are to be filled.
        state = state_dict.get(prefix + "_extra_state")
        if (
            type(state).__name__ == "_EXTRA_STATE"
        ):  # with which torch.distributed.checkpoint says that the file has none
            del state_dict[prefix + "_extra_state"]
        elif state is not None:
            try:
                self.set_extra_state(state)
            except ConfigError as error:
                error_msgs.append(f"{prefix}_extra_state: {error}")
                return
        mismatch = self._other_slices(state_dict, prefix)
        if mismatch is not None:
            error_msgs.append(mismatch)
            return
        self._convert_counter(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "_extra_state" in missing_keys:  # a file of torch's layer, or of AIHWKIT-Lightning's
            missing_keys.remove(prefix + "_extra_state")
        if prefix + "input_range_update_idx" in state_dict:
            self._continue_loaded_range()
        self._reset_residual()
        source = self.weight_source
        if source is not None:
            self._fit_weight_noise(source.device)
        if prefix + "weight" in state_dict and prefix + "learnable_weight_clip" not in state_dict:
            self.reset_weight_clip()

    def _other_slices(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """What is wrong with a file that has other slices, as its tensors show; it need not hold a config that says so."""
        inputs = self.tile_shape[1]
        for name, own, groups in (
            ("input_range", self.input_range, self.groups),
            ("learnable_weight_clip", self.learnable_weight_clip, 1),
        ):
            saved = state_dict.get(prefix + name)
            if own is None or not isinstance(saved, Tensor) or saved.ndim != own.ndim or saved.shape[0] == len(own):
                continue
            slices = max(saved.shape[0] // groups, 1)
            widths = [inputs // slices + (s < inputs % slices) for s in range(slices)]
            return (
                f"{prefix}{name}: the file has shape {tuple(saved.shape)}, of slices of {widths}, but this layer "
                f"{tuple(own.shape)}, of slices of {self.get_split_sizes()} (mapping.max_input_size is "
                f"{self.rpu_config.mapping.max_input_size}); build it with the max_input_size that was saved instead"
            )
        return None

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), f"slices={self.get_split_sizes()}", *self.rpu_config.marked_changes()]
        return ", ".join(filter(None, parts))


@torch.compiler.assume_constant_result
def _note_call(layer: AnalogMatrixLayer) -> None:
    """Compilers run this while they trace; the compiled forward has nothing of it."""
    layer.was_called = True


def _has_shape(parameter: Tensor | None, wanted: bool, *shape: int) -> bool:
    """Whether it is there, in this shape, exactly if it is ``wanted``."""
    return parameter is None if not wanted else parameter is not None and parameter.shape == shape


def _stored_weight(module: nn.Module) -> Tensor:
    """The weight of ``module`` as it is stored: its parameter, or its part of one.

    Raises:
        ValueError: it has none, as a hook or parametrization computes the weight: a change of that would be lost.
    """
    weight = module.weight_source if isinstance(module, AnalogMatrixLayer) else module._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"weight: that of this {type(module).__name__} is not a parameter but computed from others "
            "(weight_norm, pruning, a parametrization); remove that first, or leave the layer digital"
        )
    return module.weight_part(weight) if isinstance(module, AnalogMatrixLayer) else weight


def _check_shape(name: str, given: Any, own: Tensor) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: got {type(given).__name__}; a torch.Tensor is needed")
    if given.shape != own.shape:
        raise ValueError(f"{name}: got shape {tuple(given.shape)}; {tuple(own.shape)} is needed")
