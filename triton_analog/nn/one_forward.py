"""Calls of a layer that are one forward together, such as the time steps of a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from triton_analog.seeds import mix_rank


def draw_seeds(count: int, device: torch.device) -> tuple[Tensor, ...]:
    """``count`` seeds of :func:`triton_analog.functional.draw_seed`, drawn at once."""
    # Two numbers to a seed: what kernels read is then always aligned to 16 bytes, so that one compiled kernel serves all.
    drawn = mix_rank(torch.randint(0, 2**63 - 1, (count, 2), dtype=torch.int64, device=device))
    return drawn[:, :1].unbind(0)


def refuse_shared_forward(one_forward: OneForward | None) -> None:
    """A call of a layer that is split over ranks is a forward of its own.

    Raises:
        ValueError: it is to share one with others.
    """
    if one_forward is not None:
        raise ValueError(
            "one_forward: given to a layer that tensor parallelism has split, whose calls cannot share a weight; leave it out, "
            "or leave the layer whole (fully_shard may shard it)"
        )


class OneForward:
    """What ``calls`` calls of one layer share in a forward: the weight as the tiles hold it, made in the first of them.

    It lives until the backward of all calls is over, or for as long as this object does: the memory of one more weight, in
    the dtype of the inputs. Everything that differs from call to call is made for all of them at once.
    """

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self.tile: tuple[Tensor | None, Tensor | None] | None = None
        """The weight and its scale, each None where the call makes do without; None before the first call."""
        self._left: dict[str, list[Tensor]] = {}

    def seed(self, device: torch.device) -> Tensor:
        """The next seed: one for each call, and one for the weight."""
        return self._next("seed", lambda: draw_seeds(self.calls + 1, device))

    def own(self, name: str, parameter: Tensor | None) -> Tensor | None:
        """The parameter ``name`` for the next call alone: the gradients of all calls are then added up at once."""
        if parameter is None:
            return None
        return self._next(name, lambda: parameter.expand(self.calls, *parameter.shape).unbind(0))

    def _next(self, name: str, make: Callable[[], Iterable[Tensor]]) -> Tensor:
        if not self._left.get(name):
            self._left[name] = list(make())[::-1]
        return self._left[name].pop()
