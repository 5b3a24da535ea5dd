"""A model on a simulated chip: its weights are what devices hold after programming, and after a time."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from hashlib import blake2b
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

import triton_analog.ops as ops
from triton_analog.functional import modified_weight
from triton_analog.hints import did_you_mean
from triton_analog.inference.compensation import COMPENSATIONS, Compensation, readout, scale_slices
from triton_analog.inference.noise_model import NoiseModel
from triton_analog.nn.base import named_analog_layers
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.parts import refuse_parts
from triton_analog.nn.programmed import ProgrammedTile
from triton_analog.nn.read_noise import largest_of_slices
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

    ``model`` is left as it is. The chip has its own buffers and tiles and is in evaluation mode; parameters are those of
    ``model`` itself, not copies, and must not change while the chip is in use. Digital layers stay what they are, and layers
    that share a weight share its tile. The same seed is the same chip, on every backend.

    Args:
        model: Converted, calibrated or trained here.
        noise_model: Of its devices.
        seed: Of the chip, any int.
        compensation: Of the drift: ``"global"`` scales what a tile gives by one number, ``"per_column"`` by one for each of its
            outputs, both digitally and behind the ADC; ``"none"`` leaves it.
        per_channel: Whether the largest weight of each output of a tile takes a device's largest conductance, as AIHWKIT's
            channel-wise mapping does, or only the largest weight of the whole tile.
        read_noise: How often the noise model's read noise is drawn: ``"time"``, once for each time, from ``seed`` (AIHWKIT's);
            ``"forward"``, anew in each forward, from torch's default generator, which makes the weight anew each time. Noise of
            the reading beside it, as AIHWKIT's ``forward.w_noise``, is in the configs of the layers.

    Raises:
        TypeError: an argument is something else.
        ValueError: ``read_noise`` is ``"forward"`` and the noise model has none; or ``model`` has no analog layers, is a chip
            already, or holds weights that a process has a part of only.
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
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: got {seed!r}; an int is needed")
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
    for layer in layers.values():
        if layer.programmed is not None:
            raise ValueError("model: it is on a chip already; program the model that the chip was made of")
        layer._numbers()  # checks the config, before it is copied for each chip
    refuse_parts(model, "program")


class Chip(nn.Module):
    """What :func:`program` gives. It is called as its model is, and has the model's attributes and methods too."""

    model: nn.Module
    """The model on the chip. Tools that ask for its class take this."""
    noise_model: NoiseModel
    seed: int
    time: float | None
    """Seconds since the end of programming; None until :meth:`drift_to`, when nothing has been read yet."""

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
        self.noise_model, self.seed, self.time = noise_model, seed, None
        self.model = _copy(model).eval()
        self.training = False
        self._cells: list[_Cells] = []
        known: dict[Any, _Cells] = {}
        for number, (name, layer) in enumerate(_layers(self.model)):
            source = layer.weight_source
            shared = id(layer) if source is None else (id(source), layer.weight_index)
            key = shared, str(layer.rpu_config.to_dict())
            if key not in known:
                known[key] = _Cells(name, number, layer, seed, compensation, per_channel, read_noise)
                self._cells.append(known[key])
            layer.programmed = known[key].tile
        self._set(None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives on the chip."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet
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
        """Refused, as parameters are those of the model.

        Raises:
            ValueError: always.
        """
        raise ValueError("state_dict: a chip loads nothing; load into the model that it was made of, and program that")

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
        self._set(float(time))
        return self

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
        self.time = time


class _Cells:
    """The cells of one weight: what they should hold, and the tile that shows what they do."""

    def __init__(
        self,
        name: str,
        number: int,
        layer: AnalogMatrixLayer,
        seed: int,
        compensation: Compensation,
        per_channel: bool,
        read_noise: ReadNoise,
    ) -> None:
        self.name, self.compensation, self.read_noise = name, compensation, read_noise
        self._source = layer.weight_source
        self._version = 0 if self._source is None else self._source._version
        settings = {key: value for key, value in layer._numbers()._asdict().items() if key in TILE_SETTINGS}
        clip = layer.learnable_weight_clip
        if clip is None and settings["weight_quantization"] == "none":
            self.wanted = layer.matrix.detach()  # the parameter itself, not a copy: nothing changes it
            self.wmax = self.scale = ops.absmax(self.wanted, layer.slices)
        else:
            self.wanted, self.wmax = modified_weight(
                layer.matrix.detach(),
                weight_clip=None if clip is None else clip.detach(),
                **(settings | {"weight_noise": "none"}),
            )
            self.scale = ops.absmax(self.wanted, layer.slices)  # rounding may have lifted a weight above wmax
        if not per_channel:
            self.scale = largest_of_slices(self.scale, layer.groups)
        # By its place among the layers: names change when a model is wrapped or compiled.
        words = blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
        self.seed = torch.tensor([int.from_bytes(words, "little") >> 1], dtype=torch.int64, device=self.wmax.device)
        self.tile = ProgrammedTile()
        self.baseline: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have another parameter, which counts its changes anew."""
        return vars(self) | {"_version": self._version - (0 if self._source is None else self._source._version)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._source is not None:
            self._version += self._source._version

    def check(self) -> None:
        """The weight is what it was when it was programmed.

        Raises:
            ValueError: it was changed.
        """
        if self._source is not None and self._source._version != self._version:
            raise ValueError(
                f"time: the weight of {self.name!r} was changed since it was programmed; program the model again"
            )

    def set(self, curves: Tensor, arguments: dict[str, Any], first: bool) -> None:
        """Make the tile anew; ``first`` right after programming."""
        self.tile.drop()  # before the next one is made: only one at a time
        make = partial(ops.program, self.wanted, self.scale, self.seed, curves, **arguments)
        tile, wmax, scale, gain = make(), self.wmax, self.scale, None
        if self.compensation != "none":
            now = readout(tile, wmax, self.compensation)
            if first:
                self.baseline = now
            else:
                assert self.baseline is not None
                gain = self.baseline / now
                scale_slices(tile, gain)
                wmax, scale = (
                    wmax * gain,
                    scale * gain,
                )  # also the bound of the ADC, so that its integers stay what they are
        reads_again = self.read_noise == "forward" and arguments.get("read", 0.0) > 0
        self.tile.fill(tile, wmax, scale, partial(make, gain=gain) if reads_again else None)


def _copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` that shares what evaluation does not change: parameters, and what analog layers have beside them."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for _, layer in _layers(model):
        kept = (*layer._buffers.values(), layer._checked, layer._of_modes)
        memo.update((id(one), one) for one in kept if one is not None)
    for module in model.modules():  # a dozen in each, which are copied far more slowly than made
        memo.update((id(hooks), OrderedDict()) for hooks in vars(module).values() if type(hooks) is OrderedDict and not hooks)
    return copy.deepcopy(model, memo)


def _layers(model: nn.Module) -> Iterator[tuple[str, AnalogMatrixLayer]]:
    for name, layer in named_analog_layers(model):
        if isinstance(layer, AnalogMatrixLayer):
            yield name, layer
