"""The state and the product of a layer with one matrix: what linear and convolutional layers are made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

import triton_analog.ops as ops
from triton_analog.calls import Numbers, check_input, input_dtype, linear
from triton_analog.config import (
    ConfigError,
    TorchInferenceRPUConfig,
    WeightClipType,
    WeightQuantizationType,
    changes,
    effects,
)
from triton_analog.functional import modified_weight
from triton_analog.nn.before_step import watch
from triton_analog.nn.compilers import run_while_tracing
from triton_analog.nn.config_slot import SLOT, BuffersWithConfig
from triton_analog.nn.one_forward import OneForward, refuse_shared_forward
from triton_analog.nn.outside import complaint_of_shape
from triton_analog.nn.parts import is_dtensor, is_managed, refuse_flat, whole_of
from triton_analog.nn.programmed import ProgrammedTile
from triton_analog.nn.range_shift import SHIFTS
from triton_analog.nn.read_noise import largest_of_slices, read, reads
from triton_analog.nn.saved_state import SavedState
from triton_analog.nn.settings import (
    GAUSSIAN_CLIP,
    UNDECAYED,
    check_config,
    constant,
    fault,
    is_static,
    keeps_noise,
    learns_clip,
    settings,
)
from triton_analog.nn.shown import of_layer
from triton_analog.nn.stored_weight import stored_weight
from triton_analog.nn.weight_noise import TILE_SETTINGS
from triton_analog.reference import Patches, split_sizes


class AnalogMatrixLayer(SavedState):
    """A layer around one analog product with ``weight``, seen as a matrix ``[N, K]``.

    A subclass also derives from the torch layer that it stands for, calls :meth:`init_analog` once that has created
    ``weight`` and ``bias``, and :meth:`analog_matmul` in its forward. With ``G`` groups, each with its own ``K`` inputs cut
    into ``S`` slices and its own ``N / G`` outputs, the layer may also hold

    - ``input_range [G * S]``: the stored input ranges, group by group (a parameter; its magnitude counts),
    - ``learnable_weight_clip [S, N]``: the learned clip (a parameter; its magnitude counts),
    - ``input_range_update_idx``, ``x_min``, ``x_max``, each ``[G * S]``: batches seen by the start-up of the ranges, and
      the running extreme values of its fast mode (buffers),
    - ``input_range_residual [G * S]``: what the dtype of the ranges rounded off in the start-up, and ``input_range_shift``: what
      waits for the optimizer's step (:class:`RangeShift`; buffers that are not saved),
    - ``weight_noise_seed [1]``: the seed of weight noise that lasts for a step (neither buffer nor saved).

    ``tile_shape`` is ``(N, K)``, also while a sharding library keeps the weight in another shape. ``rpu_config`` is this
    layer's own copy. Numbers in it may be changed at any time (a compiled layer is then compiled anew);
    :meth:`reconfigure` also adds and removes the parameters that another config needs. The config travels in the state
    dict (``_extra_state``) and is restored from it; without that key the layer keeps its own.
    """

    ANALOG_NAMES: ClassVar[frozenset[str]] = frozenset(
        {
            *("input_range", "learnable_weight_clip"),
            *("input_range_update_idx", "x_min", "x_max", "input_range_residual", *SHIFTS),
            *("range_tally", "has_range_master", "_is_shifted", "_shifts_in_graphs", "_range_part"),
            *("rpu_config", "tile_shape", "_process_group", "_forwards_seen", "_counter_version", "_checked", "_told"),
            *("_of_modes", "_numbers_of", "was_called", "programmed"),
            *("_missed_config", "_knows_ranks", SLOT),
            *("_last_seen", "_steps_without_clip"),
            *("weight_noise_seed", "_kept_noise", "_seed_rank", "_was_gathered", "split"),
        }
    )
    """What an instance holds beyond its torch layer, and leaves behind when it becomes digital."""

    input_range: nn.Parameter | None
    input_range_update_idx: Tensor | None
    x_min: Tensor | None
    x_max: Tensor | None
    input_range_residual: Tensor | None
    programmed: ProgrammedTile | None = None
    """What the devices of a simulated chip hold in place of the weight."""
    _checked: TorchInferenceRPUConfig | None
    """A copy of the config when it was checked."""
    _told: effects.Told
    """What has been said of the configs of this model."""
    _of_modes: tuple[Numbers, ...]
    """The config as ``analog_linear`` takes it, in evaluation and in training."""
    _numbers_of: tuple[TorchInferenceRPUConfig, int] | None
    """The config that they are of, and how many changes of configs there had been."""

    was_called = False
    """Whether a training forward of this layer has run, or was compiled. A layer that never is computes nothing."""

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
        for name in ("input_range_residual", *SHIFTS):
            self.register_buffer(name, None, persistent=False)
        self.__dict__["_buffers"] = BuffersWithConfig(self, self._buffers)
        self._fit_state()

    def take_parameters(self, module: nn.Module) -> None:
        """Continue with the parameters (the same objects), device and mode of the digital ``module``.

        Raises:
            ValueError: its weight is not a parameter but computed by a hook or parametrization.
        """
        self.weight, self.bias = stored_weight(module), module._parameters["bias"]
        self.training = module.training
        self.input_range = self.learnable_weight_clip = None
        self._fit_state()

    def reset_parameters(self) -> None:
        """Initialise weight and bias as torch does, and the analog state anew."""
        with self.whole("weight", "bias", write=True, of_first=True):
            super().reset_parameters()  # type: ignore[misc]
        if "input_range" in self._parameters:  # torch's constructor comes here before there is any analog state
            self.reset_analog_state()

    @torch.no_grad()
    def reset_analog_state(self) -> None:
        """Ranges at their initial value with the start-up still to come; a learned clip at the largest weights; new noise."""
        with self.whole("input_range", write=True):
            self._restart_range()
        self.reset_weight_clip()
        self.redraw_weight_noise()

    def set_input_range(self, values: Tensor) -> None:
        """As :class:`RangeStartup` does it, of parameters in parts too."""
        with self.whole("input_range", write=True):
            super().set_input_range(whole_of(values))

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
        self._fit_shift()
        if not learns_clip(self.rpu_config):
            self.learnable_weight_clip = None
        elif self.learnable_weight_clip is None:
            self.learnable_weight_clip = nn.Parameter(torch.empty(self.slices, self.tile_shape[0], **like))
            self.reset_weight_clip()
        self._fit_weight_noise(self.weight.device)
        self._mark_undecayed()
        self._checked = self._numbers_of = None

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """As torch's; ranges that get memory only now (``to_empty``) are at their start, as a file of the digital model has none
        to load."""
        without_memory = self.input_range is not None and self.input_range.is_meta  # the very object may get some
        super()._apply(fn, recurse)
        if without_memory and self.input_range is not None and not self.input_range.is_meta:
            with torch.no_grad():
                self._restart_range()
        return self

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
    def patches(self) -> Patches | None:
        """Which elements of its input a convolution multiplies; None: the product takes the input as it is."""
        return None

    def reconfigure(self, rpu_config: TorchInferenceRPUConfig) -> None:
        """Change to a copy of ``rpu_config``, adding and removing parameters as it needs; the others keep their values.

        An optimizer that exists already does not know parameters added here.

        Raises:
            ConfigError: the config is not valid, cuts the inputs into other slices, or needs other parameters where a sharding
                library manages them. The layer is then unchanged.
        """
        check_config(rpu_config)
        new, old = split_sizes(self.tile_shape[1], rpu_config.mapping.max_input_size), self.get_split_sizes()
        if new != old:
            raise ConfigError(
                f"mapping.max_input_size: got {rpu_config.mapping.max_input_size}, which cuts {sum(new)} inputs into slices "
                f"of {new}, but this layer has slices of {old}; build the layer with that max_input_size instead"
            )
        self._refuse_other_parameters(rpu_config)
        learned = self.rpu_config.pre_post.input_range.learn_input_range
        self.rpu_config = copy.deepcopy(rpu_config)
        effects.warn_of([self.rpu_config], self._told)
        if self.input_range is not None and rpu_config.pre_post.input_range.learn_input_range != learned:
            self.input_range.requires_grad_(not learned)
        self._fit_state()

    def _refuse_other_parameters(self, rpu_config: TorchInferenceRPUConfig, is_wrapped: bool = False) -> None:
        """What has sharded or wrapped a model knows its parameters: one more would not be synchronised, one less come back."""
        for name, path, wanted in (
            ("input_range", "pre_post.input_range", is_static(rpu_config)),
            ("learnable_weight_clip", "clip.type", learns_clip(rpu_config)),
        ):
            if wanted != (self._parameters[name] is not None) and (is_wrapped or is_managed(self)):
                raise ConfigError(
                    f"{path}: this config {'needs' if wanted else 'has no'} {name}, but the model was sharded or "
                    f"wrapped {'without' if wanted else 'with'} it; convert or reconfigure it first, and shard or wrap it then"
                )

    def stop_quantizing(self) -> None:
        """Switch weight quantization and clip off in this layer's config."""
        self.rpu_config.modifier.quantization_type = WeightQuantizationType.NONE
        self.rpu_config.clip.type = WeightClipType.NONE
        self._told.remarks.update(effects.remarks(self.rpu_config))  # they have done their work
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
            if self.training:
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
                effects.warn_of([self.rpu_config], self._told)
                self._checked = copy.deepcopy(self.rpu_config)
                known = settings(self.rpu_config)
                self._of_modes = tuple(Numbers(**known, training=mode, groups=self.groups) for mode in (False, True))
            self._numbers_of = self.rpu_config, now
        numbers, patches = self._of_modes[self.training], self.patches
        return numbers if patches is None else numbers._replace(patches=patches)

    # ---- Forward ------------------------------------------------------------------------------------------------------

    def analog_matmul(
        self, x: Tensor, one_forward: OneForward | None = None, product: Callable[..., Tensor] = linear
    ) -> Tensor:
        """``x [..., G * K]`` times the analog matrix, plus the bias: ``[..., N]``; with :attr:`patches` as
        :func:`triton_analog.functional.analog_linear` takes and gives them.

        In training, a stored input range first learns from ``x`` while its start-up lasts (see :class:`RangeStartup`), and
        weight noise may be that of other forwards (:class:`WeightNoise`). Calls with the same ``one_forward`` share their
        weight (:class:`OneForward`). A refused call changes nothing. ``product`` is called with what is to be multiplied, as
        :func:`triton_analog.calls.linear` takes it: who looks at that gives a function that calls it too.

        Raises:
            TypeError, ValueError: the input does not fit, or the weight was replaced by one of another shape.
        """
        try:
            return self._matmul(x, one_forward, product)
        except (TypeError, ValueError) as error:
            complaint = complaint_of_shape(self)  # which explains it better
            if complaint is None:
                raise
            raise ValueError(complaint) from error

    def _matmul(self, x: Tensor, one_forward: OneForward | None, product: Callable[..., Tensor]) -> Tensor:
        if self.split is not None:
            refuse_shared_forward(one_forward)
            return self.split.matmul(self, x, product)
        numbers, matrix, bias = self._numbers(), self.matrix, self.bias
        if numbers.training and not self.was_called:
            self._begin_training()
        input_range: Tensor | None = self.input_range
        seed = weight_seed = tile = wmax = None
        if self.programmed is not None:
            if one_forward is None:
                tile, wmax = self._read(x, matrix, numbers)
            else:
                if one_forward.tile is None:
                    one_forward.tile = self._read(x, matrix, numbers)
                tile, wmax = one_forward.tile
            return product(x, matrix, bias, input_range, None, seed, weight_seed, tile, wmax, numbers)
        starts_up, noise_lasts = self._range_starts_up(), self._noise_lasts(numbers)
        if starts_up or noise_lasts:
            # The call would refuse it only after the layer has changed.
            check_input(x, matrix, numbers.groups, numbers.patches)
        tally = self._tally_of(input_range) if numbers.training else None
        if starts_up:
            self._learn_range(x)
        elif one_forward is not None:
            input_range = one_forward.own("input_range", input_range)
        if input_range is not None and (self._is_shifted or self._shifts_in_graphs):
            input_range = self.range_in_use(input_range)
        elif starts_up:
            assert input_range is not None
            # The next forward changes the range in place, and the backward of this one may still be to come.
            input_range = input_range.clone()
        if one_forward is not None:
            tally = one_forward.own("tally", tally)
            bias = one_forward.own("bias", bias)
            if one_forward.tile is None:
                one_forward.tile = self._tile_of_all(one_forward, x, matrix, numbers)
            tile, wmax = one_forward.tile
            if numbers.draws_signals:
                seed = one_forward.seed(x.device)
        elif noise_lasts:
            seed, weight_seed, tile, wmax = self._lasting_noise(x, matrix, numbers)
        elif not numbers.training and reads(self.rpu_config.forward):
            tile, wmax = self._read(x, matrix, numbers)
        if self.training and self.rpu_config.clip.type in GAUSSIAN_CLIP:
            self._watch_for_the_clip()
        clip = self.learnable_weight_clip
        return product(x, matrix, bias, input_range, clip, seed, weight_seed, tile, wmax, numbers, tally)

    def matmul_without_range(
        self,
        numbers: Numbers,
        x: Tensor,
        one_forward: OneForward | None = None,
        product: Callable[..., Tensor] = linear,
    ) -> Tensor:
        """The product as ``numbers`` say, which ask for no input range: the stored one stays out of it."""
        if self.split is not None:
            refuse_shared_forward(one_forward)
            return self.split.matmul_without_range(self, numbers, x, product)
        matrix, tile, wmax = self.matrix, None, None
        if one_forward is not None:
            if one_forward.tile is None:
                one_forward.tile = self._tile_of_all(one_forward, x, matrix, numbers)
            tile, wmax = one_forward.tile
        return product(x, matrix, self.bias, None, self.learnable_weight_clip, None, None, tile, wmax, numbers)

    def _begin_training(self) -> None:
        """Before the first training forward: what can only be known then."""
        refuse_flat(self)
        self._refuse_foreign_split()
        self._refuse_unknown_master()
        watch(self)
        self._own_the_seed()
        vars(self)["was_called"] = True

    def _refuse_foreign_split(self) -> None:
        """Nothing that does not know of tiles has split this layer.

        Raises:
            ValueError: its weight is a DTensor while it runs, as below torch's own ``ColwiseParallel``.
        """
        if self.split is None and is_dtensor(self._parameters.get("weight")):
            raise ValueError(
                f"weight: that of this {type(self).__name__} is split over ranks by something that knows nothing of its tiles, "
                "ranges and noise; use AnalogColwise or AnalogRowwise of triton_analog.distributed in parallelize_module"
            )

    def _tile_of_all(
        self, one_forward: OneForward, x: Tensor, matrix: Tensor, numbers: Numbers
    ) -> tuple[Tensor | None, Tensor | None]:
        """The weight of the tiles and its scale for calls that share them; None where the stored weight will do."""
        if not numbers.training and reads(self.rpu_config.forward):
            return self._read(x, matrix, numbers)
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

    def _read(self, x: Tensor, matrix: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor]:
        """The weight of the tiles as one forward in evaluation reads it, and the scale of their converters."""
        clip, kind, io = self.learnable_weight_clip, input_dtype(x), self.rpu_config.forward
        if self.programmed is not None:
            tile, wmax, scale = self.programmed.as_(kind, self.training)
        else:
            if clip is None and numbers.weight_quantization == "none" and kind == matrix.dtype:
                tile = matrix.detach()
                wmax = ops.absmax(tile, self.slices)
            else:
                settings = {name: getattr(numbers, name) for name in TILE_SETTINGS} | {"weight_noise": "none"}
                tile, wmax = modified_weight(matrix, weight_clip=clip, dtype=kind, **settings)
            scale = wmax if numbers.out_bound_per_channel else largest_of_slices(wmax, self.groups)
        return (read(tile, scale, io) if reads(io) else tile), wmax

    def extra_repr(self) -> str:
        """Shape and slices; ``print(layer.rpu_config)`` says what is simulated, a printed model what its layers share."""
        parts = [super().extra_repr(), f"slices={self.get_split_sizes()}", of_layer(self.rpu_config)]
        return ", ".join(filter(None, parts))


@run_while_tracing
def _note_call(layer: AnalogMatrixLayer) -> None:
    """Compilers run this while they trace; the compiled forward has nothing of it."""
    layer._begin_training()


def _has_shape(parameter: Tensor | None, wanted: bool, *shape: int) -> bool:
    """Whether it is there, in this shape, exactly if it is ``wanted``."""
    return parameter is None if not wanted else parameter is not None and parameter.shape == shape
