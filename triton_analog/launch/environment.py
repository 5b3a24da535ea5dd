"""The environment variables of the library: all of them, read here and nowhere else."""

from __future__ import annotations

import os

import triton.backends

from triton_analog.hints import did_you_mean, warn_user

TUNING_DIR = "TRITON_ANALOG_TUNING_DIR"
AUTOTUNE = "TRITON_ANALOG_AUTOTUNE"
STRICT_TUNING = "TRITON_ANALOG_STRICT_TUNING"


_known = (TUNING_DIR, AUTOTUNE, STRICT_TUNING)
_said: set[str] = set()


def warn_of_idle() -> None:
    """Warn, once for each, of variables that look like ours but are read by nobody, and of a backend that is not there."""
    for name in sorted(os.environ):
        like_ours = "" if name in _known else did_you_mean(name, _known, "", cutoff=0.85)
        if like_ours or (name.startswith("TRITON_ANALOG_") and name not in _known):
            _say(name, f"is read by nobody; {like_ours or 'there are ' + ', '.join(_known)}")
    if os.environ.get("TRITON_CPU_BACKEND", "0") not in ("", "0") and "cpu" not in triton.backends.backends:
        _say(
            "TRITON_CPU_BACKEND",
            "has no effect, as this Triton is not Triton-CPU; build that from source, or set TRITON_INTERPRET=1 to run "
            "kernels on the CPU",
        )


def _say(name: str, what: str) -> None:
    if name not in _said:
        _said.add(name)
        warn_user(f"{name}={os.environ[name]} {what}")


def _switch(name: str) -> bool:
    warn_of_idle()
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


warn_of_idle()
