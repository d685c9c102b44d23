"""Which norms of a graph have an addition and an activation behind them that can be fused."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from tritonnorm.activation import PRELU
from tritonnorm.fusing.activations import Activation, ModuleOf, activation

ADDS = {operator.add: "+", operator.iadd: "+=", torch.add: "+"}
INPLACE = {getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "pow", "mod")}
INPLACE |= {operator.ifloordiv, operator.iand, operator.ior, operator.ixor, operator.setitem}
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
    """A norm that can run together with what follows it.

    Attributes:
        norm: its call.
        kind: its short name: "bn", "gn" and so on.
        activation: name and parameters, or None.
        last: the node whose result the fused call gives.
        anchor: the node in whose place it runs.
        drop: the nodes that it replaces, last first; `norm` is not among them.
        add: how the addition is written, and whether the norm is its first operand.
        residual: the other operand.
        modules: nodes whose modules are no longer called: the activation, identities.
    """

    norm: fx.Node
    kind: str
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
        return " -> ".join(filter(None, (self.kind, "add" if self.add else "", name)))


def sites(
    graph: fx.Graph,
    module_of: ModuleOf,
    norms: Callable[[nn.Module], str | None],
    fresh: Callable[[nn.Module], bool],
) -> Iterator[Site | tuple[fx.Node, str]]:
    """For every call of a norm a site, or the reason why there is none.

    Of two norms that are added, that of the module itself takes the addition, or the later.

    Args:
        graph: the code of a module.
        module_of: the module that a node calls.
        norms: the short name of a norm to fuse; None for other modules.
        fresh: which modules give a result that shares no memory with what existed before.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    taken: set[fx.Node] = set()
    calls = [n for n in graph.nodes if n.op == "call_module" and norms(module_of(n))]
    for node in sorted(calls, key=lambda n: (str(n.target).count("."), -order[n])):
        kind = norms(module_of(node)) or ""
        found = _site(node, kind, module_of, order, taken, fresh)
        if isinstance(found, Site):
            taken.update((*found.drop, node))
            yield found
        else:
            yield node, found


def _site(
    norm: fx.Node,
    short: str,
    module_of: ModuleOf,
    order: dict[fx.Node, int],
    taken: set[fx.Node],
    fresh: Callable[[nn.Module], bool],
) -> Site | str:
    if len(norm.args) != 1 or norm.kwargs or not isinstance(norm.args[0], fx.Node):
        return "it is called with more than its input"
    value, skipped = through_identities(norm, module_of)
    if found := _behind(value, short, module_of):
        kind, nodes = found
        modules = [n for n in (*skipped, *nodes) if n.op == "call_module"]
        drop = [*reversed(nodes), *reversed(skipped)]
        return Site(norm, short, kind, nodes[-1], norm, drop, None, None, modules)
    users = list(value.users)
    if len(users) != 1:
        return f"its output goes to {_users(value)}"
    add = users[0]
    operands = addition(add)
    if add.op == "call_module" and isinstance(module_of(add), nn.PReLU):
        if type(module_of(add)) is nn.PReLU:
            return f"{add.target} is a PReLU, which runs with batch norms only"
        return f"{add.target} is a PReLU of another class than torch's"
    if operands is None:
        return f"its output goes to {_users(value)}"
    how, left, right = operands
    if left is right:
        return "its output is added to itself"
    first = left is value
    other = right if first else left
    if add in taken:
        return "the norm on the other side of its addition has taken it"
    if not isinstance(other, fx.Node):
        return "what is added is no tensor"
    if how == "+=" and not first and not _own(other, add, module_of, fresh):
        return "the addition overwrites a tensor that others may see"
    if reason := _moves(norm, add, skipped, order, module_of, fresh):
        return reason
    value, more = through_identities(add, module_of)
    behind = _behind(value, short, module_of)
    if behind and any(order[n] > order[add] and writes(n, other, module_of) for n in other.users):
        return "what is added is overwritten later, and the backward needs it"
    tail = [] if behind is None else [*more, *behind[1]]
    chain = [*skipped, add, *tail]
    modules = [n for n in chain if n.op == "call_module"]
    name = None if behind is None else behind[0]
    return Site(norm, short, name, chain[-1], add, chain[::-1], (how, first), other, modules)


def _behind(
    value: fx.Node, short: str, module_of: ModuleOf
) -> tuple[Activation, list[fx.Node]] | None:
    """The activation that alone uses a value, if such a norm can run with it."""
    found = activation(value, module_of)
    learned = found is not None and found[0][0] == PRELU.name
    return None if learned and short != "bn" else found


def _moves(
    norm: fx.Node,
    add: fx.Node,
    skipped: list[fx.Node],
    order: dict[fx.Node, int],
    module_of: ModuleOf,
    fresh: Callable[[nn.Module], bool],
) -> str:
    """Why the norm may not run later, in the place of the addition; empty if it may."""
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


def addition(node: fx.Node) -> tuple[str, Any, Any] | None:
    """How a node adds, and its operands; None if it does something else."""
    table: dict[Any, Any] = {"call_function": ADDS, "call_method": ADD_METHODS}
    how = table.get(node.op, {}).get(node.target)
    if how is None or len(node.args) != 2 or node.kwargs:
        return None
    return how, *node.args


def writes(user: fx.Node, value: fx.Node, module_of: ModuleOf) -> bool:
    """Whether an operation overwrites a value, by what it is called."""
    if user.op == "call_module":
        return bool(getattr(module_of(user), "inplace", False))
    if user.kwargs.get("inplace") or user.kwargs.get("out") is value:
        return True
    if user.args[:1] != (value,):
        return False
    name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or user.target in INPLACE


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
