"""A tile whose devices were programmed: what a layer computes with in place of its own weight."""

from __future__ import annotations

from torch import Tensor, dtype


class ProgrammedTile:
    """What the devices of a tile hold, and the scale of its converters. Layers that share a weight share it."""

    def __init__(self) -> None:
        self._tile: Tensor | None = None
        self._wmax: Tensor | None = None

    def fill(self, tile: Tensor, wmax: Tensor) -> None:
        """Hold ``tile [N, K]`` and ``wmax [S, N]``."""
        self._tile, self._wmax = tile, wmax

    def drop(self) -> None:
        """Hold nothing, until the next :meth:`fill`."""
        self._tile = self._wmax = None

    def as_(self, kind: dtype, training: bool) -> tuple[Tensor, Tensor]:
        """Tile and scale for inputs of dtype ``kind``.

        Raises:
            ValueError: the layer is in training mode.
        """
        if training:
            raise ValueError("training: a layer on a simulated chip only evaluates; call eval()")
        assert self._tile is not None
        assert self._wmax is not None
        if self._tile.dtype != kind:
            self._tile = self._tile.to(kind)
        return self._tile, self._wmax
