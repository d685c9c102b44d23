"""Following a change through recorded runs, back to the layers that can make it, or ahead to
those that can absorb it.

Nothing is changed here: a walk ends with the edits it needs, or with the reason why it cannot.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tritonnorm.fold.algebra import ScaleShift
from tritonnorm.fold.change import Change, Stop, along, nothing, vector
from tritonnorm.fold.graph import OPERATION, Node, Run, Value, describe
from tritonnorm.fold.rules import Copy, Rule, rule_of
from tritonnorm.fold.sites import IDENTITY, LAYER, SHIFT, ZERO, Site, channel_axis

SiteOf = Callable[[nn.Module], Site]
NameOf = Callable[[nn.Module], str]
Start = tuple[Value, Change] | tuple[Value, Change, tuple[Node, int]]


@dataclass
class Walk:
    """What a walk found.

    Attributes:
        edits: for each call of a layer or batch norm, what has to be folded into it.
        trail: the operations on the way, by name.
    """

    edits: dict[Node, ScaleShift] = field(default_factory=dict)
    trail: list[str] = field(default_factory=list)


class _Shift(Rule):
    """A batch norm of which only an addition per channel is left."""

    def __init__(self, shift: Tensor) -> None:
        self.shift = shift

    def _constant(self, node: Node) -> Tensor:
        zeros = torch.zeros_like(self.shift)
        return along(1, len(node.outputs[0].shape), zeros, self.shift).shift

    def back(self, node: Node, out: list[Change], swap: bool = False) -> list[tuple[int, Change]]:
        s, t = out[0].scale, out[0].shift
        return [(0, Change(s, t + (s - 1) * self._constant(node)))]

    def ahead(self, node: Node, into: list[Change]) -> list[Change]:
        s, t = into[0].scale, into[0].shift
        return [Change(s, t + (1 - s) * self._constant(node))]


class Walker:
    """Walks through the runs of one model, as the sites say it is now."""

    def __init__(self, site: SiteOf, name: NameOf, closed: Callable[[nn.Module], str]) -> None:
        self.site, self.name, self.closed = site, name, closed

    def back(self, starts: list[tuple[Node, Change]], swap: bool = False) -> Walk:
        """From the inputs of batch norm calls to what makes them.

        Args:
            starts: the calls, each with what its input has to become.
            swap: take the other choice where there are two.

        Raises:
            Stop: the reason in words.
        """
        walk = Walk()
        wanted: dict[Value, dict[tuple[Node, int], Change]] = {}
        heap: list[tuple[int, int, Node]] = []

        def want(value: Value, use: tuple[Node, int], change: Change) -> None:
            if value.node is None:
                what = "a constant" if value.constant is not None else "the model's input"
                raise Stop(f"the batch norm follows {what}")
            if value not in wanted and all(v not in wanted for v in value.node.outputs):
                heapq.heappush(heap, (-value.node.index, id(value.node), value.node))
            wanted.setdefault(value, {})[use] = change

        for node, change in starts:
            want(node.inputs[0], (node, 0), change)
        while heap:
            _, _, node = heapq.heappop(heap)
            out = [self._total(value, wanted.get(value, {})) for value in node.outputs]
            if node.kind != OPERATION and (edit := self._end(node, out[0], -1)) is not None:
                walk.edits[node] = edit
                continue
            if self._role(node) == ZERO:
                if not out[0].scales_only:
                    raise Stop("a branch that was merged into another takes no shift")
                continue
            if node.kind == OPERATION:
                walk.trail.append(describe(node))
            for place, change in self._rule(node).back(node, out, swap):
                if not change.is_nothing:
                    want(node.inputs[place], (node, place), change)
        return walk

    def ahead(self, starts: list[tuple[Value, Change]]) -> Walk:
        """From the outputs of batch norm calls to what can absorb what they still need.

        Raises:
            Stop: the reason in words.
        """
        walk = Walk()
        owed: dict[Value, Change] = {}
        heap: list[tuple[int, int, Node]] = []
        queued: set[Node] = set()

        def owe(value: Value, change: Change) -> None:
            if value.seen:
                raise Stop(f"the output of {self._what(value.node)} is {value.seen[0]}")
            owed[value] = change
            for node, _ in value.uses:
                if node not in queued and not self._idle(node):
                    queued.add(node)
                    heapq.heappush(heap, (node.index, id(node), node))

        for value, change in starts:
            owe(value, change)
        while heap:
            _, _, node = heapq.heappop(heap)
            into = [owed.get(value) or nothing(len(value.shape)) for value in node.inputs]
            if node.kind != OPERATION and (edit := self._end(node, into[0], 1)) is not None:
                walk.edits[node] = edit
                continue
            if node.kind == OPERATION:
                walk.trail.append(describe(node))
            out = self._rule(node).ahead(node, into)
            for value, change in zip(node.outputs, out, strict=True):
                if not change.is_nothing:
                    owe(value, change)
        return walk

    def _total(self, value: Value, wanted: dict[tuple[Node, int], Change]) -> Change:
        """What all users together want of a value."""
        if not wanted:
            return nothing(len(value.shape))
        if value.seen:
            raise Stop(f"the output of {self._what(value.node)} is {value.seen[0]}")
        parts: list[tuple[Change, Tensor | None]] = []
        for use in value.uses:
            node = use[0]
            rule = rule_of(node) if node.kind == OPERATION else None
            if use in wanted:
                parts.append((wanted[use], rule.coverage(node) if rule else None))
            elif not self._idle(node):
                covered = rule.coverage(node) if rule else None
                if covered is None:
                    what = self.name(node.module) if node.module else describe(node)
                    made = self._what(value.node)
                    raise Stop(f"the output of {made} is also used by {what}")
                parts.append((nothing(len(value.shape)), covered))
        if len(parts) == 1:
            return parts[0][0]
        return self._merge(value, parts)

    def _merge(self, value: Value, parts: list[tuple[Change, Tensor | None]]) -> Change:
        rank = len(value.shape)
        scale, shift = nothing(rank).scale, nothing(rank).shift
        known = torch.zeros((1,) * rank, dtype=torch.bool)
        for change, covered in parts:
            if covered is None:
                covered = torch.ones((1,) * rank, dtype=torch.bool)
            differs = (scale != change.scale) | (shift != change.shift)
            if bool((known & covered & differs).any()):
                made = self._what(value.node)
                raise Stop(f"the output of {made} is used in several ways")
            scale = torch.where(covered, change.scale, scale)
            shift = torch.where(covered, change.shift, shift)
            known = known | covered
        return Change(scale, shift)

    def _role(self, node: Node) -> str:
        return self.site(node.module).role if node.module is not None else ""

    def _idle(self, node: Node) -> bool:
        """Whether the node reads its inputs to no effect."""
        if node.kind != OPERATION:
            return self._role(node) == ZERO
        return bool(node.outputs) and not any(v.uses or v.seen for v in node.outputs)

    def _rule(self, node: Node) -> Rule:
        if node.kind == OPERATION:
            return rule_of(node)
        site = self.site(node.module)  # type: ignore[arg-type]
        if site.role == SHIFT:
            assert site.shift is not None
            return _Shift(site.shift)
        return Copy()

    def _end(self, node: Node, change: Change, side: int) -> ScaleShift | None:
        """The edit of the layer or batch norm, if the walk ends at it."""
        assert node.module is not None
        site = self.site(node.module)
        if site.role in (IDENTITY, SHIFT, ZERO):
            return None
        if reason := self.closed(node.module):
            raise Stop(reason)
        value = node.outputs[0] if side < 0 else node.inputs[0]
        axis = 1
        if site.role == LAYER:
            axis = channel_axis(site)
        try:
            return ScaleShift(*vector(change, axis, value.shape[axis]))
        except Stop:
            shape, name = tuple(value.shape), self.name(node.module)
            put = "output" if side < 0 else "input"
            raise Stop(
                f"the channels of the batch norm are not those of {name}: its {put} is {shape}"
            ) from None

    def _what(self, node: Node | None) -> str:
        if node is not None and node.module is not None:
            return self.name(node.module)
        return describe(node)


def by_module(
    walks: list[Walk], calls: Mapping[nn.Module, list[tuple[Run, Node]]], name: NameOf
) -> dict[nn.Module, ScaleShift]:
    """The edits of all walks, one per module.

    Args:
        walks: one for each run in which the batch norm is called.
        calls: all calls of each module, in all runs.
        name: names a module.

    Raises:
        Stop: a module is called several times, and not all calls want the same.
    """
    found: dict[nn.Module, ScaleShift] = {}
    edits = {node: edit for walk in walks for node, edit in walk.edits.items()}
    for node, edit in edits.items():
        module = node.module
        assert module is not None
        first = found.setdefault(module, edit)
        if not (torch.equal(first.scale, edit.scale) and torch.equal(first.shift, edit.shift)):
            raise Stop(f"{name(module)} is also called before another batch norm")
    for module in found:
        if any(node not in edits for _, node in calls[module]):
            raise Stop(f"{name(module)} is also called without the batch norm")
    return found
