"""What compilers are told of functions, without importing a compiler for it, as torch's own decorators would."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def run_while_tracing(function: F) -> F:
    """Let compilers run ``function`` while they trace and take its result for a constant
    (``torch.compiler.assume_constant_result``)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside_of_graphs(function: F) -> F:
    """Let compilers leave ``function``, and all that it calls, to Python (``torch.compiler.disable``)."""
    disabled = None

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return call  # type: ignore[return-value]
