"""A model on a simulated chip: its weights are what devices hold after programming, and after a time."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import blake2b
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

import triton_analog.ops as ops
from triton_analog.functional import modified_weight
from triton_analog.hints import did_you_mean
from triton_analog.inference.compensation import COMPENSATIONS, Compensation, readout, scale_slices, unit_of
from triton_analog.inference.noise_model import NoiseModel
from triton_analog.nn.base import named_analog_layers
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.parts import is_dtensor, is_sharded, refuse_parts_but_rows, rows_here, whole
from triton_analog.nn.programmed import ProgrammedTile
from triton_analog.nn.read_noise import largest_of_slices
from triton_analog.nn.versions import version_of
from triton_analog.nn.weight_noise import TILE_SETTINGS

ReadNoise = Literal["time", "forward"]
READ_NOISES = ("time", "forward")


def program(
    model: nn.Module,
    noise_model: NoiseModel,
    seed: int = 0,
    *,
    compensation: Compensation = "global",
    per_channel: bool = True,
    read_noise: ReadNoise = "time",
) -> Chip:
    """Program the analog layers of ``model`` into a chip, and give the model that computes on it.

    ``model`` is left as it is, and what is done to it afterwards (casts, moves, a training step of its biases) does not reach the
    chip, which is in evaluation mode and has its own tiles, buffers, biases and input ranges. Only matrices are in the memory of
    ``model``'s, and must not be changed in place while the chip is in use. Digital layers stay what they are, and layers that
    share a weight share its tile. The same seed is the same chip, on every backend.

    A model that ``fully_shard`` (FSDP2) has sharded cannot be copied: it is on the chip itself, until :meth:`Chip.release`. All
    ranks program the same chip together, weight after weight, each keeps its rows of every tile, and each forward
    of a layer gathers its tile, beside what ``fully_shard`` gathers.

    Args:
        model: Converted, calibrated or trained here.
        noise_model: Of its devices.
        seed: Of the chip, any whole number.
        compensation: Of the drift: ``"global"`` scales what a tile gives by one number, ``"per_column"`` by one for each of its
            outputs, both digitally and behind the ADC; ``"none"`` leaves it.
        per_channel: Whether the largest weight of each output of a tile takes a device's largest conductance, as AIHWKIT's
            channel-wise mapping does, or only the largest weight of the whole tile.
        read_noise: How often the noise model's read noise is drawn: ``"time"``, once for each time, from ``seed`` (AIHWKIT's);
            ``"forward"``, anew in each forward, from torch's default generator, which makes the weight anew each time. Noise of
            the reading beside it, as AIHWKIT's ``forward.w_noise``, is in the configs of the layers.

    Raises:
        TypeError: an argument is something else.
        ValueError: ``read_noise`` is ``"forward"`` and the noise model has none, or ``model`` is sharded; or ``model`` has no
            analog layers, is on a chip already, or is sharded by anything but ``fully_shard`` alone.
    """
    check_programmable(model, noise_model, seed, compensation, per_channel, read_noise)
    return Chip(model, noise_model, seed, compensation, per_channel, read_noise)


def check_programmable(
    model: nn.Module, noise_model: NoiseModel, seed: int, compensation: str, per_channel: bool, read_noise: str
) -> None:
    """:func:`program` will take its arguments.

    Raises:
        TypeError, ValueError: as there.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; a torch.nn.Module is needed")
    if not isinstance(noise_model, NoiseModel):
        raise TypeError(
            f"noise_model: got {noise_model!r}; an object is needed, such as triton_analog.inference.PCMLikeNoiseModel()"
        )
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise TypeError(f"seed: got {seed!r}; a whole number is needed")
    if compensation not in COMPENSATIONS:
        near = did_you_mean(str(compensation), COMPENSATIONS, "", lead="; ")
        raise ValueError(f"compensation: got {compensation!r}; allowed are {', '.join(map(repr, COMPENSATIONS))}{near}")
    if read_noise not in READ_NOISES:
        raise ValueError(f"read_noise: got {read_noise!r}; allowed are {', '.join(map(repr, READ_NOISES))}")
    if read_noise == "forward" and not noise_model.has_read_noise:
        raise ValueError(
            f"read_noise: got 'forward', but {type(noise_model).__name__} has no read noise; take 'time', and for noise of each "
            "forward set forward.w_noise and w_noise_type in the configs of the layers"
        )
    if not isinstance(per_channel, bool):
        raise TypeError(f"per_channel: got {per_channel!r}; True or False is needed")
    layers = dict(_layers(model))
    if not layers:
        raise ValueError(
            f"model: this {type(model).__name__} has no analog layers; convert it first, model = convert_to_analog(model, config)"
        )
    refuse_parts_but_rows(model, "program")
    for layer in layers.values():
        if layer.programmed is not None:
            raise ValueError(
                "model: it is on a chip already; program the model that the chip was made of, or, if that was sharded, call "
                "release() of the chip first"
            )
        layer._numbers()  # checks the config, before it is copied for each chip
    if not is_sharded(model):
        return
    for name, layer in layers.items():
        if layer.weight_source is None:
            raise ValueError(
                f"model: the weight of {name!r} is computed from others, which are sharded; remove weight_norm, pruning or "
                "parametrizations first"
            )
    if read_noise == "forward":
        raise ValueError(
            "read_noise: got 'forward', which makes the weight anew in each forward, but this model is sharded; take 'time'"
        )


