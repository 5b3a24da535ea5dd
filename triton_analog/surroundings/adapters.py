"""The parts of a model that belong to adapters of Hugging Face's PEFT. It is not imported: a model has none before it is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

_OF_THE_MODEL = ("prompt_encoder", "internal_xlora_classifier")
"""Children of PEFT's models, rather than of its layers, that are adapters."""


def adapter_modules(root: nn.Module) -> set[int]:
    """The ids of all modules at or below ``root`` that are adapters: LoRA's matrices and their like, prompt encoders.

    What PEFT's layers wrap is none, nor are the copies of whole layers that it trains (``modules_to_save``).
    """
    return {id(below) for adapter in _adapters(root) for below in adapter.modules()}


def _adapters(root: nn.Module) -> Iterator[nn.Module]:
    peft: Any = sys.modules.get("peft")
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None or tuners is None:
        return
    for module in root.modules():
        if isinstance(module, tuners.BaseTunerLayer):
            yield from (child for name, child in module.named_children() if name != "base_layer")
        elif isinstance(module, (peft.PeftModel, tuners.BaseTuner)):
            yield from (child for name, child in module.named_children() if name in _OF_THE_MODEL)
