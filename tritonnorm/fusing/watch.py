"""Attribute values that a fused block can compare in every call."""

from __future__ import annotations

import enum
import types
from typing import Any

import torch
from torch import nn

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
