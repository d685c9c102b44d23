"""What Python code may ask for besides the attributes of modules, as far as its names tell.

A trace sees attributes that are read. It does not see which class `type` gives, which is that of
its own stand-in, and it does not see globals. So the forwards of the traced classes are looked
through, with the methods and functions that they name.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

from tritonnorm.fusing.arguments import Refused
from tritonnorm.fusing.watch import Global, OfClass, Unwatched, freeze

_KNOWN = sys.stdlib_module_names | {"torch", "tritonnorm"}
_LOADS = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
_ATTRIBUTES = frozenset({"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"})
#: What gives a class or all attributes at once. A stand-in has others, and nobody could watch them.
_ASKING = {"type": "the class of a value", "vars": "all attributes of a value"}
_ASKED = {"__class__", "__dict__"}


def reads_of(
    walked: Iterable[nn.Module], reads: list[tuple[Any, str, Any]]
) -> Iterator[tuple[Any, str, Any]]:
    """What else the code may read, as (object, name, frozen value).

    Args:
        walked: the modules whose code it is.
        reads: the attributes that it was seen to read.

    Raises:
        Refused: the code asks for what a trace cannot tell.
    """
    kinds = dict.fromkeys(type(thing) for thing in (*walked, *(read[0] for read in reads)))
    everywhere: set[str] = set()
    for function in _functions(list(kinds)):
        names, attributes = _names(function.__code__)
        everywhere |= attributes
        for asked in (names - function.__globals__.keys()) & _ASKING.keys() | attributes & _ASKED:
            raise Refused(f"its code asks for {_ASKING.get(asked, asked)}")
        module = function.__globals__.get("__name__", "")
        if getattr(sys.modules.get(module), "__dict__", None) is function.__globals__:
            for name in sorted(names & function.__globals__.keys()):
                yield from _global(module, name, function.__globals__[name], attributes)
    for _, _, value in reads:
        if isinstance(value, type) and not issubclass(value, nn.Module) and _foreign(value):
            yield from _still(value, value, everywhere)


def _global(
    module: str, name: str, value: Any, attributes: set[str]
) -> Iterator[tuple[Any, str, Any]]:
    """A global, and what may be read of it."""
    if isinstance(value, ModuleType):
        if value.__name__.partition(".")[0] not in _KNOWN:
            yield from _still(Global(value.__name__), value, attributes)
        return
    if hasattr(value, "__dict__"):
        yield Global(module), name, OfClass(value)
    if isinstance(value, type):
        if not issubclass(value, nn.Module) and _foreign(value):
            yield from _still(Global(module, name), value, attributes)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from _still(Global(module, name), value, attributes)
    elif not callable(value):
        yield from _still(Global(module), sys.modules[module], {name})


def _still(holder: Any, value: Any, names: set[str]) -> Iterator[tuple[Any, str, Any]]:
    """Those attributes of an object that can be compared in every call."""
    for name in sorted(names & vars(value).keys()):
        found = getattr(value, name)
        if isinstance(found, FunctionType | type):
            yield holder, name, OfClass(found)
        elif not callable(found) and not hasattr(found, "__get__"):
            with contextlib.suppress(Unwatched):  # the name may be that of another's attribute
                yield holder, name, freeze(found)


def _functions(classes: list[type]) -> list[FunctionType]:
    """The forwards of classes, and what they may call, as far as names tell."""
    found: dict[FunctionType, None] = {}
    bases = [b for c in classes for b in c.__mro__ if b is not object and _foreign(b)]
    waiting = [b.__dict__["forward"] for b in bases if "forward" in b.__dict__]
    while waiting:
        function = _plain(waiting.pop())
        if function is None or function in found or not _foreign(function):
            continue
        found[function] = None
        names, attributes = _names(function.__code__)
        waiting += [function.__globals__[n] for n in names if n in function.__globals__]
        waiting += [b.__dict__[n] for n in attributes for b in bases if n in b.__dict__]
    return list(found)


def _plain(member: Any) -> FunctionType | None:
    """The function in a static or class method, a property, or under decorators."""
    if isinstance(member, staticmethod | classmethod):
        member = member.__func__
    if isinstance(member, property):
        member = member.fget
    if not callable(member) or isinstance(member, type):
        return None
    member = inspect.unwrap(member)
    return member if isinstance(member, FunctionType) else None


def _foreign(thing: Any) -> bool:
    """Whether the code is neither torch's, nor Python's, nor ours."""
    return str(thing.__module__).partition(".")[0] not in _KNOWN


def _names(code: CodeType) -> tuple[set[str], set[str]]:
    """The globals and the attributes that code names, inner functions included."""
    loaded: set[str] = set()
    attributes: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in _LOADS:
            loaded.add(instruction.argval)
        elif instruction.opname in _ATTRIBUTES:
            attributes.add(instruction.argval)
        elif isinstance(instruction.argval, CodeType):
            inner = _names(instruction.argval)
            loaded |= inner[0]
            attributes |= inner[1]
    return loaded, attributes
