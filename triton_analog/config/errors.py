"""The error of a config."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be simulated. The message names the field, the value, what is allowed and a remedy."""
