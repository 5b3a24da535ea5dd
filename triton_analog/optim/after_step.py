"""What follows each step of an optimizer: the clip of the weights that it has moved, and the next noise.

The work of a step is a few launches for all layers together, and no more on the host than to see that nothing has changed
since it was planned. Nothing waits for the device, and a CUDA graph may capture it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from triton_analog.coverage.bypassed import warn_of_gradients
from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.frozen_noise import redraw_seeds
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.parts import gathered, has_master, is_dtensor, is_partitioned, numbers_in, refuse_flat
from triton_analog.nn.parts_clip import PartsClip, clip_parts
from triton_analog.nn.tied import layers_by_clip
from triton_analog.nn.weight_noise import WeightNoise
from triton_analog.ops.clip import clip_batches
from triton_analog.optim.layers import KnownLayers
from triton_analog.optim.masters import Masters, held

GATHERED = 2**28
"""So many numbers of weights that are in parts are whole at once: half a gigabyte in 16 bits."""


class AfterStep:
    """Clips the weights of ``layers`` and draws their next noise, each time it is called.

    Args:
        layers: All layers.
        optimizer: Only weights that it steps, as they are or by a master, are clipped; None: all that are not frozen. (A
            second clamp would be tighter than the first.)
        masters: Of weights that are clipped in a master, whose values they then take.
    """

    def __init__(self, layers: KnownLayers, optimizer: Optimizer | None = None, masters: Masters | None = None) -> None:
        self._layers, self._optimizer, self._masters = layers, optimizer, masters
        self._plan: _Plan | None = None
        self._captured: list[_Plan] = []  # graphs read their tables
        # Dynamo would make a graph of the plan instead of the work. (Any optimizer has imported it by now.)
        self._run: Callable[[Optimizer], None] = torch.compiler.disable(self._run_planned)

    def __call__(self, optimizer: Optimizer) -> None:
        """After a step of ``optimizer``."""
        self._run(optimizer)

    @torch.no_grad()
    def _run_planned(self, optimizer: Optimizer) -> None:
        layers = self._layers()
        state = self._state(layers)
        plan = self._plan
        if plan is None or plan.state != state:
            if self._layers.root is not None:
                warn_of_gradients(self._layers.root)
            if self._masters is None:
                _refuse_of_before(optimizer, layers)
            plan = _Plan(state, layers, self._stepped_layers(layers), self._masters)
            self._plan = None if plan.is_captured() else plan  # what is made in a capture has no tables
        elif plan.is_captured() and plan not in self._captured:
            self._captured.append(plan)
        plan.run()

    def _state(self, layers: list[AnalogLayerBase]) -> list[Hashable]:
        """All that a plan depends on."""
        masters = self._masters if self._masters is not None and self._masters.lasting else None
        state = [_state_of(layer, masters) for layer in layers]
        if self._optimizer is not None:
            state.append(tuple(map(id, held(self._optimizer))))
        return state

    def _stepped_layers(self, layers: list[AnalogLayerBase]) -> list[AnalogLayerBase]:
        if self._optimizer is None:
            return [layer for layer in layers if not _is_frozen(layer)]
        is_stepped = stepped_by(self._optimizer, self._masters)
        return [layer for layer in layers if any(map(is_stepped, clipped_with(layer)))]


def _refuse_of_before(optimizer: Optimizer, layers: list[AnalogLayerBase]) -> None:
    """An optimizer of before the model was sharded would go on stepping what no model has any more."""
    own = held(optimizer)
    is_sharded = any(map(is_dtensor, (weight for layer in layers for weight in clipped_with(layer))))
    if own and is_sharded and not any(is_dtensor(parameter) or parameter.grad is not None for parameter in own):
        raise ValueError(
            f"optimizer: the model was sharded after this {type(optimizer).__name__} was built, so that none of its {len(own)} "
            "parameters is the model's any more; build it, and attach, after fully_shard"
        )


def _is_frozen(layer: AnalogLayerBase) -> bool:
    parameters = clipped_with(layer)
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def stepped_by(optimizer: Optimizer, masters: Masters | None) -> Callable[[Tensor], bool]:
    """Which parameters ``optimizer`` steps, as they are or by a master."""
    own = {id(parameter) for parameter in held(optimizer)}
    return lambda parameter: (
        parameter.requires_grad and (id(parameter) in own or (masters is not None and masters.has(parameter)))
    )


def clipped_with(layer: AnalogLayerBase) -> list[Tensor]:
    """The weight of ``layer``; where it is no parameter, all that it may be made of."""
    weight = _weight_of(layer)
    return list(layer.parameters()) if weight is None else [weight]


def _weight_of(layer: AnalogLayerBase) -> nn.Parameter | None:
    """The parameter that holds the weight; None where none does."""
    return layer.weight_source if isinstance(layer, AnalogMatrixLayer) else None


def _state_of(layer: AnalogLayerBase, masters: Masters | None) -> Hashable:
    """Of one layer. It runs for every layer in every step."""
    weight: Any = _weight_of(layer)
    whole = type(weight) is nn.Parameter
    if not isinstance(layer, AnalogMatrixLayer) or not (whole or is_dtensor(weight)):
        return id(layer), *((id(parameter), parameter.requires_grad) for parameter in clipped_with(layer))
    clip = layer.rpu_config.clip
    place = _place(weight if whole else weight._local_tensor)
    state = (id(layer), clip.type, clip.sigma, id(layer.weight_noise_seed), id(weight), weight.requires_grad, *place)
    return state if masters is None or not masters.has(weight) else state + _place(masters.read(weight))


def _place(tensor: Tensor) -> tuple[Hashable, ...]:
    """A tensor's memory, which ``.data`` and ``.to`` change under the same object."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _is_usual(layer: AnalogLayerBase, name: str, base: type) -> bool:
    """Whether a method of ``layer`` is that of ``base``, so that its work can be done for many layers together."""
    return getattr(getattr(layer, name), "__func__", None) is getattr(base, name)


