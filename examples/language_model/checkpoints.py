"""Checkpoints: weights, ranges and counters, and the optimizer's state, in safetensors; whole, or not there at all.

What is random is no part of them: noise and order of the data are functions of seed and step.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

MODEL, OPTIMIZER, PROGRESS = "model.safetensors", "optimizer.safetensors", "progress.json"


def save(folder: Path, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any], first: bool) -> None:
    """A checkpoint of step ``progress["step"]``, and no older one. All processes take part, and the ``first`` one writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state, stepped = get_state_dict(model, optimizer, options=options)
    if not first:
        return
    tied = {name.removeprefix("module.") for name in _tied(model)}
    weights = {name: tensor.contiguous() for name, tensor in state.items() if name not in tied}
    moments = {f"{name}.{key}": value for name, own in stepped["state"].items() for key, value in own.items()}
    target = folder / f"step-{progress['step']:07}"
    part = folder / "part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(weights, part / MODEL, {"format": "pt"})
    save_file(moments, part / OPTIMIZER)
    unwrapped: Any = getattr(model, "module", model)
    unwrapped.config.save_pretrained(part)  # so that triton_analog.integrations.transformers.from_pretrained reads it
    (part / PROGRESS).write_text(json.dumps(progress, indent=1), "utf-8")
    older = [path for path in _all(folder) if path != target]
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    for path in older:
        shutil.rmtree(path)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder``."""
    return max(_all(folder), default=None)


def progress_of(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / PROGRESS).read_text("utf-8"))


def load(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Go on from ``checkpoint``, on any number of processes."""
    options = StateDictOptions(full_state_dict=True)
    own = get_optimizer_state_dict(model, optimizer)  # makes the states, by a step of learning rate 0
    state: dict[str, Any] = {}
    for name, tensor in load_file(checkpoint / OPTIMIZER).items():
        parameter, _, key = name.rpartition(".")
        state.setdefault(parameter, {})[key] = tensor
    load_model(checkpoint, model)
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": own["param_groups"]}, options=options)


def load_model(checkpoint: Path, model: nn.Module) -> None:
    """The model of ``checkpoint``, into one that was made in the same way."""
    state: dict[str, Any] = dict(load_file(checkpoint / MODEL))
    tied = _tied(model)
    state |= {name.removeprefix("module."): state[kept.removeprefix("module.")] for name, kept in tied.items()}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _tied(model: nn.Module) -> dict[str, str]:
    """Names of parameters that have another name too, and that."""
    kept: dict[int, str] = {id(parameter): name for name, parameter in model.named_parameters()}
    every: list[tuple[str, Tensor]] = list(model.named_parameters(remove_duplicate=False))
    return {name: kept[id(parameter)] for name, parameter in every if kept[id(parameter)] != name}