class Chip(nn.Module):
    """What :func:`program` gives. It is called as its model is, and has the model's attributes and methods too."""

    model: nn.Module
    """The model on the chip. Tools that ask for its class take this."""

    def __init__(
        self,
        model: nn.Module,
        noise_model: NoiseModel,
        seed: int,
        compensation: Compensation,
        per_channel: bool,
        read_noise: ReadNoise,
    ) -> None:
        super().__init__()
        self._noise_model, self._seed = noise_model, int(seed)
        self._time: float | None = None
        self.model = model if is_sharded(model) else _copy(model).eval()
        self.training = False
        self._cells: list[_Cells] = []
        self._modes = [(module, module.training) for module in model.modules()] if self.model is model else []
        self._loads_nothing = self.model.register_load_state_dict_pre_hook(_refuse_to_load)
        known: dict[Any, list[_Cells]] = {}
        layers = dict(_layers(self.model))
        seeds = _seeds_of(self.seed, [layer.weight.device for layer in layers.values()])
        tiles: list[tuple[AnalogMatrixLayer, ProgrammedTile]] = []
        for (name, layer), own in zip(layers.items(), seeds, strict=True):
            source = layer.weight_source
            alike = known.setdefault(id(layer) if source is None else (id(source), layer.weight_index), [])
            config = layer.rpu_config.to_dict() if alike else None
            cells = next((one for one in alike if one.layer.rpu_config.to_dict() == config), None)
            if cells is None:
                cells = _Cells(name, layer, own, compensation, per_channel, read_noise)
                alike.append(cells)
                self._cells.append(cells)
            tiles.append((layer, cells.tile))
        self._set(None)
        self.model.eval()
        for layer, tile in tiles:
            layer.programmed = tile

    @property
    def noise_model(self) -> NoiseModel:
        """Of the chip's devices."""
        return self._noise_model

    @property
    def seed(self) -> int:
        """Of the chip."""
        return self._seed

    @property
    def time(self) -> float | None:
        """Seconds since the end of programming; None until :meth:`drift_to`, when nothing has been read yet."""
        return self._time

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives on the chip."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet, or no longer
                if vars(self).get("_cells") == []:
                    raise ValueError("chip: it was released; program the model again") from None
                raise
            return getattr(self.model, name)

    def train(self, mode: bool = True) -> Self:
        """A chip only evaluates.

        Raises:
            ValueError: ``mode`` is True.
        """
        if mode:
            raise ValueError(
                "mode: a chip is for evaluation; train the model that it was made of, and program that anew"
            )
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Called by ``to``, ``cuda``, ``half`` and their like.

        Raises:
            ValueError: always, as parameters are those of the model.
        """
        raise ValueError("a chip stays where it was made, in its dtype: move or cast the model, and program that")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as the memory of matrices is the model's; by :attr:`model` too.

        Raises:
            ValueError: always.
        """
        _refuse_to_load()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Refused, as parameters are those of the model.

        Raises:
            ValueError: always.
        """
        raise ValueError("requires_grad: a chip is for evaluation, and its parameters are those of the model")

    def drift_to(self, time: float) -> Self:
        """Let ``time`` seconds pass since the end of programming, and read. Times may come in any order, and one that
        was there before gives the same numbers again. Returns the chip.

        Raises:
            ValueError: ``time`` is before the end of programming, or not one that the noise model knows; or the weights were
                changed since they were programmed.
        """
        self.noise_model.check_time(time)
        _ = self.model  # there, unless it was released
        self._set(float(time))
        return self

    def release(self) -> None:
        """Give back the memory of the tiles; the chip is then no more. A sharded model, which was on the chip itself, is again
        what it was."""
        self._loads_nothing.remove()
        for _, layer in _layers(self.model):
            layer.programmed = None
        for module, mode in self._modes:
            module.training = mode
        self._cells, self._modes = [], []
        del self.model

    @torch.inference_mode(False)
    @torch.no_grad()
    def _set(self, time: float | None) -> None:
        for cells in self._cells:  # all of them before any is changed
            cells.check()
        arguments = self.noise_model.at(time)
        curves: dict[torch.device, Tensor] = {}
        host = arguments.pop("curves")
        for cells in self._cells:
            device = cells.wmax.device
            if device not in curves:
                curves[device] = host.to(device)
            cells.set(curves[device], arguments, first=time is None)
        self._time = time


def _refuse_to_load(*_: Any) -> None:
    raise ValueError("state_dict: a chip loads nothing; load into the model that it was made of, and program that")


class _Cells:
    """The cells of one weight: what they should hold, and the tile that shows what they do."""

    def __init__(
        self,
        name: str,
        layer: AnalogMatrixLayer,
        seed: Tensor,
        compensation: Compensation,
        per_channel: bool,
        read_noise: ReadNoise,
    ) -> None:
        self.name, self.layer, self.compensation, self.read_noise = name, layer, compensation, read_noise
        with whole(layer.parameter_slots(), write=False):
            wanted, self.wmax, self.scale = _wanted(layer)
        self._source = layer.weight_source
        self._version = 0 if self._source is None else version_of(self._source)
        self._wanted = None if is_dtensor(self._source) else wanted  # whole only while it is programmed
        if not per_channel:
            self.scale = largest_of_slices(self.scale, layer.groups)
        self.seed = seed.to(self.wmax.device)
        self.unit = unit_of(self.wmax)
        self.tile = ProgrammedTile()
        self.baseline: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have another parameter, which counts its changes anew."""
        return vars(self) | {"_version": self._version - (0 if self._source is None else version_of(self._source))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._source is not None:
            self._version += version_of(self._source)

    def check(self) -> None:
        """The weight is what it was when it was programmed.

        Raises:
            ValueError: it was changed.
        """
        if self._source is not None and version_of(self._source) != self._version:
            raise ValueError(
                f"time: the weight of {self.name!r} was changed since it was programmed; program the model again"
            )

    def set(self, curves: Tensor, arguments: dict[str, Any], first: bool) -> None:
        """Make the tile anew; ``first`` right after programming."""
        self.tile.drop()  # before the next one is made: only one at a time
        if self._wanted is not None:
            self._program(self._wanted, curves, arguments, first)
            return
        with whole(self.layer.parameter_slots(), write=False):
            self._program(_wanted(self.layer)[0], curves, arguments, first)

    def _program(self, wanted: Tensor, curves: Tensor, arguments: dict[str, Any], first: bool) -> None:
        make = partial(ops.program, wanted, self.scale, self.seed, curves, **arguments)
        tile, wmax, scale, gain = make(), self.wmax, self.scale, None
        if self.compensation != "none":
            now = readout(tile, self.unit, self.compensation)
            if first:
                self.baseline = now
            else:
                assert self.baseline is not None
                gain = self.baseline / now
                scale_slices(tile, gain)
                # The bound of the ADC too, so that its integers stay what they are.
                wmax, scale = wmax * gain, scale * gain
        reads_again = self.read_noise == "forward" and arguments.get("read", 0.0) > 0
        held = tile if self._wanted is not None else rows_here(tile, self._source)
        self.tile.fill(held, wmax, scale, partial(make, gain=gain) if reads_again else None)


def _wanted(layer: AnalogMatrixLayer) -> tuple[Tensor, Tensor, Tensor]:
    """What the tile of ``layer`` should hold, the scale of its converters, and its largest weights."""
    settings = {key: value for key, value in layer._numbers()._asdict().items() if key in TILE_SETTINGS}
    clip, matrix = layer.learnable_weight_clip, layer.matrix.detach()
    if clip is None and settings["weight_quantization"] == "none":
        wmax = ops.absmax(matrix, layer.slices)
        return matrix, wmax, wmax  # the parameter itself, not a copy: nothing changes it
    settings["weight_noise"] = "none"
    wanted, wmax = modified_weight(matrix, weight_clip=None if clip is None else clip.detach(), **settings)
    return wanted, wmax, ops.absmax(wanted, layer.slices)  # rounding may have lifted a weight above wmax


def _seeds_of(seed: int, devices: Sequence[torch.device]) -> list[Tensor]:
    """A seed for each layer on its device, int64 ``[1]``, by its place among the layers: names change when a model is wrapped
    or compiled. One transfer to each device, as each waits for it."""
    words = [blake2b(f"{seed} {number}".encode(), digest_size=8).digest() for number in range(len(devices))]
    numbers = torch.tensor([int.from_bytes(word, "little") >> 1 for word in words], dtype=torch.int64)
    there = {device: numbers.to(device) for device in set(devices)}
    return [there[device][number : number + 1] for number, device in enumerate(devices)]


def _copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that shares the memory of its matrices, and what analog layers have beside tensors."""
    memo: dict[int, Any] = {id(parameter): _own(parameter) for parameter in model.parameters()}
    for _, layer in _layers(model):
        memo.update((id(one), one) for one in (layer._checked, layer._of_modes) if one is not None)
        memo.update(
            (id(one), one.clone()) for one in layer._buffers.values() if one is not None
        )  # a deep copy takes longer
    for module in model.modules():  # a dozen in each, which are copied far more slowly than made
        memo.update(
            (id(hooks), OrderedDict()) for hooks in vars(module).values() if type(hooks) is OrderedDict and not hooks
        )
    return copy.deepcopy(model, memo)


def _own(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter that is not trained, and not cast or moved with ``parameter``: a matrix in its memory, what is smaller in its
    own. Other kinds of parameters, as of quantized models, know their own business and are shared."""
    if type(parameter) is not nn.Parameter:
        return parameter
    held = parameter.detach()
    own = nn.Parameter(held if parameter.ndim > 1 else held.clone(), requires_grad=False)
    vars(own).update(vars(parameter))
    return own


def _layers(model: nn.Module) -> Iterator[tuple[str, AnalogMatrixLayer]]:
    for name, layer in named_analog_layers(model):
        if isinstance(layer, AnalogMatrixLayer):
            yield name, layer
