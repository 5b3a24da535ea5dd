"""Why a layer cannot be replaced by an analog one, and what to do about it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from triton_analog.surroundings.dispatched import hides_own_forward, hook_of, is_movable


class Obstacle(NamedTuple):
    """Of one layer, or of a module with all that is below it."""

    reason: str
    remedy: str


ADD_THE_CLASS = (
    "Add their classes to conversion_map to convert them, or their names to exclude_modules if this is intended."
)
_IF_INTENDED = "; name them in exclude_modules if this is intended."
_FIRST = "Convert the model first, and {} the analog one" + _IF_INTENDED

_WRAPPERS = {
    "FullyShardedDataParallel": ("is sharded by FSDP", "shard"),
    "DistributedDataParallel": ("synchronises just the parameters that it has seen", "wrap"),
    "OptimizedModule": ("is compiled by torch.compile", "compile"),
    "DeepSpeedEngine": ("is an engine of DeepSpeed", "hand DeepSpeed"),
}
"""Modules around a model that know its layers as they are, by the name of their class: why, and what to do after the
conversion."""


def obstacle_around(module: nn.Module) -> Obstacle | None:
    """Why nothing at or below ``module`` can be replaced."""
    if isinstance(module, torch.jit.ScriptModule):
        return Obstacle("it is a TorchScript module", _FIRST.format("script or trace"))
    for kind in type(module).__mro__:
        if kind.__name__ in _WRAPPERS and kind.__module__.partition(".")[0] in ("torch", "deepspeed"):
            reason, verb = _WRAPPERS[kind.__name__]
            return Obstacle(f"this {kind.__name__} {reason}", _FIRST.format(verb))
    return None


def obstacle_of(module: nn.Module) -> Obstacle | None:
    """Why ``module``, whose class has an analog one, cannot be replaced."""
    hook = hook_of(module)
    if hook is not None and not is_movable(hook):
        does = "offloads its weight" if getattr(hook, "offload", False) else "replaced its forward"
        return Obstacle(
            f"a hook of accelerate ({type(hook).__name__}) {does}",
            "Convert the model before it is dispatched: load it without device_map, or onto one device, convert it, and call "
            "accelerate's dispatch_model or load_checkpoint_and_dispatch with the analog model" + _IF_INTENDED,
        )
    if "forward" in vars(module) and (hook is None or hides_own_forward(module)):
        return Obstacle(
            "its forward was replaced on the instance",
            "Convert the model before something replaces a forward, or undo that (del layer.forward)" + _IF_INTENDED,
        )
    if getattr(module, "_compiled_call_impl", None) is not None:
        return Obstacle("it is compiled by layer.compile()", _FIRST.format("compile"))
    if _has_computed_weights(module):
        return Obstacle(
            "its weight is computed by a hook",
            "Make the weight a parameter first (torch.nn.utils.remove_weight_norm, remove_spectral_norm, prune.remove)"
            + _IF_INTENDED,
        )
    weight = module._parameters.get("weight")
    return None if weight is None else _obstacle_of_weight(weight)


def _obstacle_of_weight(weight: nn.Parameter) -> Obstacle | None:
    if hasattr(weight, "ds_id"):
        return Obstacle("its weight is partitioned by DeepSpeed's ZeRO stage 3", _FIRST.format("hand DeepSpeed"))
    if weight.numel() == 0:
        return Obstacle("its weight is empty", "Fill it first (a sharding library may have emptied it)" + _IF_INTENDED)
    kind = type(weight.data)
    if kind.__name__ == "DTensor":
        return Obstacle("its weight is sharded (a DTensor)", _FIRST.format("shard"))
    if kind not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        what = str(weight.dtype).removeprefix("torch.") if kind in (Tensor, nn.Parameter) else kind.__name__
        return Obstacle(f"its weight is quantized ({what})", _WITHOUT_QUANTIZATION)
    return None


_WITHOUT_QUANTIZATION = (
    "Load the model without quantization: tiles need the weights themselves, and config.modifier can quantize them"
    + _IF_INTENDED
)


def obstacle_of_subclass(module: nn.Module) -> Obstacle:
    """Why ``module``, of a subclass of a class that has an analog one, cannot be replaced."""
    kind = type(module)
    if is_parametrized(module):
        return Obstacle(
            "its weight is computed by a parametrization",
            "Make it a parameter first (torch.nn.utils.parametrize.remove_parametrizations)" + _IF_INTENDED,
        )
    if isinstance(module, LazyModuleMixin):
        return Obstacle(
            f"{kind.__name__} has no weight yet; run the model once before it is converted",
            "Run the model once, and convert it then" + _IF_INTENDED,
        )
    if is_quantized(module):
        return Obstacle(f"{kind.__name__} stores its weight quantized", _WITHOUT_QUANTIZATION)
    if kind.__name__.startswith("FSDP") and kind.__module__.startswith("torch."):
        return Obstacle("it is sharded by fully_shard", _FIRST.format("shard"))
    return Obstacle(f"{kind.__name__} is a subclass with a forward of its own", ADD_THE_CLASS)


def is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` is a layer with a weight of small integers: of bitsandbytes and its like, GPTQ, AWQ or torch."""
    weight = module._parameters.get("weight")
    integers = weight is not None and not weight.is_floating_point()
    package = type(module).__module__
    of_quantizer = package.partition(".")[0] in ("bitsandbytes", "torchao", "quanto", "hqq") or (
        package.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")) and hasattr(module, "_packed_params")
    )
    return integers or of_quantizer or isinstance(getattr(module, "qweight", None), Tensor)


def _has_computed_weights(module: nn.Module) -> bool:
    """Whether a hook makes a weight from parameters of longer names, as weight_norm, spectral_norm and pruning do."""
    return any(
        isinstance(value, Tensor) and any(parameter.startswith(f"{name}_") for parameter in module._parameters)
        for name, value in vars(module).items()
    )
