"""Models of AIHWKIT's torch tiles as models of ours."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from triton_analog.aihwkit_bridge.export_model import aihwkit_cells
from triton_analog.aihwkit_bridge.import_config import import_config
from triton_analog.aihwkit_bridge.package import Notes, load_aihwkit, tile_grid
from triton_analog.config import effects
from triton_analog.convert import CONVERSION_MAP, carry_over, replace_modules, set_fast_paths
from triton_analog.nn import rnn_cells
from triton_analog.nn.containers import AnalogSequential, AnalogWrapper, retype
from triton_analog.nn.rnn import AnalogRNN
from triton_analog.reference import split_sizes

_SECTIONS = ("forward", "modifier", "clip", "mapping", "pre_post")
"""Of an AIHWKIT config: what is read of it."""


def import_from_aihwkit(model: nn.Module) -> Any:
    """A model of ours with the same outputs in evaluation as ``model``, of AIHWKIT's ``TorchInferenceRPUConfig`` tiles.

    The reverse of :func:`export_to_aihwkit`: linear layers, 2-D convolutions and ``AnalogRNN`` become ours, with weights,
    input ranges and configs. Weights are the present ones, so that those of a chip that was programmed or has drifted come
    over as they are, with the drift compensation. AIHWKIT's models of these are left behind. An ADC whose bound is scaled
    by something else than the largest weights gets a learned clip (``LEARNABLE_PER_CHANNEL``) of that scale. ``model`` itself
    stays as it is.

    Output noise acts in training only here, while AIHWKIT has it in evaluation too.

    Args:
        model: A model with AIHWKIT layers, or one such layer.

    Warns:
        UserWarning: settings that act otherwise in training, with the layers that have them.

    Raises:
        ConfigError: a setting that acts in evaluation and has no counterpart; the layer and the setting are named.
        ImportError: the package aihwkit is not installed.
        TypeError: ``model`` is no module, an AIHWKIT layer is none of the above or of other tiles, or the root of
            ``model`` has something of its own under a name that an :class:`AnalogWrapper` adds.
        ValueError: ``model`` has no AIHWKIT layers, or the tiles of one do not share their input ranges.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; a torch.nn.Module with AIHWKIT layers is needed")
    importer = _Importer()
    clone = copy.deepcopy(model)
    with torch.no_grad():
        importer.import_layers(clone)
    if not importer.made:
        raise ValueError(f"model: {type(model).__name__} has no AIHWKIT layers")
    root = replace_modules(clone, "", importer.replace, {})
    set_fast_paths(root)
    importer.notes.warn("import_from_aihwkit: evaluation is the same, but training differs")
    return AnalogWrapper(root) if importer.wrap_root else root


