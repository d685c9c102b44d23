"""Which batch norms of a graph have an addition and an activation behind them that can be fused."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tritonnorm.fusing.watch import Unwatched, freeze

ModuleOf = Callable[[fx.Node], nn.Module]
Activation = tuple[str, tuple[float, ...]]

# Activation modules: the name in tritonnorm.activation and how to read the parameters.
MODULES: dict[type[nn.Module], tuple[str, Callable[[Any], tuple[float, ...]]]] = {
    nn.ReLU: ("relu", lambda m: ()),
    nn.ReLU6: ("relu6", lambda m: ()),
    nn.LeakyReLU: ("leaky_relu", lambda m: (float(m.negative_slope),)),
    nn.Hardsigmoid: ("hardsigmoid", lambda m: ()),
    nn.Hardswish: ("hardswish", lambda m: ()),
    nn.Sigmoid: ("sigmoid", lambda m: ()),
    nn.Tanh: ("tanh", lambda m: ()),
    nn.SiLU: ("silu", lambda m: ()),
    nn.GELU: ("gelu", lambda m: ()),
    nn.ELU: ("elu", lambda m: (float(m.alpha),)),
    nn.Softplus: ("softplus", lambda m: (float(m.beta), float(m.threshold))),
    nn.Mish: ("mish", lambda m: ()),
}
# Functions and methods: the name, and the names of parameters with their defaults.
_PLAIN: dict[str, tuple[tuple[str, float], ...]] = {
    "relu": (),
    "relu6": (),
    "leaky_relu": (("negative_slope", 0.01),),
    "hardsigmoid": (),
    "hardswish": (),
    "sigmoid": (),
    "tanh": (),
    "silu": (),
    "gelu": (),
    "elu": (("alpha", 1.0),),
    "softplus": (("beta", 1.0), ("threshold", 20.0)),
    "mish": (),
}
FUNCTIONS: dict[Any, str] = {
    getattr(room, found): name
    for name in _PLAIN
    for room in (F, torch)
    for found in (name, f"{name}_")
    if hasattr(room, found)
}
METHODS = {f"{name}{tail}": name for name in ("relu", "sigmoid", "tanh") for tail in ("", "_")}
ADDS = {operator.add: "+", operator.iadd: "+=", torch.add: "+"}
ADD_METHODS = {"add": "+", "add_": "+="}
# Modules whose result shares no memory with anything that existed before.
FRESH = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
)


@dataclass
class Site:
    """A batch norm that can run together with what follows it.

    Attributes:
        norm: its call.
        activation: name and parameters, or None.
        last: the node whose result the fused call gives.
        anchor: the node in whose place it runs.
        drop: the nodes that it replaces, last first; `norm` is not among them.
        add: how the addition is written, and whether the batch norm is its first operand.
        residual: the other operand.
        modules: nodes whose modules are no longer called: the activation, identities.
    """

    norm: fx.Node
    activation: Activation | None
    last: fx.Node
    anchor: fx.Node
    drop: list[fx.Node]
    add: tuple[str, bool] | None
    residual: fx.Node | None
    modules: list[fx.Node]

    @property
    def rule(self) -> str:
        """Such as "bn -> add -> relu"."""
        name = self.activation[0] if self.activation else ""
        return " -> ".join(filter(None, ("bn", "add" if self.add else "", name)))


def sites(
    graph: fx.Graph,
    module_of: ModuleOf,
    norms: Callable[[nn.Module], bool],
    fresh: Callable[[nn.Module], bool],
) -> Iterator[Site | tuple[fx.Node, str]]:
    """For every call of a batch norm a site, or the reason why there is none.

    Of two batch norms that are added, that of the module itself takes the addition, or the later.

    Args:
        graph: the code of a module.
        module_of: the module that a node calls.
        norms: which modules are batch norms to fuse.
        fresh: which modules give a result that shares no memory with what existed before.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    taken: set[fx.Node] = set()
    calls = [n for n in graph.nodes if n.op == "call_module" and norms(module_of(n))]
    for node in sorted(calls, key=lambda n: (str(n.target).count("."), -order[n])):
        found = _site(node, module_of, order, taken, fresh)
        if isinstance(found, Site):
            taken.update((*found.drop, node))
        else:
            found = (node, found)
        yield found


