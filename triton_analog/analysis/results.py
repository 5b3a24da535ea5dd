"""What an analysis found: numbers per layer and slice, as objects, JSON, a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from triton_analog.hints import did_you_mean
from triton_analog.tables import ShownAsTable, to_json

MOST_SLICES = 32
"""So many slices of a layer are shown in a table."""


@dataclass(frozen=True)
class SliceAnalysis:
    """What one slice of a layer's inputs did on its tile. Shares are in 0 .. 1; None is what there is not or nobody knows."""

    inputs: int
    """Its width."""
    clipped: float | None
    """Share of its inputs ``x`` that the DAC clips: ``|x| > r``. 0 for a dynamic range, None without a range."""
    saturated: float | None
    """Share of its products at which the ADC's bound acts; None without a bound."""
    snr_db: float | None
    """Signal-to-noise ratio of what the tile gives, in dB; inf where the tile gives the digital product."""
    kurtosis: float | None
    """Of its weights."""
    input_range: float | None
    """The stored range ``r``; None for one that is dynamic or off."""
    largest_input: float | None
    """The largest ``|x|`` of all batches."""

    @property
    def range_ratio(self) -> float | None:
        """The stored range divided by the largest input: below 1 something is clipped, far above 1 steps are wasted."""
        if self.input_range is None or not self.largest_input:
            return None
        return self.input_range / self.largest_input


@dataclass(frozen=True)
class LayerAnalysis:
    """What one layer did on its tiles."""

    name: str
    kind: str
    """Its class."""
    outputs: int
    groups: int
    vectors: int
    """Input vectors that it multiplied: rows, patches, time steps. 0: no batch reached it."""
    snr_db: float | None
    """Signal-to-noise ratio of its output, in dB."""
    kurtosis: float | None
    """Of all its weights."""
    slices: tuple[SliceAnalysis, ...]
    """Group by group."""

    @property
    def clipped(self) -> float | None:
        """Share of all inputs that its DACs clip."""
        return _mean((part.clipped, part.inputs) for part in self.slices)

    @property
    def saturated(self) -> float | None:
        """Share of all products of its slices at which the bound of an ADC acts."""
        return _mean((part.saturated, 1) for part in self.slices)

    @property
    def range_ratio(self) -> float | None:
        """The smallest of its slices: the range that is narrowest for its data."""
        return min((part.range_ratio for part in self.slices if part.range_ratio is not None), default=None)


_COLUMNS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "clipped": ("clip %", "inputs\nclipped, %", lambda share: f"{100 * share:.3g}"),
    "saturated": ("sat %", "products\nsaturated, %", lambda share: f"{100 * share:.3g}"),
    "snr_db": ("SNR dB", "SNR, dB", lambda ratio: f"{ratio:.1f}"),
    "kurtosis": ("kurt.", "kurtosis of\nthe weights", lambda kurtosis: f"{kurtosis:.3g}"),
    "range_ratio": ("r/max", "range / largest\ninput", lambda ratio: f"{ratio:.3g}"),
}
"""Fields of layers and slices: heading in a table, label in a picture, and format."""
_LEGEND = (
    "clip: inputs clipped by the DAC; sat: products saturated at the ADC; SNR: analog output against the digital one; kurt.: "
    "kurtosis of the weights, 3 if normal; r/max: input range / largest input"
)


@dataclass(frozen=True)
class Analysis(ShownAsTable):
    """What :func:`analyze` found. ``print(analysis)`` shows it; ``analysis["name"]`` is one layer."""

    batches: int
    """That the model ran on."""
    layers: tuple[LayerAnalysis, ...]

    def __getitem__(self, name: str) -> LayerAnalysis:
        """The layer called ``name``.

        Raises:
            KeyError: there is none.
        """
        found = {layer.name: layer for layer in self.layers}
        if name not in found:
            raise KeyError(f"no analog layer {name!r}; {did_you_mean(name, found, 'layers has them all')}")
        return found[name]

    def scalars(self) -> dict[str, float]:
        """All finite numbers of the layers, as trackers log them: ``{"analog/<layer>/snr_db": 31.2, ...}``."""
        found = {f"analog/{layer.name}/{field}": getattr(layer, field) for layer in self.layers for field in _COLUMNS}
        return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}

    def to_json(self) -> str:
        """Everything, as JSON. Numbers that are not finite, such as an SNR without any noise, are null."""
        layers = [
            asdict(layer)
            | _derived(layer, "clipped", "saturated", "range_ratio")
            | {"slices": [asdict(part) | _derived(part, "range_ratio") for part in layer.slices]}
            for layer in self.layers
        ]
        return to_json({"batches": self.batches, "layers": layers})

    def rows(self, slices: bool = True) -> Iterator[tuple[str, ...]]:
        """The lines of the table: those of the layers, and below them those of their slices if there are several."""
        for layer in self.layers:
            yield layer.name, *_cells(layer)
            shown = len(layer.slices) if slices else 1
            if shown > MOST_SLICES:
                yield f"  {shown} slices: to_json()", *[""] * len(_COLUMNS)
            elif shown > 1:
                for number, part in enumerate(layer.slices):
                    group, at = divmod(number, shown // layer.groups)
                    of = f"group {group}, " if layer.groups > 1 else ""
                    yield f"  {of}slice {at}", *_cells(part)

    def headings(self) -> tuple[str, ...]:
        return f"layer ({self.batches} batch{'es' * (self.batches != 1)})", *(head for head, _, _ in _COLUMNS.values())

    def legend(self) -> str:
        return _LEGEND

    def plot(self, path: Any) -> None:
        """Save a picture: every number of every layer (line) and of its slices (dots).

        Needs matplotlib, ``pip install 'triton-analog[analysis]'``.
        """
        from matplotlib.figure import Figure

        known = [field for field in _COLUMNS if any(getattr(layer, field) is not None for layer in self.layers)]
        names = [layer.name for layer in self.layers]
        figure = Figure(
            figsize=(max(5.0, min(16.0, 2.5 + 0.25 * len(names))), 1 + 1.5 * len(known)), layout="constrained"
        )
        grid = figure.subplots(len(known), 1, sharex=True, squeeze=False)[:, 0]
        for axes, field in zip(grid, known, strict=True):
            factor = 100 if field in ("clipped", "saturated") else 1
            dots = [(i, getattr(part, field)) for i, layer in enumerate(self.layers) for part in layer.slices]
            dots = [(i, value) for i, value in dots if value is not None]
            axes.plot(
                [i for i, _ in dots], [factor * value for _, value in dots], "o", color="C0", alpha=0.3, markersize=3
            )
            line = [getattr(layer, field) for layer in self.layers]
            axes.plot([math.nan if value is None else factor * value for value in line], "-o", color="C0", markersize=4)
            axes.set_ylabel(_COLUMNS[field][1])
            axes.grid(alpha=0.3)
        if len(names) <= 60:
            grid[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        else:
            grid[-1].set_xlabel("layer")
        figure.align_ylabels()
        figure.savefig(path, dpi=150)


def _cells(found: LayerAnalysis | SliceAnalysis) -> list[str]:
    values = [(getattr(found, field), shown) for field, (_, _, shown) in _COLUMNS.items()]
    return ["-" if value is None else shown(value) for value, shown in values]


def _derived(found: Any, *fields: str) -> dict[str, Any]:
    return {field: getattr(found, field) for field in fields}


def _mean(shares: Iterable[tuple[float | None, int]]) -> float | None:
    known = [(share, weight) for share, weight in shares if share is not None]
    return sum(share * weight for share, weight in known) / sum(weight for _, weight in known) if known else None
