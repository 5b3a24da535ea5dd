"""Words for users: near names, many names in few, bits that were taken for steps, and their own line."""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<![^.])\d+(?![^. ])")
_NAMES_SHOWN = 3
_INSIDE = ("triton_analog", "torch", "contextlib")
"""Packages whose frames lie between a warning and the line of the user that it is about."""


def did_you_mean(given: str, names: Iterable[str], otherwise: str, cutoff: float = 0.6, lead: str = "") -> str:
    """A question with those of ``names`` that are spelt much like ``given``, after ``lead``; ``otherwise`` if there are none."""
    spelt = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), spelt, n=3, cutoff=cutoff)
    return f"{lead}did you mean {' or '.join(repr(spelt[name]) for name in near)}?" if near else otherwise


def names_of(names: Iterable[str]) -> str:
    """``names`` in a sentence; many that differ in numbers alone are one pattern."""
    patterns: dict[str, list[str]] = {}
    for name in names:
        patterns.setdefault(_NUMBER.sub("*", name), []).append(name)
    return ", ".join(
        f"{pattern} ({len(own)} of them)" if len(own) > _NAMES_SHOWN else ", ".join(own)
        for pattern, own in patterns.items()
    )


def bits_for_steps(res: float) -> str | None:
    """What to say of a resolution of 4 to 16 steps (or its inverse), which may have been meant as bits; else None."""
    steps = res if res > 1 or res <= 0 else 1 / res
    if not 4 <= steps <= 16:
        return None
    bits = round(steps)
    return f"that is {steps:g} steps, not bits: {bits} bits are 2**{bits} - 2 = {2**bits - 2} steps"


def _users_level() -> int:
    """The ``stacklevel`` of a warning of this function's caller that is about the line of the user."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _INSIDE:
        frame = frame.f_back
        while frame.f_back is not None and "importlib._bootstrap" in frame.f_code.co_filename:
            frame = frame.f_back  # these do not count
        level += 1
    return level


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user that led here."""
    warnings.warn(message, category, stacklevel=_users_level())
