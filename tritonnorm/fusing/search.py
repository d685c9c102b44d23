"""Which blocks of a model can be fused: the smallest modules whose code shows a whole site.

The modules are traced from the leaves up. Where a norm is the last thing in a module, or an
activation the first, the module around it is traced once more with the code of the inner one in
place of its call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from tritonnorm.fusing import activations, match
from tritonnorm.fusing.arguments import Arguments, Refused, arguments_of, positional
from tritonnorm.fusing.build import build
from tritonnorm.fusing.forward import HOOKS, FusedForward
from tritonnorm.fusing.match import Site
from tritonnorm.fusing.trace import Code, overrides_call, trace

Given = Mapping[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]
_DEPTH = 8  # rounds in which the code of inner modules is put in place; models need 3


@dataclass
class Fused:
    """One norm that is fused: where, how, and with which module, if it is one."""

    block: nn.Module
    rule: str
    partner: nn.Module | None


@dataclass
class Found:
    """What there is to fuse in a model.

    Attributes:
        forwards: the new forward of each block.
        fused: what each norm is fused with.
        reasons: why the others are not.
    """

    forwards: dict[nn.Module, FusedForward] = field(default_factory=dict)
    fused: dict[nn.Module, Fused] = field(default_factory=dict)
    reasons: dict[nn.Module, str] = field(default_factory=dict)

    def drop(self, block: nn.Module, reason: str) -> None:
        """Leave a block as it is."""
        del self.forwards[block]
        for bn in [bn for bn, fused in self.fused.items() if fused.block is block]:
            del self.fused[bn]
            self.reasons[bn] = reason


@dataclass
class _Traced:
    code: Code
    arguments: Arguments
    inline: list[nn.Module]


def search(model: nn.Module, norms: Mapping[nn.Module, str], given: Given | None = None) -> Found:
    """Look for sites in every module of a model. Nothing is changed.

    Args:
        model: the model.
        norms: the norms that may be fused, with their short names in rules.
        given: the arguments of one call of each module; without them all arguments that have no
            default are taken to be tensors.
    """
    return _Search(model, norms, given).run()


class _Search:
    def __init__(
        self, model: nn.Module, norms: Mapping[nn.Module, str], given: Given | None
    ) -> None:
        self.model, self.norms, self.given = model, norms, given
        self.names = {id(m): name or "the model" for name, m in model.named_modules()}
        self.known: dict[int, _Traced | str] = {}
        self.found = Found()

    def run(self) -> Found:
        inside = _counts(self.model, self.norms)
        for module in _children_first(self.model):
            own = getattr(type(module), "forward", None)  # raises in a scripted module
            code = own is not nn.Module.forward  # a ModuleList has none
            if code and inside[id(module)] and module not in self.norms and len(module._modules):
                self._block(module)
        for bn in self.norms:
            self.found.reasons.setdefault(bn, "no code that calls it was found")
        for bn in self.found.fused:
            self.found.reasons.pop(bn)
        return self.found

    def _block(self, module: nn.Module) -> None:
        base = self._traced(module)
        if isinstance(base, str):
            for child in module.modules():
                if child in self.norms and child not in self.found.fused:
                    what = f"the code of {self.names[id(module)]} cannot be followed: {base}"
                    self.found.reasons.setdefault(child, what)
            return
        sites, reasons = self._sites(module, base)
        deepest = self._deepest(module, base)
        if deepest is not base:
            more, reasons = self._sites(module, deepest)
            if any(bn not in sites or len(s.rule) > len(sites[bn].rule) for bn, s in more.items()):
                base, sites = deepest, more
        self.found.reasons.update(reasons)
        if any(self._better(bn, site.rule) for bn, site in sites.items()):
            self._fuse(module, base, list(sites.values()))

    def _better(self, bn: nn.Module, rule: str) -> bool:
        """Whether a rule takes more in than the one found so far."""
        return bn not in self.found.fused or len(rule) > len(self.found.fused[bn].rule)

    def _deepest(self, module: nn.Module, traced: _Traced) -> _Traced:
        """The trace with the inner code that matters in place; the given one if there is none."""
        for _ in range(_DEPTH):
            more = self._wanted(module, traced)
            if not more:
                break
            result = self._trace(module, [*traced.inline, *more])
            if isinstance(result, str):
                break
            traced = result
        return traced

    def _wanted(self, module: nn.Module, traced: _Traced) -> list[nn.Module]:
        """Called modules whose last norm or first activation belongs to a site here."""
        wanted: dict[nn.Module, None] = {}
        for node in traced.code.graphs[True].nodes:
            if node.op != "call_module":
                continue
            inner = self._module(module, node)
            ends = inner in self.norms or self._ends_with_norm(inner)
            if not ends:
                continue
            if inner not in self.norms and any(u.op != "output" for u in node.users):
                wanted[inner] = None
            value, _ = match.through_identities(node, lambda n: self._module(module, n))
            behind = [*value.users]
            if len(behind) == 1 and match.addition(behind[0]):
                behind += behind[0].users
            for user in behind:
                if user.op == "call_module" and len(user.args) == 1 and not user.kwargs:
                    after = self._module(module, user)
                    if self._is_activation(after):
                        wanted[after] = None
        return [m for m in wanted if m not in traced.inline and not self._closed(m)]

    def _ends_with_norm(self, module: nn.Module) -> bool:
        """Whether what a module returns is what a norm of it gives, or a sum with that."""
        if not _is_block(module) or self._closed(module):
            return False
        traced = self._traced(module)
        if isinstance(traced, str):
            return False
        value = _result(traced.code.graphs[True])
        while value is not None:
            if value.op == "call_module":
                inner = self._module(module, value)
                if inner in self.norms:
                    return True
                if type(inner) is nn.Identity and value.all_input_nodes:
                    value = value.all_input_nodes[0]
                    continue
                return self._ends_with_norm(inner)
            operands = match.addition(value)
            if operands is None:
                return False
            sides = [n for n in operands[1:] if isinstance(n, fx.Node) and n.op == "call_module"]
            inner_ = [self._module(module, n) for n in sides]
            return any(m in self.norms or self._ends_with_norm(m) for m in inner_)
        return False

    def _fresh(self, module: nn.Module) -> bool:
        """Whether the result of a module shares no memory with anything that existed before."""
        if isinstance(module, match.FRESH):
            return True
        if not _is_block(module) or self._closed(module):
            return False
        traced = self._traced(module)
        value = None if isinstance(traced, str) else _result(traced.code.graphs[True])
        if value is None or value.op != "call_module" or len(value.users) > 1:
            return False
        return self._fresh(self._module(module, value))

    def _is_activation(self, module: nn.Module) -> bool:
        """Whether the code of a module is an activation, or starts with one."""
        if not _is_block(module) or activations.of_module(module) or self._closed(module):
            return False
        traced = self._traced(module)
        if isinstance(traced, str):
            return False
        starts = [n for n in traced.code.graphs[True].nodes if n.op == "placeholder"]

        def module_of(node: fx.Node) -> nn.Module:
            return self._module(module, node)

        if len(starts) != 1:
            return False
        value, _ = match.through_identities(starts[0], module_of)
        if activations.activation(value, module_of):
            return True
        users = list(value.users)
        return (
            len(users) == 1
            and users[0].op == "call_module"
            and self._is_activation(module_of(users[0]))
        )

    # tracing

    def _traced(self, module: nn.Module) -> _Traced | str:
        if id(module) not in self.known:
            self.known[id(module)] = "it calls itself"
            self.known[id(module)] = self._trace(module, [])
        return self.known[id(module)]

    def _trace(self, module: nn.Module, inline: list[nn.Module]) -> _Traced | str:
        try:
            if "forward" in module.__dict__:
                raise Refused("its forward was replaced on the instance")
            given = None if self.given is None else self.given.get(module)
            if self.given is not None and given is None:
                raise Refused("it is not called on the example inputs")
            arguments = arguments_of(module, given)
            return _Traced(trace(module, arguments, inline), arguments, inline)
        except Refused as refusal:
            return str(refusal)

    def _closed(self, module: nn.Module) -> bool:
        """Whether the code of a module must not be run past its call."""
        hooks = any(getattr(module, name) for name in HOOKS)
        patched = "forward" in module.__dict__ or module._compiled_call_impl is not None
        return hooks or overrides_call(module) or patched

    def _module(self, module: nn.Module, node: fx.Node) -> nn.Module:
        return module.get_submodule(str(node.target))

    # the result

    def _sites(
        self, module: nn.Module, traced: _Traced
    ) -> tuple[dict[nn.Module, Site], dict[nn.Module, str]]:
        """The sites that the graphs of both modes have, and reasons."""

        def module_of(node: fx.Node) -> nn.Module:
            return self._module(module, node)

        graphs = traced.code.graphs
        calls = [module_of(n) for n in graphs[True].nodes if n.op == "call_module"]
        several = {bn for bn in self.norms if calls.count(bn) > 1}
        reasons: dict[nn.Module, str] = {}
        sites: dict[nn.Module, Site] = {}
        for found in match.sites(graphs[True], module_of, self.norms.get, self._fresh):
            node = found.norm if isinstance(found, Site) else found[0]
            bn = module_of(node)
            if not isinstance(found, Site):
                reasons[bn] = found[1]
            elif bn in several:
                reasons[bn] = "it is called more than once"
            elif self._closed(bn):
                reasons[bn] = "it has a hook, which would see another value"
            elif any(self._closed(module_of(n)) for n in found.modules):
                names = ", ".join(str(n.target) for n in found.modules)
                reasons[bn] = f"{names} has a hook, which would not be called"
            else:
                sites[bn] = found
        return sites, reasons

    def _fuse(self, module: nn.Module, traced: _Traced, sites: list[Site]) -> None:
        def module_of(node: fx.Node) -> nn.Module:
            return self._module(module, node)

        rules: dict[nn.Module, Fused] = {}
        for site in sites:
            behind = [module_of(n) for n in site.modules]
            partner = next((m for m in behind if type(m) is not nn.Identity), None)
            rules[module_of(site.norm)] = Fused(module, site.rule, partner)
        here = {norm: self.norms[norm] for norm in rules}
        graphs, others = traced.code.graphs, {id(traced.code.graphs[True]): sites}
        if graphs[False] is not graphs[True]:
            other = [
                s
                for s in match.sites(graphs[False], module_of, here.get, self._fresh)
                if isinstance(s, Site) and rules[module_of(s.norm)].rule == s.rule
            ]
            if {module_of(s.norm) for s in other} != set(rules):
                for bn in rules:
                    self.found.reasons[bn] = "training and eval mode do not have the same code"
                return
            others[id(graphs[False])] = other
        order = positional(module)
        self.found.forwards[module] = build(
            module, traced.code, traced.arguments, traced.inline, others, order
        )
        for bn, fused in rules.items():
            if self._better(bn, fused.rule):
                self.found.fused[bn] = fused


def _counts(model: nn.Module, norms: Mapping[nn.Module, str]) -> dict[int, bool]:
    return {id(m): any(n in norms for n in m.modules()) for m in model.modules()}


def _children_first(model: nn.Module) -> list[nn.Module]:
    return list(reversed(list(model.modules())))


def _is_block(module: nn.Module) -> bool:
    """Whether a module has code of its own that is worth looking at."""
    torchs = type(module).__module__.startswith("torch.")
    return type(module) is nn.Sequential or not torchs


def _result(graph: fx.Graph) -> fx.Node | None:
    """The one value that a graph returns."""
    output = next(n for n in graph.nodes if n.op == "output")
    value = output.args[0]
    return value if isinstance(value, fx.Node) else None