def _refuse_lost_clip(layer: AnalogLayerBase, weight: Any, masters: Masters | None) -> None:
    """Raise where the clip of ``layer`` would be nothing, or overwritten by what is stepped in place of the weight."""
    if not isinstance(layer, AnalogMatrixLayer) or layer.gaussian_clip() is None:
        return
    refuse_flat(layer)
    if masters is None and (has_master(weight) or is_partitioned(weight)):
        raise ValueError(
            f"clip.type: {layer.rpu_config.clip.type.name} asks for a clip after each step, but DeepSpeed steps copies of the "
            "weights that this optimizer does not know; call triton_analog.optim.attach(engine, optimizer) with what "
            "deepspeed.initialize gave"
        )


def _batches(layers: list[AnalogLayerBase]) -> Iterator[list[AnalogLayerBase]]:
    """``layers`` in their order, so many at once as may be gathered together."""
    batch: list[AnalogLayerBase] = []
    size = 0
    for layer in layers:
        weight = _weight_of(layer)
        own = 0 if weight is None else numbers_in(weight)
        if batch and size + own > GATHERED:
            yield batch
            batch, size = [], 0
        batch.append(layer)
        size += own
    if batch:
        yield batch


class _Plan:
    """The work after a step, for layers in one ``state``."""

    def __init__(
        self,
        state: list[Hashable],
        layers: list[AnalogLayerBase],
        stepped: list[AnalogLayerBase],
        masters: Masters | None,
    ) -> None:
        self.state, self._masters = state, masters
        # An id in the state is of nothing else as long as these are alive.
        self._alive = [(layer, *clipped_with(layer)) for layer in layers]
        self._devices: set[torch.device] = set()
        self._plan_clips(stepped)
        self._plan_noise(layers)

    def _plan_clips(self, layers: list[AnalogLayerBase]) -> None:
        self._clipped: list[AnalogMatrixLayer] = []
        self._clip_themselves: list[AnalogLayerBase] = []
        self._weights: list[Tensor] = []  # that take the values of
        self._copies: list[Tensor] = []  # their masters
        self._merged: list[PartsClip] = []  # of weights whose ranks have to agree on a deviation
        weights: list[Tensor] = []
        sigmas: list[float] = []
        channel_dims: list[int | None] = []
        for first, *others in layers_by_clip(layers):
            self._clipped += others
            weight: Any = _weight_of(first)
            masters = self._masters_of(weight)
            _refuse_lost_clip(first, weight, masters)
            usual = _is_usual(first, "clip_weights", AnalogMatrixLayer)
            if is_dtensor(weight) and usual and masters is None:
                self._clipped.append(first)
                clip = first.gaussian_clip()
                part = None if clip is None else PartsClip(weight, first.weight_index, *clip)
                if part is not None and part.axes:
                    self._merged.append(part)
                elif part is not None and part.local.numel() > 0:
                    weights.append(part.local)
                    sigmas.append(part.sigma)
                    channel_dims.append(part.channel_dim)
                continue
            if (
                type(weight) is not nn.Parameter
                or is_partitioned(weight)
                or not usual
                or (masters is not None and not masters.lasting)
            ):
                self._clip_themselves.append(first)
                continue
            self._clipped.append(first)
            clip = first.gaussian_clip()
            if clip is None:
                continue
            stepped = first.weight_part(weight.detach())
            if masters is not None:
                self._weights.append(stepped)
                stepped = first.weight_part(masters.read(weight).detach())
                self._copies.append(stepped)
            weights.append(stepped)
            sigmas.append(clip[0])
            channel_dims.append(clip[1])
        self._batches = clip_batches(weights, sigmas, channel_dims)
        self._devices |= {weight.device for weight in weights}

    def _plan_noise(self, layers: list[AnalogLayerBase]) -> None:
        self._redrawn: list[WeightNoise] = []
        self._redraw_themselves: list[AnalogLayerBase] = []
        seeds: dict[torch.device, list[Tensor]] = {}
        for layer in layers:
            if not isinstance(layer, WeightNoise) or not _is_usual(layer, "redraw_weight_noise", WeightNoise):
                self._redraw_themselves.append(layer)
            elif layer.weight_noise_seed is not None:
                self._redrawn.append(layer)
                seeds.setdefault(layer.weight_noise_seed.device, []).append(layer.weight_noise_seed)
        self._draws = []
        for device, own in seeds.items():
            drawn = torch.empty(len(own), dtype=torch.int64, device=device)
            self._draws.append((drawn, own, list(drawn.split(1))))
        self._devices |= seeds.keys()

    def is_captured(self) -> bool:
        """Whether the work goes into a graph now."""
        return any(device.type == "cuda" for device in self._devices) and torch.cuda.is_current_stream_capturing()

    def run(self) -> None:
        for batch in self._batches:
            batch.run()
        if self._copies:
            torch._foreach_copy_(self._weights, self._copies)
        clip_parts(self._merged)
        for layers in _batches(self._clip_themselves):
            with gathered([weight for weight in map(_weight_of, layers) if weight is not None], change=True):
                for layer in layers:
                    self._clip(layer)
        for clipped in self._clipped:
            clipped.note_clip()
        for drawn, seeds, parts in self._draws:
            redraw_seeds(drawn)
            torch._foreach_copy_(seeds, parts)
        for redrawn in self._redrawn:
            redrawn.note_redraw()
        for layer in self._redraw_themselves:
            layer.redraw_weight_noise()

    def _clip(self, layer: AnalogLayerBase) -> None:
        """For a layer with a way of its own, and for a weight with a master that can only be read as a copy."""
        weight = _weight_of(layer)
        masters = self._masters_of(weight)
        if weight is None or masters is None or layer.gaussian_clip() is None:  # type: ignore[operator]
            layer.clip_weights()
            return
        master = masters.read(weight)
        layer.clip_weights(layer.weight_part(master))  # type: ignore[call-arg, operator]
        masters.write(weight, master)

    def _masters_of(self, weight: Tensor | None) -> Masters | None:
        """What knows the master of ``weight``; None if it has none."""
        masters = self._masters
        return masters if masters is not None and weight is not None and masters.has(weight) else None
