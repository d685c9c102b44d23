"""Proof of data flow by torch.fx, for models that trace: the graph shows each use of a value."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Collection
from typing import Any

from torch import Tensor, fx, nn

from tritonnorm.flow.guard import StateGuard, quiet_run, storage_key
from tritonnorm.fold.inspect import FOLDABLE, PRODUCERS

# What Python code may ask of a value without reading its elements.
_METADATA = frozenset({"shape", "dtype", "device", "ndim", "size", "dim", "numel", "is_cuda"})


class Traced:
    """One symbolic trace of a model.

    Attributes:
        graph: the graph, or None when the model does not trace.
        failure: why there is no graph; empty otherwise.
        leaves: names of the modules that are called and not looked into.
    """

    def __init__(
        self, model: nn.Module, defaults: bool, leaves: Collection[str] | None = None
    ) -> None:
        self.graph: fx.Graph | None = None
        self.failure = ""
        self.model = model
        self._kept: set[fx.Node] = set()
        self._names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(id(module), []).append(name)
        tracer = _Tracer(leaves)
        guard = _ReadGuard(model)
        self._read = guard.seen
        try:
            with quiet_run(), guard:
                self.graph = tracer.trace(model, _defaults(model) if defaults else None)
        except Exception as error:
            self.failure = (
                f"{type(error).__name__}: {str(error).splitlines()[0]}"
                if str(error)
                else type(error).__name__
            )
        finally:
            guard.restore()
        if self.graph is not None:
            gc.collect()
            self._kept = {node for node, proxy in tracer.proxies if proxy() is not None}
        self.leaves = tracer.leaves
        self._targets: dict[str, list[fx.Node]] = {}
        for node in self.graph.nodes if self.graph else ():
            if node.op in ("call_module", "get_attr"):
                self._targets.setdefault(str(node.target), []).append(node)

    @property
    def steps(self) -> list[str]:
        """What the forward does, in order, whatever the modules are that it calls."""
        nodes = self.graph.nodes if self.graph else ()
        return [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in nodes]

    def producer(self, bn: nn.Module) -> nn.Module | str:
        """The layer whose output goes only into the batch norm, or why there is none."""
        calls = [node for name in self._names[id(bn)] for node in self._targets.get(name, ())]
        if not calls:
            return "the batch norm is not called in the traced forward"
        if len(calls) > 1:
            return "the batch norm is called more than once"
        node = calls[0]
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return "the batch norm is called with more than one input"
        if reason := self._touched(bn, "the batch norm"):
            return reason
        return self._source(node, node.args[0])

    def _source(self, node: fx.Node, source: fx.Node) -> nn.Module | str:
        through = source
        while through.op == "call_module" and type(self._module(through)) is nn.Identity:
            if reason := self._single(through, node):
                return reason
            node, through = through, through.all_input_nodes[0]
        if through.op != "call_module":
            return f"the batch norm follows {_describe(through)}"
        module = self._module(through)
        if type(module) not in PRODUCERS:
            return f"the batch norm follows {_describe(through)} ({type(module).__name__})"
        name = str(through.target)
        if len(self._targets[name]) > 1:
            return f"{name} is called more than once"
        return self._single(through, node) or self._touched(module, name) or module

    def _module(self, node: fx.Node) -> nn.Module:
        return self.model.get_submodule(str(node.target))

    def _single(self, node: fx.Node, user: fx.Node) -> str:
        users = [other for other in node.users if not _asks_metadata(other)]
        if users != [user]:
            others = ", ".join(_describe(other) for other in users if other is not user)
            return f"the output of {node.target} is also used by {others}"
        if node in self._kept:
            return f"the output of {node.target} is kept by the model"
        return ""

    def _touched(self, module: nn.Module, what: str) -> str:
        prefixes = tuple(f"{name}." for name in self._names[id(module)])
        used = any(target.startswith(prefixes) for target in self._targets)
        keys = {storage_key(t) for t in (*module.parameters(), *module.buffers())}
        if used or keys & self._read:
            return f"the tensors of {what} are read outside its own call"
        return ""


class _Tracer(fx.Tracer):
    """Stops at layers and batch norms, ours included, and knows which values the model keeps."""

    def __init__(self, leaves: Collection[str] | None) -> None:
        super().__init__()
        self.proxies: list[tuple[fx.Node, weakref.ref[fx.Proxy]]] = []
        self.leaves: set[str] = set()
        self._known = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self._known is not None:
            return module_qualified_name in self._known
        leaf = type(m) in FOLDABLE or super().is_leaf_module(m, module_qualified_name)
        if leaf:
            self.leaves.add(module_qualified_name)
        return leaf

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = super().proxy(node)
        self.proxies.append((node, weakref.ref(proxy)))
        return proxy


class _ReadGuard(StateGuard):
    """Notes which of the model's tensors take part in operations that run during the trace."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.seen: set[int | None] = set()

    def reads(self, func: Any, tensors: list[Tensor]) -> None:
        self.seen |= {storage_key(tensor) for tensor in tensors}


def traces(model: nn.Module) -> list[Traced] | str:
    """Traces that together cover the optional arguments given and not given; or why there are none.

    A hook on a module that the trace walks through could see values that the graph does not show.
    """
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has a hook, so a trace does not see every use"
    found = []
    for defaults in (False, True) if _defaults(model) else (False,):
        traced = Traced(model, defaults)
        if traced.graph is None:
            return f"torch.fx cannot trace the model ({traced.failure})"
        found.append(traced)
    return found


def changed(model: nn.Module, before: list[Traced]) -> str:
    """Why an edited model may do something else than it did; empty when it takes the same steps.

    A forward may look at its modules, at the class of one or whether it has a bias.
    """
    for traced, defaults in zip(before, (False, True), strict=False):
        now = Traced(model, defaults, traced.leaves)
        if now.failure:
            return f"the folded model does not run ({now.failure})"
        if now.steps != traced.steps:
            return "the forward of the folded model takes other steps"
    return ""


def _defaults(model: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _asks_metadata(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _METADATA
    return node.op == "call_method" and node.target in _METADATA


def _describe(node: fx.Node) -> str:
    if node.op == "output":
        return "the model's output"
    if node.op == "placeholder":
        return f"the model's input {node.target}"
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
