"""How changes pass through operations that compute, and the table of all rules.

The formulas are derived in `docs/folding.md`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonnorm.fold.change import Change, Stop, compress, nothing
from tritonnorm.fold.graph import Node, Value, describe
from tritonnorm.fold.moves import (
    Cat,
    Copy,
    Expand,
    Move,
    Part,
    Permute,
    Reshape,
    Rule,
    Wanted,
    no_way,
    restrict,
    sure,
)


class Average(Rule):
    """Averages with weights that sum to one: pooling, means, interpolation."""

    def _axes(self, node: Node) -> list[int]:
        rank = len(node.inputs[0].shape)
        if node.what.startswith(("mean", "amax")):
            dims = node.argument("dim")
            return list(range(rank)) if not dims else [d % rank for d in dims]
        spatial = re.search(r"([123])d", node.what)
        kinds = {"linear1": 1, "bilinear": 2, "bicubic2": 2, "trilinear": 3}
        named = next((n for k, n in kinds.items() if k in node.what), 0)
        count = named or (int(spatial[1]) if spatial else rank)
        return list(range(rank - count, rank))

    def _check(self, node: Node, change: Change, axes: list[int], before: int) -> None:
        for tensor in (change.scale, change.shift):
            if any(tensor.shape[axis] != 1 for axis in axes if before == tensor.dim()):
                raise Stop(f"{describe(node)} mixes elements with different scales")
        if "avg_pool" in node.what and not node.what.startswith("_adaptive"):
            padded = node.argument("padding") or [0]
            odd = node.argument("divisor_override") is not None
            with_zeros = any(padded) and node.argument("count_include_pad", True)
            if (with_zeros or odd) and not change.scales_only:
                raise Stop("the shift does not pass through pooling that counts zero padding")

    def _through(self, node: Node, change: Change, before: Value, after: Value) -> Change:
        axes, ranks = self._axes(node), (len(before.shape), len(after.shape))
        full = max(ranks)
        if ranks[0] == full:
            self._check(node, change, axes, full)
        if ranks[0] > ranks[1]:
            kept = [k for k in range(full) if k not in axes]
            return change.map(lambda t: t.reshape([t.shape[k] for k in kept]))
        if ranks[0] < ranks[1]:
            for axis in sorted(axes):
                change = change.map(lambda t, axis=axis: t.unsqueeze(axis))
        return change

    def back(self, node: Node, out: list[Change], swap: bool = False) -> Wanted:
        return [(0, self._through(node, out[0], node.outputs[0], node.inputs[0]))]

    def ahead(self, node: Node, into: list[Change]) -> list[Change]:
        return [self._through(node, into[0], node.inputs[0], node.outputs[0])]


class Largest(Average):
    """The largest of some elements: a scale that is not negative keeps the order."""

    def _check(self, node: Node, change: Change, axes: list[int], before: int) -> None:
        super()._check(node, change, axes, before)
        indexed = len(node.outputs) > 1 and (node.outputs[1].uses or node.outputs[1].seen)
        if bool((change.scale < 0).any() or (indexed and (change.scale == 0).any())):
            raise Stop(f"a scale is not positive before {describe(node)}")

    def ahead(self, node: Node, into: list[Change]) -> list[Change]:
        found = super().ahead(node, into)
        rest = node.outputs[1:]
        return found + [nothing(len(value.shape)) for value in rest]


class Homogeneous(Rule):
    """f(s*x) = s*f(x) for s >= 0: relu, leaky relu, prelu."""

    def back(self, node: Node, out: list[Change], swap: bool = False) -> Wanted:
        change = out[0]
        if not change.scales_only:
            raise Stop(f"the shift does not pass through {describe(node)}")
        if bool((change.scale < 0).any()):
            raise Stop(f"a scale is negative, and does not pass through {describe(node)}")
        return [(0, change)]

    def ahead(self, node: Node, into: list[Change]) -> list[Change]:
        scale, shift = into[0].scale, into[0].shift
        if bool((scale < 0).any()):
            raise Stop(f"a scale is negative, and does not pass through {describe(node)}")
        if bool(((shift != 0) & (scale != 0)).any()):
            raise Stop(f"the shift does not pass through {describe(node)}")
        # where the scale is 0 the input is the constant `shift`, so the output is constant too
        if bool((shift < 0).any()):
            if "prelu" in node.what or (node.function is None and "leaky" in node.what):
                raise Stop(f"a channel is constant before {describe(node)}")
            slope = node.argument("negative_slope", 0.0) if "leaky" in node.what else 0.0
            shift = F.leaky_relu(shift, float(slope))
        return [Change(scale, shift)]


def _spread(change: Change, rank: int) -> Change:
    def more(t: Tensor) -> Tensor:
        return t.reshape((1,) * (rank - t.dim()) + tuple(t.shape))

    return Change(more(change.scale), more(change.shift))


class _Binary(Rule):
    """Two operands: values, or numbers and known constants."""

    def _operands(self, node: Node) -> list[tuple[int | None, Any]]:
        if node.function is None:
            return [(0, None), (1, None)]
        found: list[tuple[int | None, Any]] = []
        place = 0
        for argument in node.args[:2]:
            if isinstance(argument, Value):
                known = argument.constant
                if known is not None and known.is_complex():
                    raise Stop(no_way(node))
                if known is not None and len(found) < 2:
                    found.append((None, known.double().cpu()))
                else:
                    found.append((place, None))
                place += 1
            elif isinstance(argument, complex):
                raise Stop(no_way(node))
            else:
                found.append((None, sure(node, float(argument))))
        return found

    def _constant(self, node: Node) -> tuple[int, int, Tensor] | None:
        """The place of the operand that is a value, which operand it is, and the constant."""
        operands = self._operands(node)
        if len(operands) != 2 or sum(place is not None for place, _ in operands) != 1:
            return None
        which = 0 if operands[0][0] is not None else 1
        place, rank = operands[which][0], len(node.outputs[0].shape)
        assert place is not None
        if node.inputs[place].shape != node.outputs[0].shape:
            raise Stop("the value is broadcast to a constant")
        constant = torch.as_tensor(operands[1 - which][1], dtype=torch.float64)
        return place, which, constant.reshape((1,) * (rank - constant.dim()) + constant.shape)


class Add(_Binary):
    """a + k*b."""

    def _factor(self, node: Node) -> float:
        sign = -1.0 if node.what.startswith("sub") else 1.0
        if "alpha" not in node.kwargs:
            return sign
        if not (alpha := sure(node, float(node.kwargs["alpha"]))):
            raise Stop(no_way(node))
        return sign * alpha

    def back(self, node: Node, out: list[Change], swap: bool = False) -> Wanted:
        s, t, factor = out[0].scale, out[0].shift, self._factor(node)
        if found := self._constant(node):
            place, which, constant = found
            if which == 1 and factor != 1:
                raise Stop("the value is subtracted from a constant")
            constant = constant * (factor if which == 0 else 1.0)
            return [(place, Change(compress(s), compress(t + (s - 1) * constant)))]
        places = (1, 0) if swap else (0, 1)
        if factor != 1 and swap:
            t = t / factor
        whole, rest = Change(s, t), Change(s, torch.zeros_like(s))
        value = node.outputs[0]
        return [
            (place, restrict(change, value, node.inputs[place]))
            for place, change in zip(places, (whole, rest), strict=True)
        ]

    def ahead(self, node: Node, into: list[Change]) -> list[Change]:
        factor, rank = self._factor(node), len(node.outputs[0].shape)
        if found := self._constant(node):
            place, which, constant = found
            s, t = into[place].scale, into[place].shift
            constant = constant * (factor if which == 0 else 1.0)
            t = t * (factor if which == 1 else 1.0)
            return [Change(s, compress(t + (1 - s) * constant))]
        a, b = (_spread(change, rank) for change in into)
        if not bool((a.scale == b.scale).all()):
            raise Stop("the operands of an addition have different scales")
        return [Change(compress(a.scale + 0 * b.scale), compress(a.shift + factor * b.shift))]


class Multiply(_Binary):
    """a * b, and a / b."""

    def _inverse(self, node: Node) -> bool:
        return node.what.startswith("div")

    def back(self, node: Node, out: list[Change], swap: bool = False) -> Wanted:
        if node.argument("rounding_mode") is not None:
            raise Stop(no_way(node))
        s, t = out[0].scale, out[0].shift
        if found := self._constant(node):
            place, which, constant = found
            if which == 1 and self._inverse(node):
                raise Stop("the value divides a constant")
            constant = 1 / constant if self._inverse(node) else constant
            if bool(((constant == 0) & (t != 0)).any()):
                raise Stop("the shift does not pass through a multiplication by zero")
            inner = torch.where(t == 0, t, t / constant)
            return [(place, Change(compress(s + 0 * inner), compress(inner)))]
        if not out[0].scales_only:
            raise Stop("the shift does not pass through a multiplication")
        place = 1 if swap and not self._inverse(node) else 0
        return [(place, restrict(out[0], node.outputs[0], node.inputs[place]))]

    def ahead(self, node: Node, into: list[Change]) -> list[Change]:
        if node.argument("rounding_mode") is not None:
            raise Stop(no_way(node))
        rank = len(node.outputs[0].shape)
        if found := self._constant(node):
            place, which, constant = found
            if which == 1 and self._inverse(node):
                raise Stop("the value divides a constant")
            s, t = into[place].scale, into[place].shift
            return [Change(s, compress(t / constant if self._inverse(node) else t * constant))]
        a, b = (_spread(change, rank) for change in into)
        if not (a.scales_only and b.scales_only):
            raise Stop("the shift does not pass through a multiplication")
        if self._inverse(node) and not b.is_nothing:
            raise Stop("the value divides another")
        return [Change(compress(a.scale * b.scale), torch.zeros_like(a.shift))]


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_named(Reshape(), "view _unsafe_view reshape unsqueeze squeeze flatten unflatten"),
    **_named(Permute(), "permute transpose t"),
    **_named(Copy(), "clone _to_copy contiguous detach alias lift_fresh"),
    **_named(Expand(), "expand"),
    **_named(Part(), "slice select split split_with_sizes unbind"),
    **_named(Cat(), "cat"),
    **_named(
        Move(),
        "index_select index pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle "
        "flip roll repeat constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d "
        "replication_pad2d im2col",
    ),
    **_named(
        Average(),
        "avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d mean "
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d "
        "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d",
    ),
    **_named(Largest(), "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d amax"),
    **_named(Homogeneous(), "relu leaky_relu _prelu_kernel"),
    **_named(Add(), "add sub"),
    **_named(Multiply(), "mul div"),
}
_NONE = Rule()


def rule_of(node: Node) -> Rule:
    """The rule of an operation; in-place operations have that of their namesake."""
    name = node.what.partition(".")[0]
    return RULES.get(name) or RULES.get(name.removesuffix("_")) or _NONE
