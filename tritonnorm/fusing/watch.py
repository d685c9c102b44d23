"""The attributes that code reads, and their values in a form that every call can compare."""

from __future__ import annotations

import enum
import types
from typing import Any

import torch
from torch import Tensor, fx, nn

_ATOMS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.memory_format,
    type(...),
    types.FunctionType,
    types.BuiltinFunctionType,
    type,
)


class Unwatched(Exception):
    """A value of a kind that may change unseen; the message is its kind."""


class Same:
    """Stands for one object, whatever is inside."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Absent:
    """Stands for an attribute that is not there."""


class OfClass:
    """Stands for a method that the object has from its class."""


def is_still(thing: Any, name: str, frozen: Any) -> bool:
    """Whether an attribute is what was frozen.

    Raises:
        Unwatched: the value could change inside.
    """
    if frozen is OfClass:
        return name not in thing.__dict__
    value = getattr(thing, name, Absent)
    if frozen is Tensor or frozen is Absent:
        return isinstance(value, Tensor) if frozen is Tensor else value is Absent
    if type(frozen) is Same:
        return value is frozen.value
    return bool(freeze(value) == frozen)


def freeze(value: Any) -> Any:
    """Something that is equal as long as the value is the same, and does not change with it.

    Raises:
        Unwatched: the value could change inside.
    """
    if isinstance(value, nn.Module):
        return value
    if type(value) in _ATOMS or isinstance(value, enum.Enum | type):
        return value
    if isinstance(value, torch.Size):
        return tuple(value)
    if type(value) in (list, tuple):
        return (type(value), *map(freeze, value))
    if type(value) is dict:
        return (dict, *((freeze(k), freeze(v)) for k, v in value.items()))
    raise Unwatched(f"a {type(value).__name__}")


class Spies:
    """Notes which attributes the code reads, of the modules and of objects that they hold.

    `reads` and the children among them that have children of their own are filled in.
    """

    def __init__(self, reads: dict[Any, Any], parents: dict[nn.Module, None]) -> None:
        self.reads, self.parents = reads, parents
        self.plain: list[tuple[Any, type]] = []

    def __enter__(self) -> Spies:
        return self

    def __exit__(self, *_: object) -> None:
        for thing, plain in self.plain:
            object.__setattr__(thing, "__class__", plain)

    def watch(self, thing: Any) -> bool:
        """Watch an object from now on; False if its class does not allow it."""
        if any(thing is watched for watched, _ in self.plain):
            return True
        plain, note = type(thing), self._note
        asks = hasattr(plain, "__getattr__")  # which is called where the attribute is not found

        class Spy(plain):  # type: ignore[misc, valid-type]
            def __getattribute__(self, name: str) -> Any:
                try:
                    value = super().__getattribute__(name)
                except AttributeError:
                    if self is thing and not asks:
                        note(self, name, Absent)
                    raise
                if self is thing:
                    note(self, name, value)
                return value

            def __getattr__(self, name: str) -> Any:
                try:
                    value = super().__getattr__(name)
                except AttributeError:
                    if self is thing:
                        note(self, name, Absent)
                    raise
                if self is thing:
                    note(self, name, value)
                return value

        Spy.__name__, Spy.__module__ = plain.__name__, plain.__module__
        Spy.__qualname__ = plain.__qualname__
        if not asks:
            del Spy.__getattr__
        try:
            object.__setattr__(thing, "__class__", Spy)
        except TypeError:
            return False
        self.plain.append((thing, plain))
        return True

    def _note(self, thing: Any, name: str, value: Any) -> None:
        if issubclass(type(value), fx.Proxy):
            return  # set by the code itself, which is seen afterwards
        if name.startswith("__") or (isinstance(thing, nn.Module) and name in _INTERNAL):
            return
        if getattr(value, "__self__", None) is thing:
            if getattr(nn.Module, name, None) is not getattr(type(thing), name, None):
                self.reads[id(thing), name] = (thing, name, OfClass)
            return
        if value is not None and isinstance(thing, nn.Module):
            if thing.__dict__["_modules"].get(name) is value:
                if value._modules or isinstance(value, _CONTAINERS):
                    self.parents[value] = None  # its children are compared as a whole
                self.watch(value)
                return
            if any(thing.__dict__[t].get(name) is value for t in ("_parameters", "_buffers")):
                self.reads[id(thing), name] = (thing, name, Tensor)  # it is read in every call
                return
        try:
            frozen = value if value is Absent else freeze(value)
        except Unwatched as kind:
            if not hasattr(value, "__dict__") or callable(value) or not self.watch(value):
                text = f"its code reads `{name}`, {kind}, which may change"
                raise Unwatched(text) from None
            frozen = Same(value)
        self.reads[id(thing), name] = (thing, name, frozen)


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_INTERNAL = frozenset(nn.Module().__dict__) - {"training"} | {"_compiled_call_impl"}
