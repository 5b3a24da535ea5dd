"""The optional package aihwkit, imported when it is first needed, and what both directions share."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

INSTALL = "pip install --only-binary :all: --no-deps aihwkit==1.1.0 and then pip install scipy protobuf 'requests<3'"
"""Later versions have no wheels, and its own requirements would replace torch."""


def load_aihwkit(caller: str) -> SimpleNamespace:
    """The parts of AIHWKIT that the bridge uses.

    Raises:
        ImportError: the package, or something that it needs, is not installed.
    """
    try:
        from aihwkit import nn
        from aihwkit.nn.modules.base import AnalogLayerBase
        from aihwkit.nn.modules.rnn.layers import AnalogBidirRNNLayer
        from aihwkit.simulator.configs import TorchInferenceRPUConfig
        from aihwkit.simulator.parameters import enums
        from aihwkit.simulator.tiles.inference_torch import TorchInferenceTile
    except ImportError as error:
        raise ImportError(
            f"{caller} needs the package aihwkit, which cannot be imported ({error}); install it, and what its torch tiles "
            f"import, with {INSTALL}",
            name="aihwkit",
        ) from error
    return SimpleNamespace(
        nn=nn,
        enums=enums,
        AnalogLayerBase=AnalogLayerBase,
        AnalogBidirRNNLayer=AnalogBidirRNNLayer,
        TorchInferenceRPUConfig=TorchInferenceRPUConfig,
        TorchInferenceTile=TorchInferenceTile,
        cells={
            name: getattr(nn, name)
            for name in ("AnalogVanillaRNNCell", "AnalogLSTMCell", "AnalogLSTMCellCombinedWeight", "AnalogGRUCell")
        },
    )


def tile_grid(analog_module: Any) -> list[list[Any]]:
    """The tiles of an AIHWKIT layer: a row per slice of the inputs, in it a tile per slice of the outputs."""
    array = getattr(analog_module, "array", None)
    return [[analog_module]] if array is None else [list(row) for row in array]


class Notes:
    """What changes on the way without changing the outputs of an evaluation; told in one warning."""

    def __init__(self) -> None:
        self._layers: dict[str, list[str]] = {}

    def add(self, layer: str, note: str) -> None:
        self._layers.setdefault(note, []).append(layer or "(root)")

    def warn(self, lead: str) -> None:
        """Warn, as from the caller of the caller, if there is anything to tell."""
        if self._layers:
            told = "; ".join(f"{note} (in {', '.join(layers)})" for note, layers in self._layers.items())
            warnings.warn(f"{lead}: {told}", stacklevel=3)
