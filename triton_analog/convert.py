"""Whole models from digital to analog layers and back."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
import weakref
from collections.abc import Callable, Collection
from operator import itemgetter
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from triton_analog.config import ConfigError, TorchInferenceRPUConfig, effects
from triton_analog.coverage.bypassed import check_calls, stop_watching, watch_first_forward
from triton_analog.coverage.weights import Coverage, describe, measure
from triton_analog.hints import did_you_mean
from triton_analog.nn.base import AnalogLayerBase
from triton_analog.nn.containers import AnalogSequential, AnalogWrapper, check_names
from triton_analog.nn.conv import AnalogConv1d, AnalogConv2d, AnalogConv3d
from triton_analog.nn.experts import experts_in
from triton_analog.nn.hf_conv1d import AnalogHFConv1D
from triton_analog.nn.linear import AnalogLinear
from triton_analog.nn.outside import note_layers
from triton_analog.nn.parts import is_managed, refuse_parts
from triton_analog.nn.programmed import refuse_chips
from triton_analog.nn.rnn import AnalogRNN
from triton_analog.nn.settings import check_config
from triton_analog.surroundings.adapters import adapter_modules
from triton_analog.surroundings.dispatched import put_hook, take_hook
from triton_analog.surroundings.obstacles import (
    ADD_THE_CLASS,
    Obstacle,
    is_quantized,
    obstacle_around,
    obstacle_of,
    obstacle_of_subclass,
)

logger = logging.getLogger(__name__)

CONVERSION_MAP: dict[type[nn.Module], Any] = {
    nn.Linear: AnalogLinear,
    nn.Conv1d: AnalogConv1d,
    nn.Conv2d: AnalogConv2d,
    nn.Conv3d: AnalogConv3d,
    nn.Sequential: AnalogSequential,
    nn.GRU: AnalogRNN,
    nn.LSTM: AnalogRNN,
    nn.RNN: AnalogRNN,
}
"""The analog class of every torch class that :func:`convert_to_analog` replaces; it has ``from_digital(module, config)``
and ``to_digital(module)``."""


def default_conversion_map(model: nn.Module) -> dict[type[nn.Module], Any]:
    """:data:`CONVERSION_MAP`, Hugging Face's Conv1D if anything has imported it (only then can a model have one), and the
    classes of experts in ``model``."""
    hugging_face = sys.modules.get("transformers.pytorch_utils")
    classes = CONVERSION_MAP | experts_in(model)
    return classes if hugging_face is None else classes | {hugging_face.Conv1D: AnalogHFConv1D}


ConfigFunction = Callable[[str, nn.Module, TorchInferenceRPUConfig], TorchInferenceRPUConfig]

_DIGITAL_ONLY = (_ConvNd, nn.RNNBase, nn.RNNCellBase)
"""Layers with a matrix that tiles could hold: they are named where no analog class replaces them."""

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


# ---- To analog --------------------------------------------------------------------------------------------------------


def convert_to_analog(
    module: nn.Module,
    rpu_config: TorchInferenceRPUConfig,
    conversion_map: dict[type[nn.Module], Any] | None = None,
    specific_rpu_config_fun: ConfigFunction | None = None,
    module_name: str = "",
    ensure_analog_root: bool = True,
    exclude_modules: Collection[str] | str | None = None,
    inplace: bool = False,
    verbose: bool = False,
    check: Any = None,
    convert_adapters: bool = False,
) -> Any:
    """``module`` with its torch layers replaced by analog ones.

    Parameters keep their values, ``requires_grad``, device and dtype; tied parameters stay tied and shared modules shared;
    training mode, hooks, and attributes and buffers that were added to a layer stay. With ``inplace=True`` the parameters
    are the very same objects. Modules that are analog already stay as they are.

    Subclasses of a class in the map are not replaced, as their own forward would be lost, nor are layers whose forward was
    replaced on the instance, nor weights that are empty or computed by a hook or parametrization, nor
    ``nn.MultiheadAttention``, which calls its projections as functions, nor what is quantized, scripted, compiled, sharded or
    offloaded: convert first. One warning names them all with the remedies, the layers without an analog class, and modules
    with matrices of their own (parameters of two or more dimensions, but for embeddings, norms and tables), and says what share
    of the weights is on tiles; :func:`triton_analog.analog_summary` says it at any time. Hooks of accelerate that do not
    offload move to the analog layers. Everything is checked before anything is changed.

    Adapters of Hugging Face's PEFT stay digital beside the analog layers, which another warning says. Where such a model has a
    layer frozen, its input ranges and learned clip are frozen too.

    A layer whose parent reads its weight and multiplies with it itself never computes. The first training forward of the
    result, or the first step of an optimizer of this package, warns of such layers; ``check`` finds them at once.

    Args:
        module: The model, or a single layer.
        rpu_config: What to simulate; every layer gets a copy.
        conversion_map: Analog class by exact torch class, in place of :data:`CONVERSION_MAP` (to which Hugging Face's
            ``Conv1D`` is added, and the experts of its models: :class:`~triton_analog.nn.AnalogExperts`).
        specific_rpu_config_fun: ``(full name, module, copy of rpu_config) -> config`` chooses the config of each layer.
        module_name: Name of ``module`` itself, the prefix of all full names.
        ensure_analog_root: Give the result the methods of an analog container (:class:`AnalogWrapper`) if it has none.
        exclude_modules: Full names of modules to leave digital, with everything below them, or a single one. A module that
            is shared is left digital under all its names.
        inplace: Change ``module`` itself instead of a deep copy; layers that were replaced lose their tensors.
        verbose: Print every replacement.
        check: A sample of inputs: a tensor, a tuple of positional arguments, a mapping of keyword arguments, or
            ``(args, kwargs)``. ``module`` runs on it once before it is converted, in evaluation mode and without gradients,
            and one warning names the layers that are not called: those whose weight their parent reads, and those that
            this sample does not reach.
        convert_adapters: Convert the layers of PEFT's adapters (``lora_A``, ``lora_B``, ...) too.

    Returns:
        The converted model. It is the object ``module`` if ``inplace`` and ``module`` itself was not replaced.

    Raises:
        ConfigError: a config is not valid.
        ValueError: ``exclude_modules`` holds a name that is not in the model, or a layer to convert is sharded already.
        TypeError: an argument of another type, or a root whose own methods an :class:`AnalogWrapper` would hide.
    """
    if not isinstance(module, nn.Module):
        swapped = isinstance(rpu_config, nn.Module)
        remedy = "swap the two: convert_to_analog(model, config)" if swapped else "a torch.nn.Module is needed"
        raise TypeError(f"module: got {type(module).__name__}; {remedy}")
    check_config(rpu_config)
    refuse_chips(module, "a conversion")
    classes = default_conversion_map(module) if conversion_map is None else conversion_map
    _check_map(classes)
    _refuse_sharded(module, module_name, classes, _find_excluded(module, module_name, exclude_modules))
    around = obstacle_around(module)
    if around is not None:
        name = module_name or "(root)"
        warnings.warn(
            f"convert_to_analog left the model digital. {name}: {around.reason}. {around.remedy}", stacklevel=2
        )
        return module
    if not inplace:
        module = copy.deepcopy(module)
    excluded = _find_excluded(module, module_name, exclude_modules)
    adapters = adapter_modules(module)
    layers, left = select(module, module_name, classes, excluded)
    of_adapters = [] if convert_adapters else [name for name, layer in layers if id(layer) in adapters]
    if adapters and not convert_adapters:
        excluded |= adapters
        layers, left = select(module, module_name, classes, excluded)
    configs = {
        id(layer): _choose_config(name, layer, rpu_config, specific_rpu_config_fun)
        for name, layer in layers
        if not issubclass(classes[type(layer)], AnalogSequential)
    }
    chosen = {id(layer): layer for _, layer in layers}
    if ensure_analog_root and id(module) not in chosen and not isinstance(module, AnalogLayerBase):
        check_names(module)

    def convert(name: str, old: nn.Module) -> nn.Module:
        if id(old) not in chosen:
            return old
        analog_class, hook = classes[type(old)], take_hook(old)
        new = analog_class.from_digital(old, configs.get(id(old)))
        carry_over(old, new)
        if adapters and not any(parameter.requires_grad for parameter in old.parameters(recurse=False)):
            new.requires_grad_(False)
        put_hook(new, hook)
        if inplace:
            getattr(analog_class, "move_to_meta", AnalogLayerBase.move_to_meta)(old)
        if verbose:
            print(f"{name or type(old).__name__}: {type(old).__name__} -> {analog_class.__name__}")
        return new

    told = effects.Told()  # of this model, whatever else the config is used for
    for config in configs.values():
        effects.share_told(config, told)
    effects.warn_of(configs.values(), told)
    coverage = measure(module, module_name, map(itemgetter(1), layers), dict(left), excluded)
    if coverage.digital:
        warnings.warn(_describe(coverage), stacklevel=2)
    read_by_parents: set[str] = set()
    if check is not None:
        converted = {name: layer for name, layer in layers if id(layer) in configs}
        read_by_parents = set(check_calls(module, converted, check))
    if of_adapters:
        warnings.warn(
            f"convert_to_analog left {len(of_adapters)} layer(s) of PEFT's adapters digital, such as {of_adapters[0]}; pass "
            "convert_adapters=True to convert them too",
            stacklevel=2,
        )
    root = replace_modules(module, module_name, convert, {})
    set_fast_paths(root)
    for name, below in root.named_modules(prefix=module_name):
        if name in read_by_parents:
            below.was_called = True  # nothing to say twice
    watch_first_forward(root)
    note_layers(root)
    return AnalogWrapper(root) if ensure_analog_root else root


def _refuse_sharded(
    module: nn.Module, module_name: str, classes: dict[type[nn.Module], Any], excluded: set[int]
) -> None:
    """A sharding library knows parameters as those of the layers that it has seen, and adds none later."""
    kinds = tuple(torch_class for torch_class, analog in classes.items() if not issubclass(analog, AnalogSequential))
    for name, layer in module.named_modules(prefix=module_name):
        analog = isinstance(layer, AnalogLayerBase)
        if isinstance(layer, kinds) and not analog and id(layer) not in excluded and is_managed(layer):
            raise ValueError(
                f"module: {name or '(root)'} is sharded already ({type(layer).__name__}), so that what has sharded it would not "
                "know the parameters of an analog layer in its place. The order is: build the model (on the meta device if it "
                "is large), convert_to_analog, tensor parallelism, torch.compile of the blocks, fully_shard or "
                "deepspeed.initialize, and load the weights. If it is to stay digital, name it in exclude_modules"
            )


def _check_map(classes: Any) -> None:
    good = isinstance(classes, dict) and all(
        isinstance(torch_class, type) and hasattr(analog_class, "from_digital")
        for torch_class, analog_class in classes.items()
    )
    if not good:
        raise TypeError(
            f"conversion_map: got {classes!r}; a dict from torch classes to analog classes with from_digital is needed, "
            "such as {torch.nn.Linear: AnalogLinear}"
        )


def _find_excluded(module: nn.Module, module_name: str, names: Any) -> set[int]:
    """The ids of all modules to leave alone."""
    if names is None:
        return set()
    names = [names] if isinstance(names, str) else names
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"exclude_modules: got {names!r}; a list of full module names is needed, such as ['encoder.head']"
        )
    modules = dict(module.named_modules(prefix=module_name, remove_duplicate=False))
    for name in names:
        if name not in modules:
            hint = did_you_mean(name, modules, "names are those of named_modules()", cutoff=0.4)
            raise ValueError(f"exclude_modules: no module is called {name!r}; {hint}")
    return {id(below) for name in names for below in modules[name].modules()}


def select(
    module: nn.Module, module_name: str, classes: dict[type[nn.Module], Any], excluded: set[int]
) -> tuple[list[tuple[str, nn.Module]], list[tuple[str, Obstacle]]]:
    """The modules to replace, and those that look as if they should be but cannot: ``(name, why)``."""
    layers, left = [], []
    skip = set(excluded)
    kinds = tuple(torch_class for torch_class, analog in classes.items() if not issubclass(analog, AnalogSequential))
    for name, candidate in module.named_modules(prefix=module_name):
        kind = type(candidate)
        if id(candidate) in skip:
            continue
        around = obstacle_around(candidate)
        if around is not None:
            skip.update(map(id, candidate.modules()))
            left.append((name, around))
        elif isinstance(candidate, AnalogLayerBase):
            if not candidate.IS_CONTAINER:
                skip.update(map(id, candidate.modules()))
        elif kind in classes:
            obstacle = _obstacle(candidate, classes[kind])
            if obstacle is None:
                layers.append((name, candidate))
            elif kind in kinds:
                left.append((name, obstacle))
        elif isinstance(candidate, nn.MultiheadAttention):
            skip.update(map(id, candidate.modules()))
            left.append((name, Obstacle(f"{kind.__name__} calls its projections as functions", ADD_THE_CLASS)))
        elif issubclass(kind, kinds) or is_quantized(candidate):
            left.append((name, obstacle_of_subclass(candidate)))
        elif isinstance(candidate, _DIGITAL_ONLY):
            left.append((name, Obstacle(f"no analog class for {kind.__name__}", ADD_THE_CLASS)))
    return layers, left


def _obstacle(module: nn.Module, analog_class: Any) -> Obstacle | None:
    """Why ``module``, whose class has an analog one, cannot be replaced."""
    try:
        getattr(analog_class, "find_layout", id)(module)
    except ValueError as error:
        return Obstacle(str(error), ADD_THE_CLASS)
    return obstacle_of(module)


def _choose_config(
    name: str, layer: nn.Module, rpu_config: TorchInferenceRPUConfig, function: ConfigFunction | None
) -> TorchInferenceRPUConfig:
    """This layer's own copy of the config, as the user's function changed it."""
    config = copy.deepcopy(rpu_config)
    if function is None:
        return config
    try:
        return check_config(function(name, layer, config))
    except ConfigError as error:
        raise ConfigError(f"specific_rpu_config_fun for {name!r}: {error}") from error


def _describe(coverage: Coverage) -> str:
    remedies = dict.fromkeys(weights.remedy for weights in coverage.digital)
    return (
        f"convert_to_analog left {len(coverage.digital)} module(s) digital, and {coverage.percentage}. "
        f"{'; '.join(describe(coverage.digital))}. {' '.join(remedies)}"
    )


# ---- To digital -------------------------------------------------------------------------------------------------------


def convert_to_digital(
    module: nn.Module, conversion_set: set[type[nn.Module]] | None = None, module_name: str = "", inplace: bool = False
) -> Any:
    """``module`` with its analog layers replaced by torch ones and its analog wrappers taken off.

    Weights and biases stay, with ties, sharing, mode, hooks and what was added to a layer; input ranges, learned clips and
    configs are left behind.

    Args:
        module: The model, or a single layer.
        conversion_set: The analog classes to replace; default: every one that can be (has ``to_digital``).
        module_name: Name of ``module`` itself, the prefix of the names in the log.
        inplace: Change ``module`` itself instead of a deep copy.

    Raises:
        TypeError: ``conversion_set`` is no set of classes with ``to_digital``, or ``module`` is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {type(module).__name__}; a torch.nn.Module is needed")
    if conversion_set is not None and not (
        isinstance(conversion_set, set | frozenset) and all(hasattr(kind, "to_digital") for kind in conversion_set)
    ):
        raise TypeError(f"conversion_set: got {conversion_set!r}; a set of analog classes with to_digital is needed")
    refuse_chips(module, "a conversion")
    refuse_parts(module, "convert_to_digital")
    if not inplace:
        module = copy.deepcopy(module)

    def convert(name: str, old: nn.Module) -> nn.Module:
        if isinstance(old, AnalogWrapper):
            return AnalogWrapper.to_digital(old)
        can_be = isinstance(old, AnalogLayerBase) and hasattr(old, "to_digital")
        if not can_be if conversion_set is None else conversion_set.isdisjoint(_classes_of(old)):
            return old
        kind: Any = type(old)
        hook = take_hook(old)
        new = kind.to_digital(old)
        carry_over(old, new, skip={"forward", *getattr(old, "ANALOG_NAMES", ())})
        put_hook(new, hook)
        logger.debug("%s: %s -> %s", name, kind.__name__, type(new).__name__)
        return new

    root = replace_modules(module, module_name, convert, {})
    set_fast_paths(root)
    stop_watching(root)
    note_layers(root)
    return root


