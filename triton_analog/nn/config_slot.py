"""A way in for loaders that set a layer's tensors one by one, past ``load_state_dict``, as Hugging Face's accelerate does."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

SLOT = "_extra_state"
"""The name of the config in a state dict, as torch gives it."""


class BuffersWithConfig(dict[str, Any]):
    """The buffers of a layer, with an empty slot for its config: what is put there becomes the config at once.

    Such a loader looks whether the name is one of a buffer, compares shapes with the attribute of that name, and puts its
    tensor in place of the old one. As the slot itself stays empty, nothing else takes it for a buffer: no device or average or
    rank ever gets it. Copies and pickles are ordinary dictionaries, which the layer wraps again.
    """

    def __init__(self, layer: Any, buffers: dict[str, Any]) -> None:
        super().__init__({**buffers, SLOT: None})
        self._layer = weakref.ref(layer)

    def __setitem__(self, name: str, value: Any) -> None:
        if name != SLOT:
            super().__setitem__(name, value)
        elif isinstance(value, Tensor):
            layer: Any = self._layer()
            layer.take_config(value)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)
