"""The attributes that code reads, and their values in a form that every call can compare."""

from __future__ import annotations

import enum
import types
from typing import Any

import torch
from torch import fx, nn

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


def is_still(value: Any, frozen: Any) -> bool:
    """Whether a value is what was frozen.

    Raises:
        Unwatched: the value could change inside.
    """
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
    """Notes which attributes the code reads, of the modules and of objects that they hold."""

    def __init__(self, reads: dict[Any, Any]) -> None:
        self.reads = reads
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

        class Spy(plain):  # type: ignore[misc, valid-type]
            def __getattribute__(self, name: str) -> Any:
                value = super().__getattribute__(name)
                if self is thing:
                    note(self, name, value)
                return value

            def __getattr__(self, name: str) -> Any:
                value = super().__getattr__(name)
                if self is thing:
                    note(self, name, value)
                return value

        Spy.__name__, Spy.__module__ = plain.__name__, plain.__module__
        Spy.__qualname__ = plain.__qualname__
        if not hasattr(plain, "__getattr__"):
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
        if name.startswith("__") or getattr(value, "__self__", None) is thing:
            return
        if isinstance(thing, nn.Module):
            if name in _INTERNAL:
                return
            tables = (thing.__dict__[table] for table in ("_modules", "_parameters", "_buffers"))
            if value is not None and any(table.get(name) is value for table in tables):
                return  # children are compared as a whole, tensors are read in every call
        try:
            frozen = freeze(value)
        except Unwatched as kind:
            if not hasattr(value, "__dict__") or callable(value) or not self.watch(value):
                text = f"its code reads `{name}`, {kind}, which may change"
                raise Unwatched(text) from None
            frozen = Same(value)
        self.reads[id(thing), name] = (thing, name, frozen)


_INTERNAL = frozenset(nn.Module().__dict__) - {"training"} | {"_compiled_call_impl"}
