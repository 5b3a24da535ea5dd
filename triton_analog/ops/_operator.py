"""One declaration of an operator: its launcher's parameters are its schema."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from triton_analog.launch import runs_kernel
from triton_analog.launch.plan import picker, planned
from triton_analog.ops._transforms import (
    Gradient,
    NoGradient,
    batched_gradients,
    forward_mode,
    is_transforming,
    refuse_tracing,
    transformed,
)

_LIBRARY = torch.library.Library("triton_analog", "FRAGMENT")

_TYPES = {
    "None": "()",
    "Tensor": "Tensor",
    "list[Tensor]": "Tensor[]",
    "Tensor | None": "Tensor?",
    "int": "SymInt",
    "float": "float",
    "bool": "bool",
    "str": "str",
    "Sequence[int]": "SymInt[]",
    "Sequence[float]": "float[]",
    "Sequence[int] | None": "SymInt[]?",
    "torch.dtype": "ScalarType",
    "torch.dtype | None": "ScalarType?",
}


def _schema(
    name: str,
    function: Callable[..., Any],
    mutates: tuple[str, ...] = (),
    types: Mapping[str, str] | None = None,
    records: Mapping[str, type] | None = None,
) -> tuple[str, dict[str, str]]:
    """The operator's schema, and its parameters' types by name; a launcher's ``config`` is not one of them."""
    types = {**_TYPES, **(types or {})}
    signature = inspect.signature(function)
    kinds: dict[str, str] = {}
    for parameter in signature.parameters.values():
        record = (records or {}).get(parameter.annotation)
        if record is not None:
            kinds |= {field: types[kind.__forward_arg__] for field, kind in record.__annotations__.items()}
        elif parameter.name != "config":
            kinds[parameter.name] = types[parameter.annotation]
    declared = []
    for parameter_name, kind in kinds.items():
        if parameter_name in mutates:
            kind = kind.replace("Tensor", f"Tensor({chr(ord('a') + mutates.index(parameter_name))}!)")
        # Only where Python takes the call: a kernel's launcher is called with every argument.
        given = signature.parameters.get(parameter_name)
        may_be_left_out = records is not None and given is not None and given.default is None
        declared.append(f"{kind} {parameter_name}{'=None' * may_be_left_out}")
    returned = signature.return_annotation
    result = types.get(returned) or f"({returned.removeprefix('tuple[').removesuffix(']')})"
    return f"{name}({', '.join(declared)}) -> {result}", kinds


