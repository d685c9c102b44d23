"""What a module is called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


class Refused(Exception):
    """Why a module has no graph, in words.

    Attributes:
        helper: a function that the code calls and that cannot be followed, if that is why.
    """

    helper: Callable[..., Any] | None = None


@dataclass
class Arguments:
    """What one call of a module is given.

    Attributes:
        tensors: names of the arguments that are tensors.
        constants: the other arguments of the signature and their values.
    """

    tensors: tuple[str, ...] = ()
    constants: dict[str, Any] = field(default_factory=dict)


def positional(module: nn.Module) -> tuple[str, ...]:
    """The names of the positional arguments of a module's forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(type(module).forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)[1:]


def arguments_of(
    module: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]] | None
) -> Arguments:
    """Which arguments of a call are tensors.

    Args:
        module: what is called.
        given: the arguments of one call; None if none is known.

    Raises:
        Refused: they are of kinds that the code of a block cannot be made for.
    """
    signature = inspect.signature(type(module).forward)
    empty = inspect.Parameter.empty
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    fixed = [p for p in list(signature.parameters.values())[1:] if p.kind not in kinds]
    if any(p.kind is inspect.Parameter.POSITIONAL_ONLY for p in fixed):
        raise Refused("it has positional-only arguments")
    if given is None:
        tensors = tuple(p.name for p in fixed if p.default is empty)
        for p in fixed:
            if isinstance(p.default, list | dict | set):
                raise Refused(f"its argument {p.name} is a {type(p.default).__name__}")
        return Arguments(tensors, {p.name: p.default for p in fixed if p.default is not empty})
    try:
        bound = signature.bind(module, *given[0], **given[1])
    except TypeError as error:
        raise Refused(str(error)) from None
    bound.apply_defaults()
    values = {p.name: bound.arguments[p.name] for p in fixed}
    for p in signature.parameters.values():
        if p.kind in kinds and bound.arguments[p.name]:
            raise Refused(f"it is called with *{p.name}")
    constants: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            continue
        if type(value) not in (type(None), bool, int, float, str):
            raise Refused(f"its argument {name} is a {type(value).__name__}")
        constants[name] = value
    return Arguments(tuple(n for n in values if n not in constants), constants)
