"""The names that transformers gives weights in files, which are not always those of its modules."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def as_in_model(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state``, as a file of ``model`` has it, by the names and in the layouts of the modules of ``model``.

    ``save_pretrained`` writes experts one by one, for example, that are stacked in the model. What is none of transformers'
    own is renamed as the module is to which it belongs.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    own = model.state_dict()
    found: dict[str, Tensor] = {}
    collected: dict[str, Any] = {}
    for key in sorted(state, key=_natural):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if key in own and name not in own:
            found[key] = state[key]
        elif pattern is None:
            found[name] = state[key]
        else:
            converter = collected.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            converter.add_tensor(name, key, pattern, state[key])
    for name, converter in collected.items():
        for target, value in converter.convert(name, model=model, config=model.config).items():
            found[target] = value[0] if isinstance(value, list) else value
    return found


def _natural(key: str) -> list[tuple[int, str]]:
    """Experts in the order of their numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]
