"""The data flow of recorded runs: values, and the operations and modules that made and used them.

A value is one content of one piece of memory: an in-place operation makes a new value. A layer or
a batch norm is one node, whatever operations it is made of; everything else is a node per
operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

LAYER, NORM, OPERATION = "layer", "norm", "operation"


@dataclass(eq=False)
class Value:
    """One content of one tensor.

    Attributes:
        shape, dtype: of the tensor.
        memory: key of its storage; None for a value inside a module, which has no memory to see.
        node, slot: the node that made it and the place among its outputs; None for what the run
            was given: inputs, parameters, constants.
        uses: who reads it: the node, and the place among its inputs.
        seen: who else sees it, in words: the caller, a hook, NumPy, something that keeps it.
        constant: the parameter, buffer or small constant that it is.
    """

    shape: torch.Size
    dtype: torch.dtype
    memory: int | None
    node: Node | None = None
    slot: int = 0
    uses: list[tuple[Node, int]] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    constant: Tensor | None = None


@dataclass(eq=False)
class Node:
    """One operation, or one call of a layer or batch norm.

    Attributes:
        index: position in the run; inputs come from nodes with a lower index.
        kind: `LAYER`, `NORM` or `OPERATION`.
        what: name of the operation, such as "add.Tensor", or of the class of the module.
        module: the layer or batch norm.
        function, args, kwargs: the operation, with values in the places of tensors.
        inputs, outputs: values.
        numbers: why a number among the arguments may be another in the next call, if it may.
    """

    index: int
    kind: str
    what: str
    module: nn.Module | None = None
    function: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    numbers: str = ""

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument of the operation by its name in the schema."""
        if self.function is None:
            return default
        if name in self.kwargs:
            return self.kwargs[name]
        for place, argument in enumerate(self.function._schema.arguments):
            if argument.name == name:
                if place < len(self.args):
                    return self.args[place]
                return argument.default_value if argument.has_default_value() else default
        return default

    def evaluate(self, tensors: dict[Value, Tensor]) -> Any:
        """Run the operation with these tensors in the places of the values."""

        def put(leaf: Any) -> Any:
            return tensors[leaf] if isinstance(leaf, Value) else leaf

        args, kwargs = tree_map(put, self.args), tree_map(put, self.kwargs)
        return self.function(*args, **kwargs)


@dataclass
class Span:
    """One call of any module: the nodes from `first` up to `last` ran inside it."""

    module: nn.Module
    first: int
    last: int = 0
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)


@dataclass
class Run:
    """One recorded run.

    Attributes:
        nodes: in the order of execution.
        spans: calls of each module, by id.
        reads, writes: indices of the nodes that read and wrote each memory.
        kept: memory that outlives the run, or that the run was given.
        foreign: ids of layers and batch norms whose tensors were read outside their own call, or
            that are odd in another way; with the reason.
        numbers: why a number in the code may be another one in the next call; empty if none may.
    """

    nodes: list[Node] = field(default_factory=list)
    spans: dict[int, list[Span]] = field(default_factory=dict)
    reads: dict[int, list[int]] = field(default_factory=dict)
    writes: dict[int, list[int]] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)
    foreign: dict[int, str] = field(default_factory=dict)
    numbers: str = ""

    def settle(self, changed: set[int], literals: Iterable[Value]) -> None:
        """Take back the constants that may have another value in the next call: what the run
        changed of the model's state, where numbers may change the literals and what operations
        made of numbers, and what was computed from these."""
        doubtful = set(literals if self.numbers else ())
        for node in self.nodes:
            node.numbers = self.numbers
            doubtful.update(value for value in node.inputs if value.memory in changed)
            if self.numbers or any(value in doubtful for value in node.inputs):
                doubtful.update(node.outputs)
        for value in doubtful:
            value.constant = None

    def functional(self) -> list[Node]:
        """The batch norm operations that are not part of a batch norm module."""
        return [n for n in self.nodes if n.kind == OPERATION and "batch_norm" in n.what]

    def add(self, node: Node) -> None:
        """Append a node, and note it with its inputs and outputs."""
        self.nodes.append(node)
        for place, value in enumerate(node.inputs):
            value.uses.append((node, place))
        for slot, value in enumerate(node.outputs):
            value.node, value.slot = node, slot

    def remove(self, node: Node) -> None:
        """Take a node out; its outputs must not be used any more."""
        self.nodes.remove(node)
        for value in node.inputs:
            value.uses = [use for use in value.uses if use[0] is not node]

    def clash(self, first: set[int], second: set[int], index: int) -> bool:
        """Whether two groups of memory could not be one from node `index` on.

        They can unless one is overwritten while the content of the other is still wanted.
        """
        for written, others in ((first, second), (second, first)):
            times = [w for key in written for w in self.writes.get(key, ()) if w > index]
            if times and any(
                key in self.kept or any(r > min(times) for r in self.reads.get(key, ()))
                for key in others - written
            ):
                return True
        return False


def leaves(value: Any) -> Iterator[Value]:
    """The values in the arguments of a node, in order."""
    if isinstance(value, Value):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)


def describe(node: Node | None) -> str:
    """A node in words."""
    if node is None:
        return "the model's input"
    return node.what.partition(".")[0].rstrip("_") or node.what
