"""The environment variables of the library: all of them, read here and nowhere else."""

from __future__ import annotations

import os

TUNING_DIR = "TRITON_ANALOG_TUNING_DIR"
AUTOTUNE = "TRITON_ANALOG_AUTOTUNE"
STRICT_TUNING = "TRITON_ANALOG_STRICT_TUNING"


def _switch(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name}: got {value!r}; allowed are '0' and '1'")
    return value == "1"


def tuning_directory() -> str | None:
    """Where tuned configurations are looked for first, and where a sweep leaves them; None if it is not set."""
    return os.environ.get(TUNING_DIR) or None


def autotune() -> bool:
    """Whether an operation measures its configurations when it first meets a problem that none was measured for.

    Raises:
        ValueError: The variable is neither 0 nor 1.
    """
    return _switch(AUTOTUNE)


def strict_tuning() -> bool:
    """Whether a configuration that was found for an older version of a kernel is passed over.

    Raises:
        ValueError: The variable is neither 0 nor 1.
    """
    return _switch(STRICT_TUNING)