def _by_name(function: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """``function``, called with those of the operator's arguments that it has parameters for.

    Raises:
        TypeError: it has another parameter without a default.
    """
    positional, keywords = [], []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in names:
            if parameter.default is parameter.empty:
                raise TypeError(f"{function.__qualname__}: {parameter.name} is no parameter of the operator {names}")
        elif parameter.kind is parameter.KEYWORD_ONLY:
            keywords.append((parameter.name, names.index(parameter.name)))
        else:
            positional.append(names.index(parameter.name))

    def call(*args: Any) -> Any:
        return function(*[args[i] for i in positional], **{name: args[i] for name, i in keywords})

    return call


_ALL_FLOATS = frozenset({float})


def _is_eager(tensors: Sequence[Any]) -> bool:
    """Whether nothing but the operators' own code would see a call: no mode, profiler or kind of tensor."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch.autograd._profiler_enabled()
        and not tensors[0].is_meta
        and not is_legacy_batchedtensor(tensors[0])
        and not torch.jit.is_tracing()
        # In a list, as a generator takes twice as long.
        and all([x is None or _is_plain(x) for x in tensors])  # noqa: C419
    )


def _is_plain(x: Any) -> bool:
    """Whether the memory of a tensor holds its numbers: not negated (``z.conj().imag``) nor zeros that have none."""
    return (x.__class__ is Tensor or x.__class__ is Parameter) and not x.is_neg() and not x._is_zerotensor()


def _refuse_tangents(name: str, tensors: Sequence[Any]) -> None:
    """No tensor carries a tangent, which would be lost.

    Raises:
        NotImplementedError: one does.
    """
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x, level=0).tangent is not None for x in tensors):
        raise forward_mode(name)


class Operator:
    """``torch.ops.triton_analog.<name>``, called with positional arguments.

    In eager mode its code is called at once; torch's dispatcher takes longer than a small kernel.
    """

    gradient: type[Gradient] | None = None
    """Takes the operator's arguments. Without it no gradient flows, and a backward raises."""

    def __init__(
        self,
        name: str,
        launch: Callable[..., Any],
        reference: Callable[..., Any],
        fake: Callable[..., Any] | None = None,
        *,
        mutates: tuple[str, ...] = (),
        unless: Callable[[], bool] | None = None,
    ) -> None:
        """Define the operator.

        Args:
            name: Of the operation.
            launch: Its launcher. Names and annotations of its parameters are the schema's, but for ``config``; the first is a
                tensor.
            reference: Runs instead where no kernel does for the first argument
                (:func:`triton_analog.launch.runs_kernel`).
            fake: Empty results of the right shapes; None for an operator without results. It and ``reference`` take what they
                have parameters for, by name.
            mutates: Parameters that are changed in place.
            unless: Where this holds, the operator does nothing.
        """
        schema, kinds = _schema(name, launch, mutates)
        _LIBRARY.define(schema)
        names = tuple(kinds)
        is_tensor = ["Tensor" in kind for kind in kinds.values()]
        self.name, self.mutates = name, mutates
        self._tensors_of = picker(is_tensor)
        self._lists = [i for i, kind in enumerate(kinds.values()) if "[]" in kind]
        self._floats = [i for i, kind in enumerate(kinds.values()) if kind == "float"]
        self._floats_of = picker([kind == "float" for kind in kinds.values()])
        self._run_kernel, self._run_reference = planned(launch, is_tensor), _by_name(reference, names)
        self._unless, self._mutated = unless, [names.index(name) for name in mutates]
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, self._run_with_gradient, "Autograd")
        _LIBRARY.impl(name, lambda *args: transformed(self, args), "FuncTorchDynamicLayerFrontMode")
        fake_run = _by_name(fake, names) if fake else lambda *args: None
        torch.library.register_fake(f"triton_analog::{name}", fake_run, lib=_LIBRARY)
        self.overload = getattr(torch.ops.triton_analog, name).default

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args) if torch.compiler.is_dynamo_compiling() else self._run_with_gradient(*args)

    def _run_with_gradient(self, *args: Any) -> Any:
        if is_transforming():
            return transformed(self, args)
        tensors = self._tensors_of(args)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            if self.gradient is not None:
                return self.gradient.eager.apply(*args)
            return NoGradient.eager.apply(self, *args)
        _refuse_tangents(self.name, tensors)
        if _is_eager(tensors):
            if not _ALL_FLOATS.issuperset(map(type, self._floats_of(args))):  # the dispatcher would make them so
                args = tuple([float(arg) if i in self._floats else arg for i, arg in enumerate(args)])
            return self._run(*args)
        if is_legacy_batchedtensor(tensors[0]):
            raise batched_gradients(self.name)
        refuse_tracing(self.name)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    def _run(self, *args: Any) -> Any:
        if self._unless is not None and self._unless():
            return None
        for i in self._mutated:  # or a backward that needs the tensor as it was would not notice
            if args[i] is not None and not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])
        if not runs_kernel(args[0]):
            return self._run_reference(*args)
        for i in self._lists:
            if args[i].__class__ is list:  # the dispatcher's, which is not hashable
                args = (*args[:i], tuple(args[i]), *args[i + 1 :])
        return self._run_kernel(*args)


def composite(
    name: str,
    declared: Callable[..., Any],
    function: Callable[..., Any],
    types: Mapping[str, str],
    records: Mapping[str, type],
) -> Any:
    """``torch.ops.triton_analog.<name>``, which stands for ``function``: it is made of other operators, and its gradient of
    theirs.

    Compilers trace one call of it, whatever Python the function consists of.

    Args:
        name: Of the operator.
        declared: Its parameters are the operator's.
        function: Called with positional arguments.
        types: The schema's types for annotations of ``declared``.
        records: Named tuples among them, whose fields are parameters of the operator.
    """
    schema, _ = _schema(name, declared, types=types, records=records)
    _LIBRARY.define(schema)
    for key in ("CompositeImplicitAutograd", "FuncTorchDynamicLayerFrontMode"):
        _LIBRARY.impl(name, function, key)
    return getattr(torch.ops.triton_analog, name).default
