"""A tile whose devices were programmed: what a layer computes with in place of its own weight."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, dtype, nn

from triton_analog.calls import draw_seed
from triton_analog.nn.parts import whole_of


class ProgrammedTile:
    """What the devices of a tile hold, and the scale of its converters. Layers that share a weight share it."""

    def __init__(self) -> None:
        self._tile: Tensor | None = None
        self._wmax: Tensor | None = None
        self._scale: Tensor | None = None
        self._again: Callable[..., Tensor] | None = None
        self._cast: Tensor | None = None

    def fill(self, tile: Tensor, wmax: Tensor, scale: Tensor, again: Callable[..., Tensor] | None = None) -> None:
        """Hold ``tile [N, K]``, the scale ``wmax [S, N]`` of its converters and what a largest conductance stands for,
        ``scale [S, N]``. A tile may be a DTensor, whose rows are gathered for each forward. With ``again``, each forward reads
        the devices anew: what ``again(read_seed=...)`` gives."""
        self._tile, self._wmax, self._scale, self._again, self._cast = tile, wmax, scale, again, None

    def drop(self) -> None:
        """Hold nothing, until the next :meth:`fill`."""
        self._tile = self._wmax = self._scale = self._again = self._cast = None

    def held(self) -> Tensor:
        """What the devices hold, ``[N, K]``: not to be changed."""
        assert self._tile is not None
        return whole_of(self._tile)

    def as_(self, kind: dtype, training: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Tile and scales, as :meth:`fill` takes them, for one forward with inputs of dtype ``kind``.

        Raises:
            ValueError: the layer is in training mode.
        """
        if training:
            raise ValueError("training: a layer on a simulated chip only evaluates; call eval()")
        assert self._tile is not None
        assert self._wmax is not None
        assert self._scale is not None
        if self._again is not None:
            return self._again(read_seed=draw_seed(self._wmax.device)).to(kind), self._wmax, self._scale
        if self._tile.dtype == kind:
            return whole_of(self._tile), self._wmax, self._scale
        if self._cast is None or self._cast.dtype != kind:  # as under autocast
            self._cast = self._tile.to(kind)
        return whole_of(self._cast), self._wmax, self._scale


def refuse_chips(model: nn.Module, what: str) -> None:
    """No layer of ``model`` is on a simulated chip, which shares its parameters with the model that it was made of.

    Raises:
        ValueError: one is. The message says that ``what`` is not done.
    """
    if any(getattr(module, "programmed", None) is not None for module in model.modules()):
        raise ValueError(
            f"model: it is on a simulated chip, which {what} would not touch, but the model that it was made of; take that model"
        )