def _site(
    norm: fx.Node,
    module_of: ModuleOf,
    order: dict[fx.Node, int],
    taken: set[fx.Node],
    fresh: Callable[[nn.Module], bool],
) -> Site | str:
    if len(norm.args) != 1 or norm.kwargs or not isinstance(norm.args[0], fx.Node):
        return "it is called with more than its input"
    value, skipped = through_identities(norm, module_of)
    if found := activation(value, module_of):
        kind, nodes = found
        modules = [n for n in (*skipped, *nodes) if n.op == "call_module"]
        return Site(
            norm, kind, nodes[-1], norm, [*reversed(nodes), *reversed(skipped)], None, None, modules
        )
    users = list(value.users)
    if len(users) != 1:
        return f"its output goes to {_users(value)}"
    add = users[0]
    operands = addition(add)
    if add.op == "call_module" and isinstance(module_of(add), nn.PReLU):
        return f"the slope of {add.target} is learned, and the kernels take numbers"
    if operands is None:
        return f"its output goes to {_users(value)}"
    how, left, right = operands
    if left is right:
        return "its output is added to itself"
    first = left is value
    other = right if first else left
    if add in taken:
        return "the batch norm on the other side of its addition has taken it"
    if not isinstance(other, fx.Node):
        return "what is added is no tensor"
    if how == "+=" and not first and not _own(other, add, module_of, fresh):
        return "the addition overwrites a tensor that others may see"
    if reason := _moves(norm, add, skipped, order, module_of, fresh):
        return reason
    value, more = through_identities(add, module_of)
    found = activation(value, module_of)
    kind, nodes = found if found else (None, [])
    more = more if found else []
    chain = [*skipped, add, *more, *nodes]
    modules = [n for n in chain if n.op == "call_module"]
    return Site(norm, kind, chain[-1], add, chain[::-1], (how, first), other, modules)


def _moves(
    norm: fx.Node,
    add: fx.Node,
    skipped: list[fx.Node],
    order: dict[fx.Node, int],
    module_of: ModuleOf,
    fresh: Callable[[nn.Module], bool],
) -> str:
    """Why the batch norm may not run later, in the place of the addition; empty if it may."""
    between = [n for n in order if order[norm] < order[n] < order[add] and n not in skipped]
    if all(n.op in ("get_attr", "placeholder") for n in between):
        return ""
    source = norm.args[0]
    assert isinstance(source, fx.Node)
    if _own(source, norm, module_of, fresh):
        return ""
    # Operations of the graph that write into none of their arguments can go first, whatever they
    # share memory with.
    if all(n.op == "call_module" and isinstance(module_of(n), FRESH) for n in between):
        return ""
    return "its input could change before the addition"


def _own(
    node: fx.Node,
    user: fx.Node,
    module_of: ModuleOf,
    fresh: Callable[[nn.Module], bool],
) -> bool:
    """Whether only `user` sees the memory of a value."""
    if node.op != "call_module" or list(node.users) != [user]:
        return False
    return fresh(module_of(node))


def through_identities(node: fx.Node, module_of: ModuleOf) -> tuple[fx.Node, list[fx.Node]]:
    """The value behind modules that do nothing, and their calls."""
    skipped: list[fx.Node] = []
    while len(node.users) == 1:
        (user,) = node.users
        if user.op != "call_module" or type(module_of(user)) is not nn.Identity:
            break
        if user.args != (node,) or user.kwargs:
            break
        skipped.append(user)
        node = user
    return node, skipped


def activation(value: fx.Node, module_of: ModuleOf) -> tuple[Activation, list[fx.Node]] | None:
    """The activation that alone uses a value: its name, and its nodes, the result last."""
    users = list(value.users)
    if len(users) == 1:
        kind = _single(value, users[0], module_of)
        return (kind, users) if kind else _by_hand(value, users)
    return _by_hand(value, users)


def _single(value: fx.Node, user: fx.Node, module_of: ModuleOf) -> Activation | None:
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
        found.append(float(number))
    if arguments:
        return None
    return name, tuple(found)


def of_module(module: nn.Module) -> Activation | None:
    """The activation that a module of torch is; None for any other module."""
    if type(module) is nn.Hardtanh:
        return ("relu6", ()) if (module.min_val, module.max_val) == (0, 6) else None
    entry = MODULES.get(type(module))
    if entry is None or "forward" in module.__dict__:
        return None
    if type(module) is nn.GELU and module.approximate != "none":
        return ("gelu_tanh", ()) if module.approximate == "tanh" else None
    return entry[0], entry[1](module)


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
        whole = len(node.args) == 1 and not str(node.target.__name__).endswith("_")
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


def addition(node: fx.Node) -> tuple[str, Any, Any] | None:
    """How a node adds, and its operands; None if it does something else."""
    table: dict[Any, Any] = {"call_function": ADDS, "call_method": ADD_METHODS}
    how = table.get(node.op, {}).get(node.target)
    if how is None or len(node.args) != 2 or node.kwargs:
        return None
    return how, *node.args


def _users(value: fx.Node) -> str:
    names = []
    for user in value.users:
        if user.op == "output":
            names.append("the result")
        elif user.op == "call_module":
            names.append(str(user.target))
        else:
            names.append(getattr(user.target, "__name__", str(user.target)))
    return " and ".join(names) or "nothing"
