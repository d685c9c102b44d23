"""From the graphs of a block and its sites to Python code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from torch import fx, nn

from tritonnorm.activation import PRELU
from tritonnorm.fusing.activations import settings_of
from tritonnorm.fusing.arguments import Arguments
from tritonnorm.fusing.forward import FusedForward, fused, fused_add
from tritonnorm.fusing.match import Site
from tritonnorm.fusing.trace import Code
from tritonnorm.fusing.watch import Global, Kind


def build(
    module: nn.Module,
    code: Code,
    arguments: Arguments,
    inline: list[nn.Module],
    sites: dict[int, list[Site]],
    order: tuple[str, ...],
) -> FusedForward:
    """The forward of a block.

    Args:
        module: the block.
        code: its graphs.
        arguments: what it is called with.
        inline: the modules whose code is in the graphs.
        sites: what to fuse in each graph, by its id.
        order: the names of the positional arguments.
    """
    skipped: dict[nn.Module, None] = dict.fromkeys(inline)
    norms: dict[nn.Module, None] = {}
    reads = list(code.reads)
    sources: dict[bool, str] = {}
    scope: dict[str, Any] = {}
    done: dict[int, str] = {}
    tree = _tree(module, code, inline)
    for training, graph in code.graphs.items():
        if id(graph) not in done:
            for site in sites[id(graph)]:
                norms[module.get_submodule(str(site.norm.target))] = None
                for node in site.modules:
                    partner = module.get_submodule(str(node.target))
                    skipped[partner] = None
                    reads += [(partner, k, v) for k, v in settings_of(partner)]
            python = _rewritten(graph, sites[id(graph)]).python_code("self")
            done[id(graph)] = python.src.strip() + "\n"
            scope.update(python.globals)
        sources[training] = done[id(graph)]
    if sources[True] == sources[False]:
        sources[False] = sources[True]
    constants = arguments.constants
    defaults = inspect.signature(type(module).forward).parameters
    given = tuple(k for k, v in constants.items() if defaults[k].default is not v)
    unique = {(id(m), name): (m, name, value) for m, name, value in reads}
    return FusedForward(
        module,
        sources=sources,
        names=arguments.tensors,
        order=order,
        constants=constants,
        given=given,
        skipped=(*skipped, *norms),
        norms=tuple(norms),
        tree=tree,
        kinds=tuple((m, Kind(type(m))) for m in dict.fromkeys((module, *inline, *skipped))),
        reads=tuple(unique.values()),
        globals=_needed(scope, sources.values()),
    )


def _rewritten(graph: fx.Graph, sites: list[Site]) -> fx.Graph:
    """A copy of a graph with one call in the place of each site."""
    copy, new = fx.Graph(), dict[fx.Node, fx.Node]()
    copy.output(copy.graph_copy(graph, new))
    for site in sites:
        name, args = site.activation or (None, ())
        norm, last = new[site.norm], new[site.last]
        with copy.inserting_before(new[site.anchor]):
            bn, x = copy.create_node("get_attr", str(norm.target)), norm.args[0]
            slope: tuple[fx.Node, ...] = ()
            if name == PRELU.name:
                slope, args = (copy.create_node("get_attr", str(args[0])),), ()
            if site.add is None or site.residual is None:
                call = copy.call_function(fused, (bn, x, name, args, *slope))
            else:
                given = (bn, x, new[site.residual], name, args, *site.add, *slope)
                call = copy.call_function(fused_add, given)
        last.replace_all_uses_with(call)
        for node in (*site.drop, site.norm):
            copy.erase_node(new[node])
        new[site.last] = call  # a later site may have it as its residual
    for node in [n for n in copy.nodes if n.op == "get_attr" and not n.users]:
        copy.erase_node(node)  # the slope of a call of F.prelu
    copy.lint()
    return copy


def _tree(
    module: nn.Module, code: Code, inline: list[nn.Module]
) -> tuple[tuple[nn.Module, tuple[Any, ...]], ...]:
    """The containers on the way to every module that is called, with their children."""
    found = dict.fromkeys((module, *inline, *code.parents))
    for graph in {id(g): g for g in code.graphs.values()}.values():
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                parts = str(node.target).split(".")[:-1]
                for depth in range(1, len(parts) + 1):
                    found[module.get_submodule(".".join(parts[:depth]))] = None
    return tuple((m, tuple(m._modules.values())) for m in found)


def _needed(scope: dict[str, Any], sources: Iterable[str]) -> dict[str, Any]:
    """The names that the code uses; a module by its name, so that all of it can be pickled."""
    used = set(re.findall(r"\w+", " ".join(sources)))
    modules = {k: Global(v.__name__) for k, v in scope.items() if isinstance(v, ModuleType)}
    return {k: modules.get(k, v) for k, v in scope.items() if k in used}
