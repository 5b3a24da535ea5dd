"""Gradients of operators, and operators under the transforms of ``torch.func``; and what else torch may do to a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_unwrapped, is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import FunctionalizeInterpreter, retrieve_current_functorch_interpreter
from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI

is_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether a call is inside of ``vmap``, ``grad`` or another transform of ``torch.func``."""


def forward_mode(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"triton_analog::{name} has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, dual numbers); use reverse "
        "mode, torch.autograd.grad or torch.func.grad, vjp and jacrev, or differentiate a digital copy of the model "
        "(convert_to_digital)"
    )


def in_place(name: str, changed: Iterable[str]) -> RuntimeError:
    return RuntimeError(
        f"triton_analog::{name} changes {' and '.join(changed)} in place, which transforms of torch.func (vmap, grad) cannot "
        "follow; call it outside of them"
    )


def batched_gradients(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"triton_analog::{name} takes no batch of gradients at once (is_grads_batched=True, vectorize=True); use torch.func.vjp "
        "with torch.func.vmap, torch.func.jacrev, or one gradient after the other"
    )


def refuse_tracing(name: str) -> None:
    """Nothing is traced for TorchScript, whose graphs have neither gradients nor the checks of a call.

    Raises:
        RuntimeError: something is.
    """
    if not torch._C._is_tracing():
        return
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            f"torch.onnx.export: ONNX has no operator for triton_analog::{name}; export a digital copy of the model "
            "(convert_to_digital), or keep the analog one with torch.export.export"
        )
    raise RuntimeError(
        f"torch.jit.trace: TorchScript cannot hold triton_analog::{name}; use torch.export.export, which keeps all of an analog "
        "model, or torch.compile"
    )


def _is_differentiated(x: Any) -> bool:
    """Whether autograd or any of the transforms around differentiates by ``x``."""
    while isinstance(x, Tensor):
        if x.requires_grad:
            return True
        x = get_unwrapped(x) if is_functorch_wrapped_tensor(x) else None
    return False


def needs_gradient(args: Iterable[Any]) -> bool:
    """Whether anything that is made of ``args`` has a gradient."""
    return torch.is_grad_enabled() and any(map(_is_differentiated, args))


class Gradient(torch.autograd.Function):
    """The gradient of an operator: ``forward`` calls it, ``setup_context`` keeps what the backward needs, of inputs and outputs
    alone, so that transforms of ``torch.func`` can take them apart. The backward consists of operators and of torch's.

    ``apply`` is for transforms. ``eager.apply`` does the same without them, in a fraction of the time on the host.
    """

    NAME: ClassVar[str]
    """Of the operator."""
    eager: ClassVar[type[torch.autograd.Function]]

    def __init_subclass__(cls) -> None:
        def forward(ctx: Any, *args: Any) -> Any:
            out = cls.forward(*args)
            cls.setup_context(ctx, args, out)
            return out

        parts = {"forward": forward, "backward": cls.backward, "jvp": cls.jvp}
        cls.eager = type(cls.__name__, (torch.autograd.Function,), {k: staticmethod(v) for k, v in parts.items()})

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> Any:
        raise forward_mode(cls.NAME)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """One call after the other: what a batch of them gives is what each would give alone."""
        given = list(zip(args, in_dims, strict=True))
        outs = [
            cls.apply(*[arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in given])
            for i in range(info.batch_size)
        ]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        stacked = [torch.stack(parts) for parts in zip(*outs, strict=True)]
        return tuple(stacked), (0,) * len(stacked)


class NoGradient(Gradient):
    """Of an operator, the first argument, without a gradient."""

    NAME = "(any)"

    @staticmethod
    def forward(operator: Any, *args: Any) -> Any:
        out = operator(*args)
        return tuple(out) if isinstance(out, list) else out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[0].name

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"triton_analog::{ctx.name} has no gradient (there are no gradients of gradients); detach its inputs or "
            "call it under torch.no_grad()"
        )

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> Any:
        raise forward_mode(ctx.name)


def transformed(operator: Any, args: tuple[Any, ...]) -> Any:
    """``operator(*args)`` under the transforms that are active.

    Raises:
        RuntimeError: it changes an argument in place, which they cannot follow.
    """
    if operator.mutates:
        raise in_place(operator.name, operator.mutates)
    interpreter = retrieve_current_functorch_interpreter()
    if interpreter.key() == TransformType.Functionalize:
        assert isinstance(interpreter, FunctionalizeInterpreter)
        levels = FunctorchFunctionalizeAPI(interpreter)
        with levels.redispatch_to_next():
            return levels.wrap_tensors(operator(*levels.unwrap_tensors(args)))
    if operator.gradient is not None and needs_gradient(args):
        return operator.gradient.apply(*args)
    return NoGradient.apply(operator, *args)