def _classes_of(module: nn.Module) -> set[type]:
    """The class of ``module``, and what that was derived from a user's."""
    return {type(module), getattr(module, "_base", type(module))}


# ---- Shared -----------------------------------------------------------------------------------------------------------


def replace_modules(
    module: nn.Module,
    name: str,
    convert: Callable[[str, nn.Module], nn.Module],
    done: dict[int, tuple[nn.Module, nn.Module]],
) -> nn.Module:
    """``convert(name, module)`` for ``module`` and everything below it, each module once; returns the new root."""
    if id(module) not in done:
        new = convert(name, module)
        done[id(module)] = (module, new)  # the old one too: an id is only unique while its object lives
        for child_name, child in list(new._modules.items()):
            if child is not None:
                new_child = replace_modules(child, f"{name}.{child_name}" if name else child_name, convert, done)
                if new_child is not child:
                    new._modules[child_name] = new_child
    return done[id(module)][1]


def carry_over(old: nn.Module, new: nn.Module, skip: Collection[str] = ()) -> None:
    """Give ``new`` the hooks of ``old`` and, without the names in ``skip``, what was added to it."""
    # The same dictionaries, so that the handles of the hooks can still remove them.
    new.__dict__.update({hooks: old.__dict__[hooks] for hooks in _HOOKS})
    if not (isinstance(new, type(old)) or isinstance(old, type(new))):
        return  # two layouts: the rest of the old module is part of its own
    for hooks in _STATE_HOOKS:
        old.__dict__[hooks].update(new.__dict__[hooks])
        new.__dict__[hooks] = old.__dict__[hooks]
    hook: Any
    for hook in new._load_state_dict_pre_hooks.values():
        if hook.with_module:  # torch hands the hook the module that it was registered on
            hook.module = weakref.ref(new)
    for registry in ("_parameters", "_buffers", "_modules"):
        for name, value in old.__dict__[registry].items():
            if name not in skip:
                new.__dict__[registry].setdefault(name, value)
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set.difference(skip)
    for name, value in vars(old).items():
        if name not in skip:
            new.__dict__.setdefault(name, value)


def set_fast_paths(root: nn.Module) -> None:
    """Keep torch's fused evaluation of transformer layers, which bypasses sublayers, to those without analog layers."""
    for layer in root.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            act = layer.activation
            if any(isinstance(below, AnalogLayerBase) for below in layer.modules()):
                layer.activation_relu_or_gelu = 0
            elif act is nn.functional.relu or isinstance(act, nn.ReLU):
                layer.activation_relu_or_gelu = 1
            elif act is nn.functional.gelu or isinstance(act, nn.GELU):
                layer.activation_relu_or_gelu = 2
