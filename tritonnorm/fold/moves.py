"""How changes pass through operations that only move elements; and what a rule is.

`back`: what the inputs must become so that the output becomes scale * output + shift.
`ahead`: inputs that should be scale * input + shift are only `input`; what that is at the output.
The formulas are derived in `docs/folding.md`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritonnorm.fold.change import Change, Stop, compress, reshape
from tritonnorm.fold.graph import Node, Value, describe

Wanted = list[tuple[int, Change]]
_LARGEST = 2**24  # elements of a value that is followed element by element


class Rule:
    """The default: nothing passes."""

    def back(self, node: Node, out: list[Change], swap: bool = False) -> Wanted:
        """What is wanted of the inputs: (place, change); inputs that are not named stay.

        Args:
            node: the operation.
            out: what is wanted of each output.
            swap: where either of two inputs could take the change, the second one does.

        Raises:
            Stop: no change of the inputs does it.
        """
        raise Stop(no_way(node))

    def ahead(self, node: Node, into: list[Change]) -> list[Change]:
        """What each output still needs, given what each input still needs.

        Raises:
            Stop: the operation does not pass it on.
        """
        raise Stop(no_way(node))

    def coverage(self, node: Node) -> Tensor | None:
        """Which elements of the only input take part; None for all."""
        return None


def no_way(node: Node) -> str:
    return f"no scale and shift pass through {describe(node)}"


def sure(node: Node, number: float = 0.0) -> float:
    """A number among the arguments of an operation.

    Raises:
        Stop: it may be another one in the next call.
    """
    if node.numbers:
        raise Stop(f"a number in {describe(node)} may be another in the next call: {node.numbers}")
    return number


def restrict(change: Change, out: Value, operand: Value) -> Change:
    """The change of a broadcast operand: possible where it is the same for all it is spread to."""
    more = len(out.shape) - len(operand.shape)

    def fit(tensor: Tensor) -> Tensor:
        for axis, size in enumerate(tensor.shape):
            mine = operand.shape[axis - more] if axis >= more else 1
            if size != 1 and mine == 1:
                raise Stop("the change differs along an axis that is broadcast")
        return tensor.reshape(tensor.shape[more:])

    return change.map(fit)


class Reshape(Rule):
    """The same elements in another shape."""

    def back(self, node: Node, out: list[Change], swap: bool = False) -> Wanted:
        before, after = node.outputs[0].shape, node.inputs[0].shape
        return [(0, out[0].map(lambda t: reshape(t, before, after)))]

    def ahead(self, node: Node, into: list[Change]) -> list[Change]:
        before, after = node.inputs[0].shape, node.outputs[0].shape
        return [into[0].map(lambda t: reshape(t, before, after))]


class Permute(Rule):
    """The same elements with the axes in another order."""

    def _order(self, node: Node) -> list[int]:
        rank = len(node.inputs[0].shape)
        if node.what.startswith("permute"):
            return [d % rank for d in node.argument("dims")]
        first, second = 0, 1
        if node.what not in ("t", "t_"):
            first, second = (node.argument(name) % rank for name in ("dim0", "dim1"))
        order = list(range(rank))
        if rank > 1:
            order[first], order[second] = second, first
        return order

    def back(self, node: Node, out: list[Change], swap: bool = False) -> Wanted:
        order = self._order(node)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return [(0, out[0].map(lambda t: t.permute(inverse)))]

    def ahead(self, node: Node, into: list[Change]) -> list[Change]:
        order = self._order(node)
        return [into[0].map(lambda t: t.permute(order))]


class Copy(Rule):
    """The same elements: copies, and casts between floating-point dtypes."""

    def _check(self, node: Node) -> None:
        if not (node.inputs[0].dtype.is_floating_point and node.outputs[0].dtype.is_floating_point):
            raise Stop("the values are cast to integers")

    def back(self, node: Node, out: list[Change], swap: bool = False) -> Wanted:
        self._check(node)
        return [(0, out[0])]

    def ahead(self, node: Node, into: list[Change]) -> list[Change]:
        self._check(node)
        return [into[0]]


class Expand(Rule):
    """Elements repeated along axes of length 1, or along new axes."""

    def back(self, node: Node, out: list[Change], swap: bool = False) -> Wanted:
        return [(0, restrict(out[0], node.outputs[0], node.inputs[0]))]

    def ahead(self, node: Node, into: list[Change]) -> list[Change]:
        more = len(node.outputs[0].shape) - len(node.inputs[0].shape)
        return [into[0].map(lambda t: t.reshape((1,) * more + tuple(t.shape)))]


class Part(Rule):
    """Views of parts along one axis: slice, select, split, unbind."""

    def _parts(self, node: Node, tensor: Tensor) -> list[Tensor]:
        result = node.evaluate({node.inputs[0]: tensor})
        return [result] if isinstance(result, Tensor) else list(result)

    def _axis(self, node: Node) -> int:
        return int(node.argument("dim", 0)) % len(node.inputs[0].shape)

    def back(self, node: Node, out: list[Change], swap: bool = False) -> Wanted:
        axis, rank = self._axis(node), len(node.inputs[0].shape)
        dropped = len(node.outputs[0].shape) < rank
        found = []
        for name, start in (("scale", 1.0), ("shift", 0.0)):
            pieces = [getattr(change, name) for change in out]
            if dropped:
                pieces = [piece.unsqueeze(axis) for piece in pieces]
            shape = [max(piece.shape[k] for piece in pieces) for k in range(rank)]
            shape[axis] = node.inputs[0].shape[axis]
            whole = torch.full(shape, start, dtype=torch.float64)
            for view, change in zip(self._parts(node, whole), out, strict=False):
                view.copy_(getattr(change, name))
            found.append(compress(whole))
        if any(tensor.shape[axis] != 1 for tensor in found):
            sure(node)
        return [(0, Change(*found))]

    def ahead(self, node: Node, into: list[Change]) -> list[Change]:
        axis, size = self._axis(node), node.inputs[0].shape[self._axis(node)]
        if any(tensor.shape[axis] != 1 for tensor in (into[0].scale, into[0].shift)):
            sure(node)

        def parts(tensor: Tensor) -> list[Tensor]:
            shape = list(tensor.shape)
            shape[axis] = size
            return [compress(part) for part in self._parts(node, tensor.expand(shape))]

        pairs = zip(parts(into[0].scale), parts(into[0].shift), strict=True)
        return [Change(scale, shift) for scale, shift in pairs]

    def coverage(self, node: Node) -> Tensor | None:
        shape = [1] * len(node.inputs[0].shape)
        shape[self._axis(node)] = node.inputs[0].shape[self._axis(node)]
        covered = torch.zeros(shape, dtype=torch.bool)
        for part in self._parts(node, covered):
            part.fill_(True)
        return covered


class Cat(Rule):
    """Concatenation along an axis."""

    def _axis(self, node: Node) -> int:
        rank = len(node.outputs[0].shape)
        if any(len(value.shape) != rank for value in node.inputs):
            raise Stop("an empty list of numbers is concatenated")
        return int(node.argument("dim", 0)) % rank

    def back(self, node: Node, out: list[Change], swap: bool = False) -> Wanted:
        axis, start, wanted = self._axis(node), 0, []
        for place, value in enumerate(node.inputs):
            size = value.shape[axis]
            begin = start

            def piece(t: Tensor, begin: int = begin, size: int = size) -> Tensor:
                return t if t.shape[axis] == 1 else t.narrow(axis, begin, size)

            wanted.append((place, out[0].map(piece)))
            start += size
        return wanted

    def ahead(self, node: Node, into: list[Change]) -> list[Change]:
        axis = self._axis(node)
        found = []
        for name in ("scale", "shift"):
            pieces = [getattr(change, name) for change in into]
            rank = len(node.outputs[0].shape)
            shape = [max(piece.shape[k] for piece in pieces) for k in range(rank)]
            grown = []
            for piece, value in zip(pieces, node.inputs, strict=True):
                shape[axis] = value.shape[axis]
                grown.append(piece.expand(shape))
            found.append(compress(torch.cat(grown, axis)))
        return [Change(*found)]


class Move(Rule):
    """Any other operation that only moves, repeats or drops elements, or pads with zeros.

    The operation is run on the numbers 1, 2, 3, ..., so where an element comes from is read off.
    """

    def _sources(self, node: Node) -> Tensor:
        value = node.inputs[0]
        if value.shape.numel() > _LARGEST:
            raise Stop(f"the value is too large to follow through {describe(node)}")
        if node.argument("value", 0) not in (0, None):
            raise Stop("the padding is not zero")
        if node.what.startswith("constant_pad"):
            sure(node)
        tensors = {}
        for other in node.inputs[1:]:
            if other.constant is None:
                raise Stop(f"the indices of {describe(node)} are not constant")
            tensors[other] = other.constant.cpu()
        numbers = torch.arange(1, value.shape.numel() + 1, dtype=torch.float64)
        tensors[value] = numbers.reshape(value.shape)
        result: Tensor = node.evaluate(tensors)
        return result.long() - 1

    def back(self, node: Node, out: list[Change], swap: bool = False) -> Wanted:
        sources, shape = self._sources(node).flatten(), node.inputs[0].shape
        inside = sources >= 0
        found = []
        for tensor, start in ((out[0].scale, 1.0), (out[0].shift, 0.0)):
            wanted = tensor.expand(node.outputs[0].shape).flatten()
            whole = torch.full((shape.numel(),), start, dtype=torch.float64)
            whole[sources[inside]] = wanted[inside]
            if not torch.equal(whole[sources[inside]], wanted[inside]):
                raise Stop(f"{describe(node)} uses an element in several ways")
            if start == 0.0 and bool((wanted[~inside] != 0).any()):
                raise Stop("the shift does not pass through zero padding")
            found.append(compress(whole.reshape(shape)))
        return [(0, Change(*found))]

    def ahead(self, node: Node, into: list[Change]) -> list[Change]:
        sources, shape = self._sources(node), node.inputs[0].shape
        found = []
        for tensor, outside in ((into[0].scale, 1.0), (into[0].shift, 0.0)):
            moved = tensor.expand(shape).flatten()[sources.clamp(min=0)]
            found.append(compress(torch.where(sources >= 0, moved, outside)))
        return [Change(*found)]
