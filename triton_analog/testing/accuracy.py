"""How far a result may be from the truth."""

from __future__ import annotations

from torch import Tensor

FLOOR = 2.0**-22
"""Error granted beyond plain torch's, as a share of the largest magnitude: two units in the last place of fp32, or four
roundings. It also holds for a sum of up to 16 terms, one after the other; errors of longer ones grow with the root."""
TIE = 1e-4
"""A value this close to half a step may be rounded either way."""
FLIPPED = 1e-3
"""Share of a result's elements, and always one of them, that may be rounded the other way at a tie."""
NOISE_ERROR, LARGEST_NOISE_ERROR = 1e-5, 2e-4
"""Of a normal number on a GPU, for all but one of a thousand and for every one (SEMANTICS 9)."""


def near_tie(steps: Tensor) -> Tensor:
    """Whether a number of steps lies half-way between two integers, to :data:`TIE`."""
    return ((steps.abs() % 1) - 0.5).abs() < TIE


def allowed_error(plain_error: Tensor | float, size: Tensor | float, terms: int = 16) -> Tensor | float:
    """Twice plain torch's error in the same dtype, plus :data:`FLOOR` of ``size``.

    Args:
        plain_error: Largest error of plain torch.
        size: The largest magnitude, or those behind a sum whose terms cancel.
        terms: Of that sum, where plain torch's is blocked, and the kernel's on a GPU in fp32 is not.
    """
    return 2 * plain_error + FLOOR * max(1, (terms / 16) ** 0.5) * size


def may_flip(elements: int) -> int:
    """How many of a result's elements may be rounded the other way."""
    return max(1, int(elements * FLIPPED))