class _Importer:
    """One import: the layers made so far, and what there is to tell."""

    def __init__(self) -> None:
        self.aihwkit = load_aihwkit("import_from_aihwkit")
        self.notes = Notes()
        self.made: dict[int, nn.Module] = {}
        self.wrap_root = False

    def import_layers(self, model: nn.Module) -> None:
        """Make our module for every AIHWKIT one of ``model``; nothing is replaced yet."""
        theirs = self.aihwkit.nn
        self.wrap_root = isinstance(model, theirs.AnalogWrapper)
        inside: set[int] = set()
        for name, module in model.named_modules():
            if id(module) in inside or not isinstance(module, self.aihwkit.AnalogLayerBase):
                continue
            kind = type(module)
            if kind is theirs.AnalogRNN:
                self.made[id(module)] = self._rnn(name, module)
                inside.update(map(id, module.modules()))
            elif kind is theirs.AnalogLinear:
                self.made[id(module)] = self._linear(name, module)
            elif kind is theirs.AnalogConv2d:
                self.made[id(module)] = self._convolution(name, module)
            elif not isinstance(module, theirs.AnalogSequential | theirs.AnalogWrapper):
                raise TypeError(
                    f"{name or '(root)'}: got AIHWKIT's {kind.__name__}; imported are AnalogLinear, AnalogConv2d and AnalogRNN: "
                    "convert this one to digital"
                )

    def _linear(self, name: str, layer: Any) -> nn.Module:
        digital = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        return self._fill(name, layer, digital)

    def _convolution(self, name: str, layer: Any) -> nn.Module:
        digital = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            bias=False,
            device="meta",
        )
        return self._fill(name, layer, digital)

    def _rnn(self, name: str, rnn: Any) -> nn.Module:
        cells = aihwkit_cells(rnn, self.aihwkit)
        first, kind = cells[0], type(cells[0]).__name__
        if self.aihwkit.cells.get(kind) is not type(first):
            raise TypeError(
                f"{name or '(root)'}: got an AnalogRNN of {kind}; imported are {', '.join(self.aihwkit.cells)}: convert this one "
                "to digital"
            )
        dropout = rnn.rnn.dropout_layer
        paths = {id(module): path for path, module in rnn.named_modules(prefix=name)}
        made = [
            {
                product: self._linear(paths[id(linear)], linear)
                for product, linear in cell.named_children()
                if isinstance(linear, self.aihwkit.nn.AnalogLinear)
            }
            for cell in cells
        ]
        if not all(made):
            raise TypeError(f"{name or '(root)'}: got an AnalogRNN without tiles; it was built without a config")
        product: Any = next(iter(made[0].values()))
        effects.mute(product.rpu_config)
        ours = AnalogRNN(
            getattr(rnn_cells, kind),
            first.input_size,
            first.hidden_size,
            num_layers=rnn.num_layers,
            bias=product.bias is not None,
            bidir=len(cells) > rnn.num_layers,
            dropout=0.0 if dropout is None else dropout.p,
            device="meta",
            rpu_config=product.rpu_config,
        )
        for cell, products in zip(ours.cells.values(), made, strict=True):
            for product_name, linear in products.items():
                setattr(cell, product_name, linear)
        return ours.train(rnn.training)

    def _fill(self, name: str, layer: Any, digital: Any) -> nn.Module:
        """Our layer in place of ``digital``, torch's layer of the same shape, with what the tiles of ``layer`` hold."""
        grid = tile_grid(layer.analog_module)
        first = grid[0][0]
        for tile in (tile for row in grid for tile in row):
            config = tile.rpu_config
            if (
                type(tile) is not self.aihwkit.TorchInferenceTile
                or type(config) is not self.aihwkit.TorchInferenceRPUConfig
            ):
                raise TypeError(
                    f"{name or '(root)'}: got {type(tile).__name__} with a {type(config).__name__}; only the torch tiles of "
                    "TorchInferenceRPUConfig are simulated here: convert the AIHWKIT model with such a config first"
                )
            if any(getattr(config, part) != getattr(first.rpu_config, part) for part in _SECTIONS):
                raise ValueError(f"{name or '(root)'}: its tiles have different configs; give all of them the same")
        weight = torch.cat([torch.cat([tile.tile.weight * _scale(tile)[:, None] for tile in row]) for row in grid], 1)
        scales = torch.stack([torch.cat([_scale(tile) for tile in row]) for row in grid])
        sizes = [row[0].in_size for row in grid]
        wmax = torch.stack([part.abs().amax(1) for part in weight.split(sizes, 1)])
        imported = import_config(
            first.rpu_config, name, scales.abs(), wmax, sizes, lambda note: self.notes.add(name, note)
        )
        if split_sizes(sum(sizes), imported.config.mapping.max_input_size) != sizes:
            raise ValueError(
                f"{name or '(root)'}: mapping.max_input_size: got {imported.config.mapping.max_input_size}, but its tiles have "
                f"{sizes} inputs; build it with that max_input_size"
            )
        digital.weight = nn.Parameter(weight.reshape(digital.weight.shape), first.tile.weight.requires_grad)
        bias = layer.analog_module.bias
        digital.bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        digital.training = layer.training
        ours = CONVERSION_MAP[type(digital)].from_digital(digital, imported.config)
        if imported.learned_clip is not None:
            ours.learnable_weight_clip.copy_(imported.learned_clip)
        if ours.input_range is not None:
            ours.input_range.copy_(_ranges(name, grid, imported.fixed_range).to(ours.input_range))
            if imported.fixed_range is None:
                counts = torch.cat([row[0].input_range_update_idx.detach() for row in grid])
                ours.input_range_update_idx.copy_(counts)
        return ours

    def replace(self, name: str, old: nn.Module) -> nn.Module:
        new = self.made.get(id(old))
        if new is not None:
            carry_over(old, new)
            return new
        if isinstance(old, self.aihwkit.nn.AnalogWrapper):
            return self.aihwkit.nn.AnalogWrapper.to_digital(old)
        return retype(old, AnalogSequential) if isinstance(old, self.aihwkit.nn.AnalogSequential) else old


def _scale(tile: Any) -> Tensor:
    """What each output of a tile is multiplied by in evaluation, ``[N]``."""
    scale = tile.get_scales()
    scale = torch.ones(1) if scale is None else scale.detach()
    if tile.rpu_config.drift_compensation is not None:
        scale = scale * tile.alpha
    return scale.flatten().to(tile.tile.weight).expand(tile.out_size)


def _ranges(name: str, grid: list[list[Any]], fixed_range: float | None) -> Tensor:
    """``[S]``, one range for all tiles of a row."""
    if fixed_range is not None:
        return torch.full((len(grid),), fixed_range)
    for s, row in enumerate(grid):
        values = {tile.input_range.abs().item() for tile in row}
        if len(values) > 1:
            raise ValueError(
                f"{name or '(root)'}: the tiles of inputs {s} have input ranges {sorted(values)}; a slice has one here: set "
                "them to the same, or build the layer without max_output_size"
            )
    return torch.cat([row[0].input_range.detach().abs() for row in grid])
