"""Copies of weights in higher precision ("master weights") that an optimizer steps in place of a model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from triton_analog.nn.parts import is_stepped_elsewhere, read_master, write_master


class Masters(NamedTuple):
    """The masters of some weights."""

    has: Callable[[Tensor], bool]
    """Whether this weight has a master."""
    read: Callable[[Tensor], Tensor]
    """Its master, or a copy of that, in the shape of the weight."""
    write: Callable[[Tensor, Tensor], object]
    """Store a changed :attr:`read`."""
    lasting: bool
    """Whether :attr:`read` is the master itself, the same tensor after each step, so that there is nothing to :attr:`write`."""


def given_masters(master: Any, weights: Iterable[Tensor], optimizer: Optimizer) -> Masters:
    """Those in the user's mapping from weight to master.

    Raises:
        TypeError: ``master`` is no mapping between tensors.
        ValueError: a key is no weight or input range of an analog layer, a master has another shape, or ``optimizer`` does not
            step it.
    """
    if not isinstance(master, Mapping) or not all(isinstance(t, Tensor) for pair in master.items() for t in pair):
        raise TypeError(
            f"master: got {type(master).__name__}; a mapping from the weight (or input range) of an analog layer to the tensor "
            "that the optimizer steps in its place is needed, such as {layer.weight: its fp32 copy}"
        )
    known = {id(weight) for weight in weights}
    memory = {_memory(parameter) for parameter in held(optimizer)}
    for weight, copy in master.items():
        if id(weight) not in known:
            raise ValueError(
                f"master: got a key of shape {tuple(weight.shape)} that is not the weight of an analog layer of this model, "
                "or its input range; the keys are the parameters layer.weight and layer.input_range themselves"
            )
        if copy.shape != weight.shape:
            raise ValueError(
                f"master: got a copy of shape {tuple(copy.shape)} for a weight of shape {tuple(weight.shape)}; both must "
                "have one shape. Of a flat buffer, pass the view of its part"
            )
        if _memory(copy) not in memory:
            raise ValueError(
                f"master: got a copy of shape {tuple(copy.shape)} that lies in no parameter of {type(optimizer).__name__}, which "
                "so never steps it; pass the optimizer's own tensors, or views of them"
            )
    return _mapped({id(weight): copy for weight, copy in master.items()})


def found_masters(
    weights: Iterable[Tensor], model_parameters: Iterable[Tensor], optimizer: Optimizer
) -> Masters | None:
    """The masters of those of ``weights`` that ``optimizer`` does not hold itself; None if no weight has one.

    DeepSpeed's are known to DeepSpeed (all stages of ZeRO, and its bf16 and fp16 optimizers). Other masters are parameters
    of ``optimizer`` that are not of the model, and that rounded to the dtype of just one weight equal it.

    Raises:
        ValueError: more than one tensor may be the master of a weight, or one that of more weights.
    """
    held_here = {id(parameter) for parameter in held(optimizer)}
    weights = [weight for weight in weights if id(weight) not in held_here]
    if any(is_stepped_elsewhere(weight) for weight in weights):
        return Masters(is_stepped_elsewhere, read_master, write_master, lasting=False)  # type: ignore[arg-type]
    own = {id(parameter) for parameter in model_parameters}
    others = [parameter for parameter in held(optimizer) if id(parameter) not in own]
    found: dict[int, Tensor] = {}
    for weight in {id(weight): weight for weight in weights}.values():  # a tied one once
        equal = [other for other in others if _may_be_master(other, weight)]
        if len(equal) > 1 or any(copy is other for copy in found.values() for other in equal):
            raise ValueError(
                f"master: more than one copy that the optimizer steps equals a weight of shape {tuple(weight.shape)}, or more "
                "than one weight its copy; pass master={layer.weight: its copy, ...}"
            )
        if equal:
            found[id(weight)] = equal[0]
    return _mapped(found) if found else None


def may_step(optimizer: Optimizer, parameters: Iterable[Tensor]) -> bool:
    """Whether ``optimizer`` holds any of ``parameters``, or what may be a master of one."""
    tensors = held(optimizer)
    own = {id(tensor) for tensor in tensors}
    return any(
        id(parameter) in own
        or is_stepped_elsewhere(parameter)
        or any(_may_be_master(other, parameter) for other in tensors)
        for parameter in parameters
    )


def held(optimizer: Optimizer) -> list[Tensor]:
    """Every parameter in the groups of ``optimizer``."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _mapped(master: dict[int, Tensor]) -> Masters:
    return Masters(
        has=lambda weight: id(weight) in master,
        read=lambda weight: master[id(weight)],
        write=lambda weight, changed: None,
        lasting=True,
    )


@torch.no_grad()
def _may_be_master(other: Tensor, weight: Tensor) -> bool:
    if other.shape != weight.shape or torch.promote_types(other.dtype, weight.dtype) == weight.dtype:
        return False
    return torch.equal(other.to(weight), weight)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
