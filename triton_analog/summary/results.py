"""What a summary found: layers, their tiles and their work, as objects, JSON and a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from triton_analog.coverage.weights import Coverage, DigitalWeights
from triton_analog.tables import ShownAsTable


@dataclass(frozen=True)
class LayerSummary:
    """One layer. Its work is that of all vectors of the batch, and None where no batch was given."""

    name: str
    kind: str
    """Its class."""
    is_analog: bool
    inputs: int = 0
    """``K`` of an analog layer (of one group)."""
    outputs: int = 0
    """``N`` of an analog layer (of all groups)."""
    slices: tuple[int, ...] = ()
    """Widths of the slices of its inputs."""
    groups: int = 1
    tile_size: tuple[int, int] = (0, 0)
    """Inputs and outputs of a physical tile."""
    tiles: int = 0
    """Physical tiles that it takes."""
    shares_tiles_of: str | None = None
    """The layer before it whose weight, and so tiles, it has too."""
    vectors: int | None = None
    """Input vectors that it multiplied: rows, patches, time steps."""
    macs: int | None = None
    """Products of an input and a weight."""
    dac_conversions: int | None = None
    """Inputs times tiles that they go to."""
    adc_conversions: int | None = None
    """Outputs times tiles that they come from."""

    @property
    def utilisation(self) -> float | None:
        """Share of the cells of its tiles that hold a weight; None for a digital layer."""
        return self.inputs * self.outputs / self._cells if self.tiles else None

    @property
    def _cells(self) -> int:
        return self.tiles * self.tile_size[0] * self.tile_size[1]


@dataclass(frozen=True)
class Summary(ShownAsTable):
    """What :func:`analog_summary` found. ``print(summary)`` shows the coverage, and the table if a batch or a size of tiles was
    given."""

    coverage: Coverage
    layers: tuple[LayerSummary, ...]
    """The analog ones; after them the digital modules that computed products."""
    unit: str | None = None
    """What the batch has several of: ``"token"``, ``"sample"``, or ``"batch"`` where nobody knows; None without a batch."""
    units: int | None = None
    """How many."""
    shows_tiles: bool = False
    """Whether ``print`` shows the table."""

    # ---- Weights ------------------------------------------------------------------------------------------------------

    @property
    def on_tiles(self) -> int:
        """Numbers in weights on tiles."""
        return self.coverage.on_tiles

    @property
    def total(self) -> int:
        """Numbers in all weights."""
        return self.coverage.total

    @property
    def digital(self) -> list[DigitalWeights]:
        """Modules with weights that are not on tiles, each once."""
        return self.coverage.digital

    @property
    def share(self) -> float:
        """The part of the weights that is on tiles, in 0 .. 1; 1 where there are none."""
        return self.coverage.share

    @property
    def percentage(self) -> str:
        """That in a sentence."""
        return self.coverage.percentage

    # ---- Tiles and work -----------------------------------------------------------------------------------------------

    @property
    def tiles(self) -> int:
        """Physical tiles of all layers, those that layers share once."""
        return sum(layer.tiles for layer in self._owners())

    @property
    def utilisation(self) -> float | None:
        """Share of the cells of all tiles that hold a weight; None without tiles."""
        cells = sum(layer._cells for layer in self._owners())
        return sum(layer.inputs * layer.outputs for layer in self._owners()) / cells if cells else None

    @property
    def analog_macs(self) -> int | None:
        """Multiply-adds on tiles, for the whole batch."""
        return self._sum("macs", True)

    @property
    def digital_macs(self) -> int | None:
        """Multiply-adds of all other matrix products, convolutions and attention, for the whole batch."""
        return self._sum("macs", False)

    @property
    def dac_conversions(self) -> int | None:
        return self._sum("dac_conversions", True)

    @property
    def adc_conversions(self) -> int | None:
        return self._sum("adc_conversions", True)

    def to_json(self) -> str:
        """Everything, as JSON. Work is that of the whole batch: divide by ``units``."""
        names = ("tiles", "utilisation", "analog_macs", "digital_macs", "dac_conversions", "adc_conversions")
        whole = {name: getattr(self, name) for name in ("on_tiles", "total", "share", "unit", "units", *names)}
        digital = [weights._asdict() for weights in self.digital]
        layers = [asdict(layer) | {"utilisation": layer.utilisation} for layer in self.layers if layer.is_analog]
        products = [{"name": own.name, "kind": own.kind, "macs": own.macs} for own in self.layers if not own.is_analog]
        parts = {"analog_layers": layers, "digital_products": products, "digital_weights": digital}
        return json.dumps(whole | parts, indent=1)

    def __str__(self) -> str:
        return f"{self.coverage}\n\n{super().__str__()}" if self.shows_tiles else str(self.coverage)

    def headings(self) -> tuple[str, ...]:
        return "layer", "in x out", "tiles", "used %", "MACs", "DAC", "ADC"

    def rows(self) -> Iterator[tuple[str, ...]]:
        """The lines of the table, with the work of one unit."""
        for layer in self.layers:
            shape = (
                f"{_groups(layer)}{layer.inputs} x {layer.outputs // layer.groups}" if layer.is_analog else "digital"
            )
            tiles = "shared" if layer.shares_tiles_of else str(layer.tiles) if layer.is_analog else "-"
            yield layer.name, shape, tiles, _percent(layer.utilisation), *self._work(layer)
        analog = LayerSummary(
            "",
            "",
            True,
            macs=self.analog_macs,
            dac_conversions=self.dac_conversions,
            adc_conversions=self.adc_conversions,
        )
        yield "all analog", "", str(self.tiles), _percent(self.utilisation), *self._work(analog)
        if self.digital_macs:
            yield "all digital", "", "-", "-", *self._work(LayerSummary("", "", False, macs=self.digital_macs))

    def legend(self) -> str:
        sizes = sorted({layer.tile_size for layer in self.layers if layer.is_analog})
        tiles = ", ".join(f"{rows} x {columns}" for rows, columns in sizes)
        work = f" MACs and conversions: per {self.unit}, of {self.units:,}." if self.unit else ""
        return f"Tiles of {tiles} (inputs x outputs).{work}" if tiles else work.strip()

    def _work(self, layer: LayerSummary) -> Iterator[str]:
        for count in (layer.macs, layer.dac_conversions, layer.adc_conversions):
            yield "-" if count is None else short(count / (self.units or 1))

    def _owners(self) -> Iterable[LayerSummary]:
        return (layer for layer in self.layers if layer.shares_tiles_of is None)

    def _sum(self, field: str, is_analog: bool) -> int | None:
        if self.units is None:
            return None
        return sum(getattr(layer, field) or 0 for layer in self.layers if layer.is_analog is is_analog)


def _groups(layer: LayerSummary) -> str:
    return f"{layer.groups} * " if layer.groups > 1 else ""


def _percent(share: Any) -> str:
    return "-" if share is None else f"{100 * share:.3g}"


def short(count: float) -> str:
    """A count in three digits: ``12``, ``1.2 k``, ``45.6 M``."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * factor:
            return f"{count / factor:.3g} {letter}"
    return f"{count:.3g}"
