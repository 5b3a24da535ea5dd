"""Models of ours as models of AIHWKIT's torch tiles."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import triton_analog.ops as ops
from triton_analog.aihwkit_bridge.depth import Conv3dByDepth
from triton_analog.aihwkit_bridge.experts import export_experts, is_known
from triton_analog.aihwkit_bridge.export_config import base_aihwkit_rpu_config, export_config
from triton_analog.aihwkit_bridge.package import Notes, load_aihwkit, tile_grid
from triton_analog.convert import CONVERSION_MAP, carry_over, replace_modules
from triton_analog.nn import rnn_cells
from triton_analog.nn.containers import AnalogSequential, AnalogWrapper, retype
from triton_analog.nn.matrix import AnalogMatrixLayer
from triton_analog.nn.outside import check_layers
from triton_analog.nn.parts import refuse_parts
from triton_analog.nn.programmed import refuse_chips
from triton_analog.nn.rnn import AnalogRNN
from triton_analog.nn.rnn_cells import AnalogRNNCellBase, AnalogVanillaRNNCell
from triton_analog.nn.settings import QUANTIZATION

PADDING = {
    "zeros": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}
"""By mode, then by the number of dimensions: torch's layers that pad as a convolution does."""


def export_to_aihwkit(model: nn.Module, max_output_size: int = -1, *, out_noise: bool = False) -> Any:
    """An AIHWKIT model of ``TorchInferenceRPUConfig`` tiles with the same outputs as ``model`` in evaluation.

    Every layer keeps its own config. Input ranges are those of ``model``, tile by tile; weights are those that its forward
    in evaluation uses, clipped and quantized, mapped to -1 .. 1 per slice or per channel as the config needs. ``model``
    itself stays as it is. The copy computes in float32 throughout, whatever the dtypes of ``model``; its modules are in the
    same mode and on the same devices.

    - A 1-D convolution becomes AIHWKIT's 2-D one between reshapes, a 3-D one AIHWKIT's 2-D one inside a ``Conv3dByDepth`` of
      this package, as AIHWKIT's own need its C++ tile. Padding that AIHWKIT does not know is a torch layer in front.
    - ``AnalogRNN`` becomes AIHWKIT's, which takes and returns a list of states: of tuples ``(h, c)`` for LSTM cells, of
      tensors for others.
    - Experts (``AnalogExperts``) stay a module of the same kind, whose ``tiles`` are AIHWKIT's layers, one for each matrix.
    - Tied weights become tiles of their own.
    - Settings that act in training only are carried over where AIHWKIT has them.

    Args:
        model: A model with analog layers, or one such layer.
        max_output_size: Most output channels of a tile; ``<= 0`` is no limit.
        out_noise: Export the output noise too, with the same total deviation. AIHWKIT adds it in evaluation as well.

    Warns:
        UserWarning: settings that act otherwise in training, with the layers that have them.

    Raises:
        ConfigError: ``out_noise`` was asked for where AIHWKIT cannot scale it as the layer does.
        ImportError: the package aihwkit is not installed.
        TypeError: ``model`` is no module, or holds an analog module that is none of the above.
        ValueError: ``model`` has no analog layers, or one of them is what AIHWKIT does not have: a convolution with groups,
            or an ``AnalogRNN`` with ``batch_first``, ``proj_size``, relu, or torch's form of states. It is named.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; a torch.nn.Module with analog layers is needed")
    if not isinstance(max_output_size, int) or isinstance(max_output_size, bool):
        raise TypeError(f"max_output_size: got {max_output_size!r}; an int is needed, <= 0 for no limit")
    if not any(isinstance(module, AnalogMatrixLayer) for module in model.modules()):
        raise ValueError(f"model: {type(model).__name__} has no analog layers; make some with convert_to_analog")
    refuse_chips(model, "an export")
    refuse_parts(model, "export_to_aihwkit")
    check_layers(model)
    exporter = _Exporter(max_output_size, out_noise)
    clone = copy.deepcopy(model)
    exporter.find_ties(clone)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # AIHWKIT's constructors draw weights
        exporter.export_layers(clone)
    clone.float()
    root = replace_modules(clone, "", exporter.replace, {})
    if not isinstance(root, exporter.aihwkit.AnalogLayerBase):
        root = _wrap(root, exporter.aihwkit.nn.AnalogWrapper)
    exporter.notes.warn("export_to_aihwkit: evaluation is the same, but in training AIHWKIT differs")
    return root


class _Exporter:
    """One export: the layers made so far, and what there is to tell."""

    def __init__(self, max_output_size: int, out_noise: bool) -> None:
        self.aihwkit = load_aihwkit("export_to_aihwkit")
        self.max_output_size, self.out_noise = max_output_size, out_noise
        self.notes = Notes()
        self.made: dict[int, nn.Module] = {}

    def find_ties(self, model: nn.Module) -> None:
        holders: dict[int, list[tuple[str, nn.Module]]] = {}
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    holders.setdefault(id(parameter), []).append((name, module))
        for sharing in holders.values():
            for name, module in sharing:
                if len(sharing) > 1 and isinstance(module, AnalogMatrixLayer):
                    others = ", ".join(other or "(root)" for other, _ in sharing if other != name)
                    self.notes.add(name, f"a parameter tied to {others} is a copy on tiles of its own")

    # ---- Making layers ------------------------------------------------------------------------------------------------

    def export_layers(self, model: nn.Module) -> None:
        """Make the AIHWKIT module for every analog one of ``model``; nothing is replaced yet."""
        inside: set[int] = set()
        for name, module in model.named_modules():
            if id(module) in inside:
                continue
            is_layer = isinstance(module, AnalogRNN | AnalogRNNCellBase | AnalogMatrixLayer)
            if (is_layer and not _computes_as_ours(module)) or isinstance(module, AnalogRNNCellBase):
                raise TypeError(
                    f"{name or '(root)'}: AIHWKIT has nothing like this {type(module).__name__}; exported are AnalogLinear, "
                    "AnalogConv1d, 2d, 3d and AnalogRNN with their own forward: convert this one to digital"
                )
            if is_known(module):
                self.made[id(module)] = export_experts(module, partial(self._below, name))
                inside.update(map(id, module.modules()))
            elif isinstance(module, AnalogRNN):
                self.made[id(module)] = self._rnn(name, module)
                inside.update(map(id, module.modules()))
            elif is_layer:
                make = self._convolution if isinstance(module, _ConvNd) else self._linear
                self.made[id(module)] = make(name, module)

    def _below(self, name: str, path: str, layer: Any) -> nn.Module:
        return self._linear(f"{name}.{path}" if name else path, layer)

    def _linear(self, name: str, layer: Any) -> nn.Module:
        def make(config: Any) -> Any:
            return self.aihwkit.nn.AnalogLinear(
                layer.in_features, layer.out_features, bias=layer.bias is not None, rpu_config=config
            )

        return self._fill(name, layer, make)

    def _convolution(self, name: str, layer: Any) -> nn.Module:
        if layer.groups != 1:
            raise ValueError(
                f"{name or '(root)'}: groups: got {layer.groups}; AIHWKIT has convolutions with groups = 1 only; convert this "
                "layer to digital"
            )
        rank = len(layer.kernel_size)
        before: list[nn.Module] = []
        padding = layer.padding
        if isinstance(padding, str) or layer.padding_mode != "zeros":
            if any(layer._reversed_padding_repeated_twice):
                before = [PADDING[layer.padding_mode][rank - 1](tuple(layer._reversed_padding_repeated_twice))]
            padding = (0,) * rank
        sizes = [layer.kernel_size, layer.stride, padding, layer.dilation]
        if rank == 1:  # an image of height 1
            sizes = [(neutral, *size) for neutral, size in zip((1, 1, 0, 1), sizes, strict=True)]
        planes = layer.in_channels * (layer.kernel_size[0] if rank == 3 else 1)

        def make(config: Any) -> Any:
            return self.aihwkit.nn.AnalogConv2d(
                planes,
                layer.out_channels,
                *(size[-2:] for size in sizes),
                bias=layer.bias is not None,
                rpu_config=config,
            )

        conv = self._fill(name, layer, make)
        if rank == 1:
            parts = [*before, nn.Unflatten(-1, (1, -1)), conv, nn.Flatten(-2, -1)]
        elif rank == 3:
            parts = [*before, Conv3dByDepth(conv, *(size[0] for size in sizes))]
        else:
            parts = [*before, conv]
        whole = conv if parts == [conv] else self.aihwkit.nn.AnalogSequential(*parts)
        return whole.train(layer.training)

    def _rnn(self, name: str, layer: AnalogRNN) -> nn.Module:
        first = next(layer._cells())
        cell, cells = type(first).__name__, self.aihwkit.cells
        relu = isinstance(first, AnalogVanillaRNNCell) and first.nonlinearity != "tanh"
        for setting, given, fits, remedy in (
            ("cell", cell, getattr(rnn_cells, cell, None) is type(first), f"it has {', '.join(cells)}"),
            (
                "batch_first",
                layer.batch_first,
                not layer.batch_first,
                "build the layer without and transpose around it",
            ),
            ("proj_size", layer.proj_size, not layer.proj_size, "build the layer with proj_size=0"),
            ("nonlinearity", "relu", not relu, "its vanilla cell has tanh only"),
            (
                "lists_states",
                False,
                layer.lists_states,
                "let the model take lists of states and set lists_states = True",
            ),
        ):
            if not fits:
                raise ValueError(
                    f"{name or '(root)'}: {setting}: got {given}, which AIHWKIT's AnalogRNN does not have; {remedy}, or "
                    "convert this layer to digital"
                )
        rnn = self.aihwkit.nn.AnalogRNN(
            cells[cell],
            layer.input_size,
            layer.hidden_size,
            bias=layer.bias,
            rpu_config=base_aihwkit_rpu_config(),
            num_layers=layer.num_layers,
            bidir=layer.bidirectional,
            dropout=layer.dropout if layer.num_layers > 1 else 0.0,
        )
        prefix = f"{name}." if name else ""
        for (cell_name, ours), theirs in zip(layer.cells.items(), aihwkit_cells(rnn, self.aihwkit), strict=True):
            for product_name, product in ours.named_children():
                exported = self._linear(f"{prefix}cells.{cell_name}.{product_name}", product)
                setattr(theirs, product_name, exported)
        return rnn.train(layer.training)

    def _fill(self, name: str, layer: Any, make: Any) -> nn.Module:
        """The AIHWKIT layer that ``make`` creates from a config, with weights, ranges, mode and device of ``layer``."""
        config = layer.rpu_config
        config.validate()
        rpu_config, per_channel = export_config(
            config,
            name,
            layer.slices,
            self.max_output_size,
            self.out_noise,
            lambda note: self.notes.add(name, note),
        )
        weight, wmax = ops.weight(
            layer.matrix,
            layer.slices,
            clip=layer.learnable_weight_clip,
            quantization=QUANTIZATION[config.modifier.quantization_type],
            res=config.modifier.res,
            dtype=torch.float32,
        )
        scales = (wmax if per_channel else wmax.amax(1, keepdim=True).expand_as(wmax)).float().cpu()
        scales = torch.where(scales > 0, scales, 1.0)
        exported = make(rpu_config)
        module = exported.analog_module
        bias = None if layer.bias is None else layer.bias.float()
        mapped = weight.cpu() / scales.T.repeat_interleave(torch.tensor(layer.get_split_sizes()), dim=1)
        module.set_weights(mapped, bias, apply_weight_scaling=False)
        if bias is not None:
            module.bias.requires_grad_(layer.bias.requires_grad)
        for s, row in enumerate(tile_grid(module)):
            for tile, scale in zip(row, scales[s].split([tile.out_size for tile in row]), strict=True):
                tile.tile.weight.requires_grad_(layer.weight.requires_grad)
                tile.set_scales(scale)
                if layer.input_range is not None:
                    _set_range(tile, layer.input_range[s], layer.input_range_update_idx[s])
        return exported.to(layer.weight.device).train(layer.training)

    # ---- Replacing ----------------------------------------------------------------------------------------------------

    def replace(self, name: str, old: nn.Module) -> nn.Module:
        new = self.made.get(id(old))
        if new is not None:
            carry_over(old, new)
            return new
        if isinstance(old, AnalogWrapper):
            return AnalogWrapper.to_digital(old)
        return retype(old, self.aihwkit.nn.AnalogSequential) if isinstance(old, AnalogSequential) else old


def _computes_as_ours(module: nn.Module) -> bool:
    """Whether the forward of an analog layer is the library's, not one of a subclass or of the instance."""
    return "forward" not in vars(module) and any(
        type(module).forward is kind.forward for kind in CONVERSION_MAP.values()
    )


def _set_range(tile: Any, value: Tensor, count: Tensor) -> None:
    # A range of 0 lets nothing through; AIHWKIT divides by it.
    tile.set_input_range(max(value.abs().item(), torch.finfo(torch.float32).tiny))
    tile.input_range_update_idx.fill_(count.item())


def aihwkit_cells(rnn: Any, aihwkit: Any) -> list[Any]:
    """The cells of AIHWKIT's ``AnalogRNN``, layer by layer and direction by direction."""
    cells = []
    for layer in rnn.rnn.layers:
        directions = layer.directions if isinstance(layer, aihwkit.AnalogBidirRNNLayer) else [layer]
        cells += [direction.cell for direction in directions]
    return cells


def _wrap(model: nn.Module, wrapper: Any) -> nn.Module:
    """``model`` in AIHWKIT's wrapper, whose registry knows classes by their bare name: another's entry must not be used."""
    name = f"{wrapper.__name__}{type(model).__name__}"
    if not issubclass(wrapper.SUBCLASSES.get(name, type(model)), type(model)):
        del wrapper.SUBCLASSES[name]
    return wrapper(model)
