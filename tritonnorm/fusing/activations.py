"""The activations that a graph or a module computes, by their names in `tritonnorm.activation`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tritonnorm import activation as activations
from tritonnorm.activation import ACTIVATIONS, PRELU
from tritonnorm.fusing.watch import Unwatched, freeze

ModuleOf = Callable[[fx.Node], nn.Module]
# Name and parameters; of a prelu the path of its slope.
Activation = tuple[str, tuple[float | str, ...]]

# Functions and methods: the name, and the names of parameters with their defaults.
_PLAIN = {name: known.defaults for name, known in ACTIVATIONS.items() if name != "gelu_tanh"}
FUNCTIONS: dict[Any, str] = {
    getattr(room, found): name
    for name in _PLAIN
    for room in (F, torch)
    for found in (name, f"{name}_")
    if hasattr(room, found)
}
METHODS = {f"{name}{tail}": name for name in ("relu", "sigmoid", "tanh") for tail in ("", "_")}


def activation(value: fx.Node, module_of: ModuleOf) -> tuple[Activation, list[fx.Node]] | None:
    """The activation that alone uses a value: its name, and its nodes, the result last."""
    users = list(value.users)
    if len(users) == 1:
        kind = _single(value, users[0], module_of)
        return (kind, users) if kind else _by_hand(value, users)
    return _by_hand(value, users)


def _single(value: fx.Node, user: fx.Node, module_of: ModuleOf) -> Activation | None:
    if slope := _slope(value, user, module_of):
        return PRELU.name, (slope,)
    if not user.args or user.args[0] is not value or user.all_input_nodes != [value]:
        return None
    if user.op == "call_module":
        return of_module(module_of(user)) if len(user.args) == 1 and not user.kwargs else None
    arguments = {k: v for k, v in user.kwargs.items() if k != "inplace"}
    rest = list(user.args[1:])
    if user.op == "call_method":
        name = METHODS.get(str(user.target))
        return (name, ()) if name and not rest and not arguments else None
    if user.op != "call_function":
        return None
    if user.target is F.hardtanh:
        rest = rest[:2] or [arguments.get("min_val", -1.0), arguments.get("max_val", 1.0)]
        return ("relu6", ()) if rest == [0, 6] or rest == [0.0, 6.0] else None
    name = FUNCTIONS.get(user.target)
    if name is None:
        return None
    if name == "gelu":
        how = rest[0] if rest else arguments.get("approximate", "none")
        return ("gelu_tanh" if how == "tanh" else "gelu", ()) if how in ("none", "tanh") else None
    found = []
    for place, (key, default) in enumerate(_PLAIN[name]):
        number = rest[place] if place < len(rest) else arguments.pop(key, default)
        if type(number) not in (int, float):
            return None
        assert isinstance(number, int | float)
        found.append(float(number))
    if arguments:
        return None
    return name, tuple(found)


def _slope(value: fx.Node, user: fx.Node, module_of: ModuleOf) -> str | None:
    """The path of the slope of a prelu: a parameter or buffer, which every call reads."""
    if user.op == "call_module":
        plain = type(module_of(user)) is nn.PReLU and user.args == (value,) and not user.kwargs
        return f"{user.target}.weight" if plain else None
    called = ("call_function", F.prelu), ("call_method", "prelu")
    if (user.op, user.target) not in called or not user.args or user.args[0] is not value:
        return None
    given = [*user.args[1:], *user.kwargs.values()]
    if len(given) != 1 or not {"weight"}.issuperset(user.kwargs):
        return None
    (slope,) = given
    return str(slope.target) if isinstance(slope, fx.Node) and slope.op == "get_attr" else None


def of_module(module: nn.Module) -> Activation | None:
    """The activation that a module of torch is; None for any other module."""
    if type(module) is nn.Hardtanh:
        return ("relu6", ()) if (module.min_val, module.max_val) == (0, 6) else None
    held = module.__dict__.values()  # a tensor among them could change inside
    closed = "forward" in module.__dict__ or any(isinstance(value, Tensor) for value in held)
    found = None if closed else activations.of_module(module)
    return None if found is None or found[0] is None else (found[0], found[1])


def settings_of(module: nn.Module) -> list[tuple[str, Any]]:
    """What a module of torch computes with, to be compared later."""
    found = []
    for name, value in module.__dict__.items():
        if not name.startswith("_") and name not in ("training", "inplace"):
            try:
                found.append((name, freeze(value)))
            except Unwatched:
                continue  # something that a user attached; torch's own are numbers
    return found


def _by_hand(value: fx.Node, users: list[fx.Node]) -> tuple[Activation, list[fx.Node]] | None:
    """x * sigmoid(x), and x * relu6(x + 3) / 6."""
    gate = next((u for u in users if _is(u, "sigmoid", value)), None)
    if len(users) == 2 and gate is not None:
        product = next(u for u in users if u is not gate)
        if _product(product, value, gate) and list(gate.users) == [product]:
            return ("silu", ()), [gate, product]
    plus = next((u for u in users if _number(u, operator.add, value) == 3), None)
    if plus is None or len(users) != 2 or len(plus.users) != 1:
        return None
    (clip,) = plus.users
    if not _is(clip, "relu6", plus) or len(clip.users) != 1:
        return None
    (after,) = clip.users
    product = next(u for u in users if u is not plus)
    nodes = [plus, clip]
    if product is after and _product(product, value, clip) and len(product.users) == 1:
        (last,) = product.users
        return (("hardswish", ()), [*nodes, product, last]) if _sixth(last, product) else None
    if _sixth(after, clip) and list(after.users) == [product] and _product(product, value, after):
        return ("hardswish", ()), [*nodes, after, product]
    return None


def _is(node: fx.Node, name: str, value: fx.Node) -> bool:
    if node.all_input_nodes != [value] or not node.args or node.args[0] is not value:
        return False
    if node.op == "call_function":
        in_place = getattr(node.target, "__name__", "").endswith("_")
        whole = len(node.args) == 1 and not in_place
        return whole and FUNCTIONS.get(node.target) == name
    return node.op == "call_method" and node.target == name and len(node.args) == 1


def _product(node: fx.Node, one: fx.Node, two: fx.Node) -> bool:
    functions = (operator.mul, torch.mul)
    multiplies = node.op == "call_function" and node.target in functions
    multiplies |= node.op == "call_method" and node.target == "mul"
    return multiplies and not node.kwargs and tuple(node.args) in ((one, two), (two, one))


def _number(node: fx.Node, how: Any, value: fx.Node) -> Any:
    """The number c in ``value + c`` and the like."""
    if node.op != "call_function" or node.target is not how or len(node.args) != 2 or node.kwargs:
        return None
    number = node.args[1] if node.args[0] is value else node.args[0]
    return number if type(number) in (int, float) else None


def _sixth(node: fx.Node, value: fx.Node) -> bool:
    return _number(node, operator.truediv, value) == 6 and node.args[0] is value
