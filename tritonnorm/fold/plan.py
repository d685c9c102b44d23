"""Which batch norms fold, how, and into what: one attempt per rule, in the order of what it saves.

A plan is tried on the sites; only when every edit of it is possible are the sites replaced. So
each plan starts from a model that computes what the original does, and leaves such a model behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from tritonnorm.fold import inspect, sites
from tritonnorm.fold.algebra import FoldRefused, ScaleShift
from tritonnorm.fold.branches import into_branch, merge_branches
from tritonnorm.fold.change import Change, Stop, along
from tritonnorm.fold.fused import fuse_activations
from tritonnorm.fold.graph import Node, Run, Value
from tritonnorm.fold.inspect import Names
from tritonnorm.fold.outcome import Outcome, Plan
from tritonnorm.fold.shared import untie
from tritonnorm.fold.sites import IDENTITY, LAYER, NORM, SHIFT, Site, site_of
from tritonnorm.fold.walk import Walker, by_module


class Planner:
    """Plans the folds of one model from its recorded runs.

    Args:
        model: the model; it is not changed.
        runs: its recorded runs; empty where what precedes each batch norm is given to `direct`.
        norms: the batch norms that may fold, by name.
        affines: scale and shift of batch norms of other classes, found in the runs.
    """

    def __init__(
        self,
        model: nn.Module,
        runs: list[Run],
        norms: dict[str, nn.Module],
        affines: dict[nn.Module, ScaleShift],
    ) -> None:
        self.runs, self.norms, self.affines = runs, norms, affines
        self.open = set(norms.values())
        self.names = Names.of(model)
        self.owners = inspect.weight_owners(model)
        self.out = Outcome()
        self.walker = Walker(self.site, self.names.__getitem__, self._closed)
        self.calls: dict[nn.Module, list[tuple[Run, Node]]] = {}
        self.groups: dict[tuple[int, int], set[int]] = {}
        for run in runs:
            for node in run.nodes:
                if node.module is not None:
                    self.calls.setdefault(node.module, []).append((run, node))

    def site(self, module: nn.Module) -> Site:
        """What the module is now."""
        if module not in self.out.sites:
            try:
                self.out.sites[module] = site_of(module, self.affines.get(module))
            except FoldRefused as refusal:
                raise Stop(str(refusal)) from None
        return self.out.sites[module]

    def run(self) -> Outcome:
        """Try every rule on every batch norm."""
        waiting = self._ready()
        attempts = (self._before, self._untied, self._branch, self._after)
        for rounds in range(3):
            done = len(self.out.plans)
            for attempt in attempts:
                for name in list(waiting):
                    if self._try(attempt, name, waiting[name], first=rounds == 0):
                        del waiting[name]
            if len(self.out.plans) == done:
                break
        for name in list(waiting):
            if self._try(self._scale_only, name, waiting[name], first=True):
                del waiting[name]
        merge_branches(self)
        fuse_activations(self)
        return self.out

    def _ready(self) -> dict[str, nn.Module]:
        """The batch norms that may fold, in the order of their first call."""
        found = {}
        order = {module: place for place, module in enumerate(self.calls)}
        for name, bn in sorted(self.norms.items(), key=lambda item: order.get(item[1], 0)):
            if bn not in self.calls:
                self.out.reasons[name] = "the batch norm was not executed on the example inputs"
            elif reason := self._foreign(bn):
                self.out.reasons[name] = f"the batch norm's {reason}"
            else:
                found[name] = bn
        return found

    def _try(
        self, attempt: Callable[[str, nn.Module], Plan], name: str, bn: nn.Module, first: bool
    ) -> bool:
        try:
            plan = attempt(name, bn)
        except Exception as reason:  # one that cannot be followed must not stop the others
            said, text = self.out.reasons.get(name, ""), str(reason)
            if not isinstance(reason, Stop | FoldRefused):
                text = f"it cannot be followed ({type(reason).__name__}: {text})"
            if first and text and text not in said:
                ahead = "and ahead: " if attempt == self._after else ""
                ahead = "its scale alone: " if attempt == self._scale_only else ahead
                self.out.reasons[name] = f"{said}; {ahead}{text}" if said else text
            return False
        self.out.plans[name] = plan
        self.out.reasons.pop(name, None)
        return True

    # the rules

    def direct(self, name: str, layer: nn.Module, proof: str) -> None:
        """Into a layer that is known to be right before the batch norm."""
        affine = self._affine(self.norms[name])
        bn = self.norms[name]
        changes = {layer: self._edit(layer, affine, after=True)}
        changes[bn] = self.site(bn).becomes(IDENTITY)
        reason = "nothing else uses the output of its partner"
        plan = self._commit(name, changes, [], "{} -> {}bn", reason, affine)
        self.out.plans[name] = replace(plan, proof=proof)

    def _before(self, name: str, bn: nn.Module) -> Plan:
        """Into what makes the input of the batch norm."""
        affine = self._affine(bn)
        failure: Stop | None = None
        for swap in (False, True):
            try:
                walks = []
                for calls in self._by_run(bn):
                    starts = [(n, _channels(n.inputs[0], affine)) for n in calls]
                    walks.append(self.walker.back(starts, swap))
                edits = by_module(walks, self.calls, self.names.__getitem__)
                break
            except Stop as stop:
                failure = failure or stop
        else:
            assert failure is not None
            raise failure
        self._aliases(bn)
        changes = {m: self._edit(m, edit, after=True) for m, edit in edits.items()}
        changes[bn] = self.site(bn).becomes(IDENTITY)
        ways = list(dict.fromkeys(step for walk in walks for step in reversed(walk.trail)))
        reason = "nothing else uses the output of its partner"
        return self._commit(name, changes, ways, "{} -> {}bn", reason, affine)

    def _after(self, name: str, bn: nn.Module) -> Plan:
        """Into all that uses the output of the batch norm."""
        affine = self._affine(bn)
        edits, ways = self._ahead(bn, affine)
        self._aliases(bn)
        changes = {m: self._edit(m, edit, after=False) for m, edit in edits.items()}
        changes[bn] = self.site(bn).becomes(IDENTITY)
        reason = "everything that uses its output absorbs it"
        return self._commit(name, changes, ways, "bn -> {1}{0}", reason, affine)

    def _scale_only(self, name: str, bn: nn.Module) -> Plan:
        """The scale into all that uses the output; an addition per channel stays."""
        affine = self._affine(bn)
        live = affine.scale != 0
        rest = torch.where(live, affine.shift / torch.where(live, affine.scale, 1.0), 0.0)
        edits, ways = self._ahead(
            bn, ScaleShift(affine.scale, torch.where(live, 0.0, affine.shift))
        )
        changes = {m: self._edit(m, edit, after=False) for m, edit in edits.items()}
        changes[bn] = self.site(bn).becomes(SHIFT, rest)
        dtype = next(iter(self.calls[bn]))[1].outputs[0].dtype
        if bool((rest.abs() > torch.finfo(dtype).max / 4).any()):  # room for what it is added to
            raise FoldRefused("the remaining shift overflows")
        reason = "everything that uses its output absorbs its scale; the shift stays an addition"
        return self._commit(
            name, changes, ways, "scale of bn -> {1}{0}", reason, affine, reduced=True
        )

    def _untied(self, name: str, bn: nn.Module) -> Plan:
        """A layer before several batch norms: each of them becomes its own copy of it."""
        plans, changes = untie(self, bn)
        for other, plan in plans.items():
            self.out.plans[other] = plan
            self.out.reasons.pop(other, None)
        self._store(changes)
        return plans[name]

    def _branch(self, name: str, bn: nn.Module) -> Plan:
        """A batch norm beside a convolution of the same input, both summed: into that one."""
        affine = self._affine(bn)
        changes = into_branch(self, bn, affine)
        reason = "it is added to the output of a convolution of the same input"
        return self._commit(name, changes, [], "bn + {}", reason, affine)

    # what they share

    def _affine(self, bn: nn.Module) -> ScaleShift:
        site = self.site(bn)
        if site.role != NORM:
            raise Stop("")
        assert site.affine is not None
        return site.affine

    def _ahead(
        self, bn: nn.Module, affine: ScaleShift
    ) -> tuple[dict[nn.Module, ScaleShift], list[str]]:
        walks = []
        for calls in self._by_run(bn):
            starts = [(n.outputs[0], _channels(n.outputs[0], affine)) for n in calls]
            walks.append(self.walker.ahead(starts))
        edits = by_module(walks, self.calls, self.names.__getitem__)
        if not edits:
            raise Stop("nothing after the batch norm can take its scale")
        return edits, list(dict.fromkeys(step for walk in walks for step in walk.trail))

    def _by_run(self, bn: nn.Module) -> Iterator[list[Node]]:
        for run in self.runs:
            if calls := [node for other, node in self.calls[bn] if other is run]:
                yield calls

    def _edit(self, module: nn.Module, affine: ScaleShift, after: bool) -> Site:
        site = self.site(module)
        if site.role == LAYER:
            return (sites.after_layer if after else sites.before_layer)(site, affine)
        if module in self.affines:
            raise Stop(f"{self.names[module]} is no plain batch norm")
        return (sites.after_norm if after else sites.before_norm)(site, affine)

    def _commit(
        self,
        name: str,
        changes: dict[nn.Module, Site],
        ways: list[str],
        form: str,
        reason: str,
        affine: ScaleShift,
        reduced: bool = False,
    ) -> Plan:
        bn = self.norms[name]
        partners = [module for module in changes if module is not bn]
        kinds = dict.fromkeys(_kind(changes[m]) for m in partners)
        way = "".join(f"{step} -> " for step in ways)
        rule = form.format(" + ".join(kinds), way)
        size = sum(self._untied_bytes(module) for module in partners)
        self._store(changes)
        scale = float(affine.scale.abs().amax())
        names = tuple(self.names[m] for m in partners)
        return Plan(name, rule, names, reason, reduced, scale, size)

    def _store(self, changes: dict[nn.Module, Site]) -> None:
        for module, site in changes.items():
            if site.role == IDENTITY:
                for run, node in self.calls.get(module, ()):
                    self._join(run, node)
        self.out.sites.update(changes)

    def _untied_bytes(self, module: nn.Module) -> int:
        """Bytes of a weight that the module shared with others until now."""
        weight = module._parameters.get("weight")
        site = self.out.sites.get(module)
        if weight is None or (site is not None and site.changed) or not inspect.is_layer(module):
            return 0
        owners = self.owners.get(inspect.storage_key(weight) or 0, ())
        return weight.numel() * weight.element_size() if len(owners) > 1 else 0

    def _foreign(self, module: nn.Module) -> str:
        return next((r.foreign[id(module)] for r in self.runs if id(module) in r.foreign), "")

    def _closed(self, module: nn.Module) -> str:
        """Why a layer or batch norm must not be edited, or nothing."""
        name = self.names[module]
        if reason := self._foreign(module):
            return f"{name}'s {reason}"
        if inspect.is_layer(module):
            return inspect.layer_reason(module) or ""
        if module not in self.open:
            return f"the batch norm {name} stays as it is"
        return ""

    # memory

    def _aliases(self, bn: nn.Module) -> None:
        """An identity gives its input back: nothing may write to one and read the other."""
        for run, node in self.calls[bn]:
            self._clash(run, node)

    def _clash(self, run: Run, node: Node) -> None:
        if run.clash(*self._groups(run, node), node.index):
            raise Stop("its output is overwritten in place while its input is still in use")

    def _groups(self, run: Run, node: Node) -> tuple[set[int], set[int]]:
        a, b = (
            self.groups.get((id(run), value.memory), {value.memory})
            if value.memory is not None
            else set()
            for value in (node.inputs[0], node.outputs[0])
        )
        return a, b

    def _join(self, run: Run, node: Node) -> None:
        a, b = self._groups(run, node)
        whole = a | b
        for memory in whole:
            self.groups[(id(run), memory)] = whole


def _channels(value: Value, affine: ScaleShift) -> Change:
    """The change of a batch norm's input or output: channels are axis 1."""
    return along(1, len(value.shape), affine.scale, affine.shift)


def _kind(site: Site) -> str:
    if site.layer is not None:
        return inspect.rule_name(site.layer).removesuffix(" -> bn")
    return "bn"
