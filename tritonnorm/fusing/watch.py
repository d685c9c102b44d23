"""The attributes that code reads, and their values in a form that every call can compare."""

from __future__ import annotations

import enum
import importlib
import types
from dataclasses import dataclass
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


class Sized:
    """Stands for a parameter or buffer, which every call reads, of a shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def still(self, value: Any) -> bool:
        """Whether a value is such a tensor."""
        return isinstance(value, Tensor) and value.shape == self.shape


class OfClass:
    """Stands for a function or class that is found by name: a method of the class, a global.

    It is not pickled, since not all of them can be: whoever loads it has those of that time.
    """

    def __init__(self, value: Any = None) -> None:
        self.value = getattr(value, "__func__", value)

    def __reduce__(self) -> Any:
        return OfClass, ()

    def still(self, value: Any) -> bool:
        """Whether a value is the same function or class."""
        value = getattr(value, "__func__", value)
        if self.value is None:
            self.value = value
        return value is self.value


@dataclass(frozen=True)
class Global:
    """A module of Python, or a global object in it, by name: what can be pickled of it."""

    module: str
    name: str = ""

    def resolved(self) -> Any:
        """The module, or the object."""
        module = importlib.import_module(self.module)
        return getattr(module, self.name) if self.name else module


class Kind:
    """The class of a module, with its forward."""

    def __init__(self, kind: Any) -> None:
        self.kind, self.forward = kind, kind.forward

    def __reduce__(self) -> Any:
        return Kind, (self.kind,)

    def still(self, module: nn.Module) -> bool:
        """Whether a module is of the class, as it was."""
        return type(module) is self.kind and self.kind.forward is self.forward


def is_still(thing: Any, name: str, frozen: Any) -> bool:
    """Whether an attribute is what was frozen.

    Raises:
        Unwatched: the value could change inside.
    """
    value = getattr(thing, name, Absent)
    if type(frozen) in (Sized, OfClass):
        return bool(frozen.still(value))
    if frozen is Absent:
        return value is Absent
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
    if type(value) in (set, frozenset):
        return (type(value), frozenset(map(freeze, value)))
    if isinstance(value, dict):
        return (type(value), *((freeze(k), freeze(v)) for k, v in value.items()))
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
        if name.startswith("__") or (isinstance(thing, nn.Module) and name in _INTERNAL):
            return
        if isinstance(thing, nn.Module):  # a trace has stand-ins for parameters
            for table in ("_parameters", "_buffers"):
                if (tensor := thing.__dict__.get(table, {}).get(name)) is not None:
                    self.reads[id(thing), name] = (thing, name, Sized(tuple(tensor.shape)))
                    return
        if issubclass(type(value), fx.Proxy):
            return  # set by the code itself, which is seen afterwards
        if getattr(value, "__self__", None) is thing:
            if getattr(nn.Module, name, None) is not getattr(type(thing), name, None):
                self.reads[id(thing), name] = (thing, name, OfClass(value))
            return
        if isinstance(value, types.FunctionType) and name not in thing.__dict__:
            self.reads[id(thing), name] = (thing, name, OfClass(value))
            return
        if isinstance(thing, nn.Module) and thing.__dict__["_modules"].get(name, Absent) is value:
            if value is None:
                self.reads[id(thing), name] = (thing, name, None)
            else:
                if value._modules or isinstance(value, _CONTAINERS):
                    self.parents[value] = None  # its children are compared as a whole
                self.watch(value)
            return
        try:
            frozen = value if value is Absent else freeze(value)
        except Unwatched as kind:
            if not _open(value) or not self.watch(value):
                text = f"its code reads `{name}`, {kind}, which may change"
                raise Unwatched(text) from None
            frozen = Same(value)
        self.reads[id(thing), name] = (thing, name, frozen)


def _open(value: Any) -> bool:
    """Whether all that an object is lies in its attributes: its classes are written in Python."""
    bases = [c for c in type(value).__mro__ if c is not object]
    in_c = any(isinstance(m, types.MethodDescriptorType) for c in bases for m in vars(c).values())
    return not in_c and hasattr(value, "__dict__") and not callable(value)


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_INTERNAL = frozenset(nn.Module().__dict__) - {"training"} | {"_compiled_call_impl", "forward"}
