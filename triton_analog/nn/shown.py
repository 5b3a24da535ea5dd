"""What a printed layer or model says of its config: a model says once what its layers have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from triton_analog.config import TorchInferenceRPUConfig

_common: ContextVar[dict[str, Any] | None] = ContextVar("common", default=None)
"""Every field of the config that most layers of the model have that is being printed."""


def of_layer(config: TorchInferenceRPUConfig) -> str:
    """For a layer's ``extra_repr``: what differs from the model's other layers, or how much from the defaults."""
    common = _common.get()
    if common is not None:
        differing = [f"{path}={value}" for path, value in config.every_field().items() if value != common[path]]
        return f"rpu_config: {', '.join(differing)}" if differing else ""
    changed, idle = config.changes(), config.without_effect()
    if not changed:
        return ""
    settings = f"{len(changed)} setting{'s' * (len(changed) > 1)}"
    return f"rpu_config: {settings}" + (f", {len(idle)} without effect" if idle else "")


@contextmanager
def in_common(layers: Iterable[Any]) -> Iterator[str]:
    """While a model is printed: a last line for what most of its ``layers`` have in common; empty inside another model."""
    configs: list[TorchInferenceRPUConfig] = [layer.rpu_config for layer in layers]
    if _common.get() is not None or not configs:
        yield ""
        return
    kinds = Counter(repr(config) for config in configs)
    (first, count), *_ = kinds.most_common(1)
    config = next(config for config in configs if repr(config) == first)
    whose = f"{count} of {len(configs)} analog layers" if len(kinds) > 1 else f"all {len(configs)} analog layers"
    token = _common.set(config.every_field())
    try:
        yield f"\nrpu_config of {whose}: {', '.join(config.marked_changes()) or 'the defaults'}"
    finally:
        _common.reset(token)
