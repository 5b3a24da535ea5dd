"""Classes made of a class of this package and a user's: an instance of the user's takes on what ours adds."""

from __future__ import annotations

import types
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import nn


class Derived(nn.Module):
    """What a class of this package needs so that :func:`derived_class` can join others to it.

    Instances are copied and pickled in the way of their original class.
    """

    _original: ClassVar[type[nn.Module]]
    _base: ClassVar[type[Derived]]
    PREFIX: ClassVar[str] = ""
    """What the names of derived classes start with, before the name of the original."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class made here cannot be found by name, so the original is rebuilt in its own way and derived again.
        reduced: Any = super().__reduce_ex__(protocol)
        func, args, *rest = reduced
        func, *args = (self._original if value is type(self) else value for value in (func, *args))
        return (_rebuild, (self._base, func, tuple(args)), *rest)


_derived: WeakKeyDictionary[type[Derived], WeakValueDictionary[type[nn.Module], Any]] = WeakKeyDictionary()


def derived_class(base: type[Derived], original: type[nn.Module]) -> Any:
    """The subclass of ``base`` and ``original``: one per pair of class objects, as two classes may share a name."""
    known = _derived.setdefault(base, WeakValueDictionary())
    derived = known.get(original)
    if derived is None:
        body = {
            "__module__": original.__module__,
            "__qualname__": f"{base.__qualname__}[{original.__qualname__}]",
            "__doc__": original.__doc__,
            "_original": original,
            "_base": base,
        }
        name = base.PREFIX + original.__name__
        derived = types.new_class(name, (base, original), {}, lambda space: space.update(body))
        known[original] = derived
    return derived


def _rebuild(base: type[Derived], func: Any, args: tuple[Any, ...]) -> Any:
    """Recreate an instance from the way in which its original class is recreated."""
    module = func(*args)
    module.__class__ = derived_class(base, type(module))
    return module
