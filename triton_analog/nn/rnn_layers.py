"""The cells of a recurrent layer in the arrangement of AIHWKIT-Lightning, for code that reaches them by its paths."""

from __future__ import annotations

from typing import NamedTuple

from triton_analog.nn.rnn_cells import AnalogRNNCellBase


class AnalogRNNLayer(NamedTuple):
    """A layer of one direction."""

    cell: AnalogRNNCellBase


class AnalogReverseRNNLayer(NamedTuple):
    """The part of a layer that runs backwards."""

    cell: AnalogRNNCellBase


class AnalogBidirRNNLayer(NamedTuple):
    """A layer of two directions."""

    directions: tuple[AnalogRNNLayer, AnalogReverseRNNLayer]


class ModularRNN(NamedTuple):
    """All layers."""

    layers: tuple[AnalogRNNLayer | AnalogBidirRNNLayer, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def arranged(cells: list[AnalogRNNCellBase], directions: int) -> ModularRNN:
    """``cells``, layer by layer and direction by direction."""
    if directions == 1:
        return ModularRNN(tuple(map(AnalogRNNLayer, cells)))
    pairs = zip(cells[::2], cells[1::2], strict=True)
    return ModularRNN(
        tuple(AnalogBidirRNNLayer((AnalogRNNLayer(ahead), AnalogReverseRNNLayer(back))) for ahead, back in pairs)
    )
