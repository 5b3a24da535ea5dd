"""Layers on which Hugging Face's accelerate has put hooks, by replacing the forward of the instance."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def hook_of(module: nn.Module) -> Any:
    """The hook of accelerate on ``module``; None without one."""
    return vars(module).get("_hf_hook")


def hides_own_forward(module: nn.Module) -> bool:
    """Whether the forward below the hook on ``module`` is not that of its class either."""
    return getattr(vars(module).get("_old_forward"), "__func__", None) is not type(module).forward


def is_movable(hook: Any) -> bool:
    """Whether another layer can have ``hook`` instead: it only moves inputs and whole layers, and keeps no weights itself."""
    hooks: Any = sys.modules.get("accelerate.hooks")
    if hooks is None:
        return False
    if type(hook) is hooks.SequentialHook:
        return all(map(is_movable, hook.hooks))
    return type(hook) is hooks.CpuOffload or (type(hook) is hooks.AlignDevicesHook and not hook.offload)


def take_hook(module: nn.Module) -> Any:
    """Take the hook off ``module``, whose forward is again that of its class; None if there is none."""
    hook = hook_of(module)
    if hook is not None:
        sys.modules["accelerate.hooks"].remove_hook_from_module(module)
        vars(module).pop("forward", None)  # which is left on the instance
    return hook


def put_hook(module: nn.Module, hook: Any) -> None:
    """Put ``hook``, that of another layer, on ``module``."""
    if hook is not None:
        for one in getattr(hook, "hooks", [hook]):
            one.tied_params_map = None  # by the addresses of tensors, which in a copy are others
        sys.modules["accelerate.hooks"].add_hook_to_module(module, hook)
