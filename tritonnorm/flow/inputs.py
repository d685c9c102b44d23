"""Example inputs: what the caller may give, and how a model is run on it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Call:
    """The arguments of one call of the model."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, model: nn.Module) -> Any:
        """Call the model on copies of the tensors, which an in-place forward may change."""
        fresh = self.map(torch.clone)
        return model(*fresh.args, **fresh.kwargs)

    def double(self) -> Call:
        """The same call with every floating-point tensor in float64."""
        return self.map(lambda t: t.double() if t.is_floating_point() else t)

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with `change` applied to every tensor."""
        args = tuple(_map(change, value) for value in self.args)
        return Call(args, {key: _map(change, value) for key, value in self.kwargs.items()})


def calls_from(example_inputs: Any) -> list[Call]:
    """The calls that `example_inputs` stands for.

    A tensor is the only argument, a tuple the positional arguments, a mapping the keyword
    arguments; a list is several of these, each its own run.

    Raises:
        ValueError: another type, an empty list, or no tensor in it.
    """
    if isinstance(example_inputs, list):
        if not example_inputs:
            raise ValueError("example_inputs: expected at least one input, got an empty list")
        return [_call(value) for value in example_inputs]
    return [_call(example_inputs)]


def _call(value: Any) -> Call:
    if isinstance(value, Tensor):
        return Call((value.detach(),))
    if isinstance(value, tuple):
        call = Call(value)
    elif isinstance(value, Mapping):
        call = Call((), dict(value))
    else:
        raise ValueError(
            "example_inputs: expected a tensor, a tuple of arguments, a mapping of keyword "
            f"arguments, or a list of these; got {type(value).__name__}"
        )
    if not list(tensors_in((call.args, call.kwargs))):
        raise ValueError("example_inputs: expected at least one tensor, got none")
    return call.map(Tensor.detach)


def takes_numbers(model: nn.Module, call: Call) -> bool:
    """Whether a call gives the model numbers, or leaves some at their defaults; flags are none."""
    values = tree_leaves((call.args, call.kwargs))
    with contextlib.suppress(TypeError, ValueError):  # a forward that has no signature
        values += [p.default for p in inspect.signature(model.forward).parameters.values()]
    return any(type(value) in (int, float, complex) for value in values)


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(change, item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_map(change, item) for item in value)
    if isinstance(value, dict):
        return {key: _map(change, item) for key, item in value.items()}
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples, mappings and dataclasses, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from tensors_in(getattr(value, entry.name))
