"""Whether a tuned configuration was found for the code that is here now."""

from __future__ import annotations

import hashlib
import inspect
import io
import sys
import tokenize
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from triton_analog.launch.space import Space
from triton_analog.launch.store import Entry

KERNEL_FUNCTIONS = (JITFunction, InterpretedFunction)
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE}
_BLOCKS = {tokenize.INDENT: "{", tokenize.DEDENT: "}"}


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _words(source: str) -> list[str]:
    """The tokens and blocks of a function, without comments, docstring and layout."""
    found = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in _LAYOUT]
    return [_BLOCKS.get(token.type, token.string) for token in found if not token.string.startswith('"""')]


def _add(function: Callable[..., Any], found: dict[str, str]) -> None:
    """``function`` and every kernel function and constant that it uses, itself or through others."""
    name = f"{function.__module__}.{function.__name__}"
    if name not in found:
        found[name] = " ".join(_words(inspect.getsource(function)))
        for used in function.__code__.co_names:
            value = function.__globals__.get(used)
            if isinstance(value, KERNEL_FUNCTIONS):
                _add(value.fn, found)
            elif isinstance(value, tl.constexpr) and not isinstance(value.value, bool):  # which says where it runs
                found[f"{used} in {name}"] = repr(value.value)


@cache
def code_hash(space: Space[Any]) -> str:
    """Of the kernels in the operation's files and all that they use; where they stand and comments do not matter."""
    found: dict[str, str] = {}
    for module in (sys.modules[space.config.__module__], *space.others):
        for value in vars(module).values():
            if isinstance(value, KERNEL_FUNCTIONS) and value.fn.__module__ == module.__name__:
                _add(value.fn, found)
    return _digest(found[name] for name in sorted(found))


@cache
def space_hash(space: Space[Any]) -> str:
    """Of the fields and the values they may have, and of the names of sizes and flags."""
    values = [f"{name}={tuple(allowed)}" for name, allowed in space.values.items()]
    return _digest([*values, *space.sizes, "", *space.flags])


def is_stale(space: Space[Any], entry: Entry) -> bool:
    """Whether kernels or space changed since the entry was found."""
    return (entry.source.get("code"), entry.source.get("space")) != (code_hash(space), space_hash(space))
