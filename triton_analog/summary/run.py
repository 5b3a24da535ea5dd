"""The summary of a model: its weights, its tiles, and its work for a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from triton_analog.convert import default_conversion_map, select
from triton_analog.coverage.weights import measure
from triton_analog.nn.base import named_analog_layers
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.samples import check_forward, run_batch
from triton_analog.summary.results import LayerSummary, Summary
from triton_analog.summary.work import Work, work_of
from triton_analog.surroundings.obstacles import Obstacle

USUAL_SIZE = 512
"""Inputs and outputs of a tile, where nothing says otherwise."""


def analog_summary(
    model: nn.Module,
    batch: Any = None,
    *,
    tile_size: tuple[int, int] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Summary:
    """What share of the weights of ``model`` is on tiles, which modules are digital and why, how many tiles there are, and what
    is computed for ``batch``.

    Weights are matrices, convolution kernels and stacks of them; embeddings, norms, biases and tables are none. Layers that
    :func:`~triton_analog.convert_to_analog` would convert, such as those that were excluded, are among the digital ones.
    ``print(analog_summary(model))`` shows it all, with ``batch`` or ``tile_size`` a table of the layers too.

    With physical tiles of ``R`` inputs and ``C`` outputs, a slice of ``K_s`` inputs of a group with ``N_g`` outputs takes
    ``ceil(K_s / R) * ceil(N_g / C)`` of them. Each of its input vectors is ``K_s * N_g`` multiply-adds,
    ``K_s * ceil(N_g / C)`` conversions of a DAC (every tile converts its inputs) and ``N_g * ceil(K_s / R)`` of an ADC,
    whatever converters the config simulates. Digital multiply-adds are those of matrix products, convolutions and attention.

    Args:
        model: Converted or not.
        batch: What the model is run on once, in evaluation mode and without a trace: a tensor, a mapping, or one of the other
            forms that :func:`~triton_analog.calibrate_input_ranges` takes for a batch; with ``forward`` anything. Counts in the
            table are per token for integers ``[B, T]`` and for ``inputs_embeds [B, T, H]``, else per sample, ``B`` of them.
        tile_size: ``(R, C)``, each ``>= 1``. None: ``max_input_size`` of each layer (512 where that is no limit) and 512.
        forward: ``forward(model, batch)`` runs the model on the batch, instead of ``model(batch)``.

    Raises:
        TypeError: ``model``, ``batch`` or ``forward`` is something else.
        ValueError: ``tile_size`` is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; a torch.nn.Module is needed")
    _check_tile_size(tile_size)
    check_forward(forward)
    layers, left = select(model, "", default_conversion_map(model), set())
    possible = Obstacle("it can be converted", "Convert it, model = convert_to_analog(model, config).")
    reasons = {name: possible for name, layer in layers if next(layer.parameters(False), None) is not None}
    coverage = measure(model, "", (), reasons | dict(left))
    if batch is None:
        return Summary(coverage, tuple(_analog(model, tile_size, None)), shows_tiles=tile_size is not None)

    def run(model: nn.Module) -> None:
        if forward is None:
            run_batch(model, batch, "batch")
        else:
            forward(model, batch)

    work = work_of(model, run)
    found = *_analog(model, tile_size, work), *_digital(model, work)
    return Summary(coverage, found, *_units(batch), shows_tiles=True)


def _check_tile_size(size: Any) -> None:
    is_pair = isinstance(size, tuple | list) and len(size) == 2
    if size is not None and not (is_pair and all(type(length) is int and length >= 1 for length in size)):
        raise ValueError(f"tile_size: got {size!r}; the inputs and outputs of a tile are needed, such as (512, 512)")


def _analog(model: nn.Module, tile_size: tuple[int, int] | None, work: Work | None) -> Iterator[LayerSummary]:
    owners: dict[Any, str] = {}
    for name, layer in named_analog_layers(model):
        if not isinstance(layer, AnalogMatrixLayer):
            continue
        name = name or type(layer).__name__
        widths, (N, K), G = layer.get_split_sizes(), layer.tile_shape, layer.groups
        limit = layer.rpu_config.mapping.max_input_size
        R, C = tile_size or (limit if limit > 0 else USUAL_SIZE, USUAL_SIZE)
        down, across = [-(-width // R) for width in widths], -(-(N // G) // C)
        source = layer.weight_source
        # Layers that cut one weight differently cannot have the same tiles.
        key = id(layer) if source is None else (id(source), layer.weight_index, layer.CHANNEL_DIM, tuple(widths), R)
        owner = owners.setdefault(key, name)
        vectors = None if work is None else work.vectors[id(layer)]
        yield LayerSummary(
            name=name,
            kind=type(layer).__name__,
            is_analog=True,
            inputs=K,
            outputs=N,
            slices=tuple(widths),
            groups=G,
            tile_size=(R, C),
            tiles=G * sum(down) * across,
            shares_tiles_of=None if owner == name else owner,
            vectors=vectors,
            macs=None if vectors is None else vectors * K * N,
            dac_conversions=None if vectors is None else vectors * G * K * across,
            adc_conversions=None if vectors is None else vectors * N * sum(down),
        )


def _digital(model: nn.Module, work: Work) -> Iterator[LayerSummary]:
    for name, module in model.named_modules():
        macs = work.macs[id(module)]
        if macs > 0:
            yield LayerSummary(name or "(root)", type(module).__name__, False, macs=macs)


def _units(batch: Any) -> tuple[str, int]:
    """What ``batch`` has several of, and how many."""
    if isinstance(batch, PackedSequence):
        return "sample", int(batch.batch_sizes[0])
    if isinstance(batch, tuple | list):
        parts = [part for part in batch if not isinstance(part, tuple | list | dict) or part]  # no empty args or kwargs
        return _units(parts[0]) if parts else ("batch", 1)
    if isinstance(batch, Mapping):
        embedded = batch.get("inputs_embeds")
        if isinstance(embedded, Tensor) and embedded.ndim == 3:
            return "token", embedded.shape[:2].numel()
        tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim > 0]
        named = batch.get("input_ids")
        batch = named if isinstance(named, Tensor) else next(iter(tensors), None)
    if not isinstance(batch, Tensor) or batch.ndim == 0 or batch.numel() == 0:
        return "batch", 1
    if batch.ndim == 2 and not batch.is_floating_point():
        return "token", batch.numel()
    return "sample", batch.shape[0]
