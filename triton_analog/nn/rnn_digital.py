"""Torch's recurrent layers and the analog one: which cell is whose, and how parameters move between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from triton_analog.nn.linear import AnalogLinear
from triton_analog.nn.rnn_cells import (
    AnalogGRUCell,
    AnalogLSTMCell,
    AnalogLSTMCellCombinedWeight,
    AnalogRNNCellBase,
    AnalogVanillaRNNCell,
)

LSTM_CELLS = (AnalogLSTMCell, AnalogLSTMCellCombinedWeight)
CELLS: dict[type[nn.RNNBase], tuple[type[AnalogRNNCellBase], ...]] = {
    nn.RNN: (AnalogVanillaRNNCell,),
    nn.LSTM: LSTM_CELLS,
    nn.GRU: (AnalogGRUCell,),
}
"""The cells that compute what a torch layer does, the default first."""


def cell_options(cell: Any, proj_size: int, nonlinearity: str) -> dict[str, Any]:
    """What the class ``cell`` takes beyond the arguments of every cell."""
    if not (isinstance(cell, type) and issubclass(cell, AnalogRNNCellBase)):
        given = getattr(cell, "__name__", repr(cell))
        names = ", ".join(kind.__name__ for kinds in CELLS.values() for kind in kinds)
        raise TypeError(f"cell: got {given}; the class of an analog cell is needed: {names}")
    if proj_size != 0 and not issubclass(cell, LSTM_CELLS):
        raise ValueError(
            f"proj_size: got {proj_size}, but {cell.__name__} has no projection; LSTM cells have; set it to 0"
        )
    if nonlinearity != "tanh" and not issubclass(cell, AnalogVanillaRNNCell):
        raise ValueError(
            f"nonlinearity: got {nonlinearity!r}, but only AnalogVanillaRNNCell has a choice; leave it out for {cell.__name__}"
        )
    if issubclass(cell, LSTM_CELLS):
        return {"proj_size": proj_size}
    return {"nonlinearity": nonlinearity} if issubclass(cell, AnalogVanillaRNNCell) else {}


def check_module(module: Any, cell: Any) -> type[AnalogRNNCellBase]:
    """The class of the cells for ``module``, whose parameters are all stored."""
    kinds = next((cells for torch_class, cells in CELLS.items() if isinstance(module, torch_class)), None)
    if kinds is None:
        raise TypeError(f"module: got {type(module).__name__}; a torch.nn.RNN, LSTM or GRU is needed")
    if cell is not None and not (isinstance(cell, type) and issubclass(cell, kinds)):
        raise TypeError(
            f"cell: got {getattr(cell, '__name__', repr(cell))}; allowed for {type(module).__name__} are "
            + ", ".join(kind.__name__ for kind in kinds)
        )
    for names in module._all_weights:
        for name in names:
            if name not in module._parameters:
                raise ValueError(
                    f"{name}: that of this {type(module).__name__} is not a parameter but computed from others "
                    "(weight_norm, pruning, a parametrization); remove that first, or leave the layer digital"
                )
    return kinds[0] if cell is None else cell


def take_parameters(cell: AnalogRNNCellBase, module: Any, name: str) -> None:
    """Let the products of ``cell`` continue with the parameters of the torch layer ``module`` whose names end in ``name``."""
    own: dict[str, nn.Parameter] = module._parameters
    for product_name, product in cell.named_children():
        assert isinstance(product, AnalogLinear)
        holder = nn.Linear(product.in_features, product.out_features, bias=False, device="meta")
        if product_name == "weight":
            holder.weight = _joined(
                [own[f"weight_ih_{name}"], own[f"weight_hh_{name}"]], lambda parts: torch.cat(parts, 1)
            )
            if module.bias:
                holder.bias = _joined(
                    [own[f"bias_ih_{name}"], own[f"bias_hh_{name}"]], lambda parts: parts[0] + parts[1]
                )
        else:
            holder.weight = own[f"{product_name}_{name}"]
            holder.bias = own.get(f"{product_name.replace('weight', 'bias')}_{name}")  # type: ignore[assignment]
        product.take_parameters(holder)


def empty_layer(module: Any) -> nn.RNN | nn.LSTM | nn.GRU:
    """A torch layer of the shape of the analog ``module``, without memory."""
    first = next(module._cells())
    kind = next((torch_class for torch_class, cells in CELLS.items() if isinstance(first, cells)), None)
    if kind is None:
        raise TypeError(f"module: its cell {type(first).__name__} is none of torch's layers; leave it analog")
    options: dict[str, Any] = {}
    if kind is nn.RNN:
        options["nonlinearity"] = first.nonlinearity
    elif kind is nn.LSTM:
        options["proj_size"] = module.proj_size
    layer: Any = kind(
        module.input_size,
        module.hidden_size,
        module.num_layers,
        bias=module.bias,
        batch_first=module.batch_first,
        bidirectional=module.bidirectional,
        device="meta",
        **options,
    )
    layer.dropout = module.dropout
    return layer


def give_parameters(cell: AnalogRNNCellBase, layer: nn.Module, name: str) -> None:
    """The reverse of :func:`take_parameters`."""
    for product_name, product in cell.named_children():
        assert isinstance(product, AnalogLinear)
        linear = AnalogLinear.to_digital(product)
        if product_name == "weight":
            widths = (cell.input_size, product.in_features - cell.input_size)
            ih, hh = (_alike(part, linear.weight) for part in linear.weight.detach().split(widths, dim=1))
            weights: dict[str, Tensor] = {f"weight_ih_{name}": ih, f"weight_hh_{name}": hh}
            if linear.bias is not None:
                weights[f"bias_ih_{name}"] = linear.bias
                weights[f"bias_hh_{name}"] = _alike(torch.zeros_like(linear.bias), linear.bias)
        else:
            weights = {f"{product_name}_{name}": linear.weight}
            if linear.bias is not None:
                weights[f"{product_name.replace('weight', 'bias')}_{name}"] = linear.bias
        for weight_name, weight in weights.items():
            setattr(layer, weight_name, weight)


def _joined(parts: list[nn.Parameter], join: Any) -> nn.Parameter:
    return nn.Parameter(join([part.detach() for part in parts]), any(part.requires_grad for part in parts))


def _alike(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format), like.requires_grad)
