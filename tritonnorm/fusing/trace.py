"""The code of one module as a graph: its own calls, with the modules that it calls as single nodes.

A trace shows one way through Python code. Whatever chose that way is noted, so that the fused code
can check it in every call: arguments that are no tensors, attributes, children. Code that lets
something else choose is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
import itertools
import operator
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tritonnorm.flow.guard import quiet_run
from tritonnorm.fusing.arguments import Arguments, Refused
from tritonnorm.fusing.restoring import Before, dice
from tritonnorm.fusing.sources import reads_of
from tritonnorm.fusing.watch import Spies, Unwatched

_CONTAINERS = (dict, list, tuple, torch.Size)
_MODES = ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled")
# As they are, whatever stands in their place during a trace.
_grad_enabled, _autocast_enabled, _inference_enabled = (getattr(torch, name) for name in _MODES)
# What code may ask of a parameter without its choice going stale.
_CONSTANT = frozenset({"shape", "size", "dim", "ndim", "numel"})


@dataclass
class Code:
    """The graphs of one module.

    Attributes:
        graphs: by `module.training`; the same graph twice where the mode makes no difference.
        reads: attributes that the code reads, as (object, name, frozen value); the mode apart.
        parents: modules with children that the code reads.
    """

    graphs: dict[bool, fx.Graph]
    reads: list[tuple[Any, str, Any]]
    parents: list[nn.Module]


def trace(module: nn.Module, arguments: Arguments, inline: list[nn.Module]) -> Code:
    """The graphs of a module, with the code of the modules in `inline` in the place of their calls.

    Raises:
        Refused: there is none that can be trusted.
    """
    helpers: list[Callable[..., Any]] = []
    while True:
        try:
            return _traced(module, arguments, inline, helpers)
        except Refused as refusal:
            if refusal.helper is None or refusal.helper in helpers:
                raise
            helpers.append(refusal.helper)  # its call becomes one node


def _traced(
    module: nn.Module,
    arguments: Arguments,
    inline: list[nn.Module],
    helpers: list[Callable[..., Any]],
) -> Code:
    walked = [module, *inline]
    seen = _Seen()
    graphs = {
        mode: _trace(module, arguments, walked, helpers, seen, training=mode, on=mode)
        for mode in (True, False)
    }
    alike = _text(graphs[True]) == _text(graphs[False])
    if seen.modes or not alike:
        for mode, graph in graphs.items():
            other = _trace(module, arguments, walked, helpers, seen, training=mode, on=not mode)
            if _text(other) != _text(graph):
                raise Refused("its code depends on whether gradients or autocast are on")
    if alike:
        graphs[False] = graphs[True]
    reads = []
    for thing, name, value in seen.reads.values():
        if name == "training" and isinstance(thing, nn.Module):
            if not any(thing is m for m in walked):
                raise Refused("its code looks at the mode of another module")
        else:
            reads.append((thing, name, value))
    reads += list(reads_of(walked, reads))
    return Code(graphs, reads, list(seen.parents))


@dataclass
class _Seen:
    """What traces saw that the graphs do not show; `modes` if the code asked for one of PyTorch."""

    reads: dict[tuple[int, str], tuple[Any, str, Any]] = field(default_factory=dict)
    parents: dict[nn.Module, None] = field(default_factory=dict)
    modes: bool = False

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Notes whether the code asks whether gradients or autocast are on."""
        before = {name: getattr(torch, name) for name in _MODES}

        def noting(ask: Callable[..., bool]) -> Callable[..., bool]:
            def asked(*args: Any) -> bool:
                self.modes = True
                return ask(*args)

            return asked

        try:
            for name, ask in before.items():
                setattr(torch, name, noting(ask))
            yield
        finally:
            for name, ask in before.items():
                setattr(torch, name, ask)


def _text(graph: fx.Graph) -> list[str]:
    return [f"{n.op} {n.name} {n.target} {n.args} {n.kwargs}" for n in graph.nodes]


def _trace(
    module: nn.Module,
    arguments: Arguments,
    walked: list[nn.Module],
    helpers: list[Callable[..., Any]],
    seen: _Seen,
    training: bool,
    on: bool,
) -> fx.Graph:
    modes = [m.training for m in walked]
    thrown = dice()
    tracer = _Tracer(walked, arguments, helpers)
    for m in walked:
        m.__dict__["training"] = training
    before = [Before(m) for m in module.modules()]
    try:
        with quiet_run(), torch.set_grad_enabled(on), contextlib.ExitStack() as stack:
            stack.enter_context(_autocast(on))
            tracer.base = tracer.surroundings()
            spies = stack.enter_context(Spies(seen.reads, seen.parents))
            for m in walked:
                if not spies.watch(m):
                    raise Refused("its class cannot be watched")
            stack.enter_context(_RealOperations())
            stack.enter_context(seen.asked())
            graph = tracer.trace(module)
    except (Refused, Unwatched) as known:
        raise Refused(str(known)) from None
    except Exception as error:
        text = " ".join(str(error).split())[:120]
        refusal = Refused(f"{type(error).__name__}{': ' if text else ''}{text}")
        refusal.helper = _helper(error, walked)
        raise refusal from None
    finally:
        changed = {old.put_back() for old in before}
        for m, mode in zip(walked, modes, strict=True):
            m.__dict__["training"] = mode
    if changed != {""}:
        raise Refused(max(changed))
    if dice() != thrown:
        raise Refused("its code draws random numbers")
    if any(proxy() is not None for proxy in tracer.alive):
        gc.collect(1)  # unpacking a value leaves cycles, which are young
    if any(proxy() is not None for proxy in tracer.alive):
        raise Refused("its code keeps a value beyond the call")
    return graph


@contextlib.contextmanager
def _autocast(on: bool) -> Iterator[None]:
    """Autocast for every device, so that code that turns it off, or asks for it, shows."""
    before = [(kind, torch.is_autocast_enabled(kind)) for kind in ("cpu", "cuda")]
    for kind, _ in before:
        torch.set_autocast_enabled(kind, on)
    try:
        yield
    finally:
        for kind, was in before:
            torch.set_autocast_enabled(kind, was)


def _helper(error: Exception, walked: list[nn.Module]) -> Callable[..., Any] | None:
    """The function of the code's own Python module in which an error arose."""
    codes = {inspect.unwrap(type(m).forward).__code__ for m in walked}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for outer, inner in itertools.pairwise(frames):
        found = outer.f_globals.get(inner.f_code.co_name)
        same = isinstance(found, FunctionType) and found.__code__ is inner.f_code
        if outer.f_code in codes and same and found.__module__.partition(".")[0] != "torch":
            return found
    return None


class _Proxy(fx.Proxy):
    """A value; unlike torch.fx's, its graph shows additions and products in place as such."""

    _is_param = _is_buffer = False  # which a module asks when it is assigned

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            raise Refused(f"its code sets `{name}` of a value")
        super().__setattr__(name, value)

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Value(_Proxy):
    """A value that is a tensor, also for `isinstance` and `hasattr`."""

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            raise AttributeError(f"'Tensor' object has no attribute '{name}'")
        return super().__getattr__(name)

    @property
    def __class__(self) -> Any:
        return Tensor

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("a traced value has no other class")


_PROXIES = (_Proxy, _Value, fx.Proxy, fx.proxy.Attribute)


class _Tracer(fx.Tracer):
    def __init__(
        self,
        walked: list[nn.Module],
        arguments: Arguments,
        helpers: list[Callable[..., Any]],
    ) -> None:
        super().__init__(autowrap_functions=tuple(helpers))
        self.walked = {id(m) for m in walked}
        self.arguments = arguments
        self.alive: list[weakref.ref[fx.Proxy]] = []
        self.base: tuple[Any, ...] | None = None

    @staticmethod
    def surroundings() -> tuple[Any, ...]:
        """Modes of PyTorch that a `with` in the code could have changed."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        autocast = tuple(_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        return _grad_enabled(), _inference_enabled(), autocast, hooks is None

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if self.base is not None and self.surroundings() != self.base:
            raise Refused("its code switches gradients, autocast or saved tensors")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) not in self.walked

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if overrides_call(m):
            raise Refused(f"{type(m).__name__} overrides __call__")
        return super().call_module(m, forward, args, kwargs)

    def create_arg(self, a: Any) -> Any:
        if type(a) in (_Proxy, _Value):
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, fx.Proxy):
            owned = (*self.root.parameters(), *self.root.buffers())
            if not any(a is tensor for tensor in owned):
                for name, buffer in self.root.named_buffers():
                    if _same_memory(a, buffer):  # `Variable(self.buffer)` in older code
                        return self.create_node("get_attr", name, (), {})
                raise Refused("its code uses a tensor that is no parameter or buffer")
        if isinstance(a, dict | list | tuple) and type(a) not in _CONTAINERS:
            if dataclasses.is_dataclass(a) and isinstance(a, dict):  # as transformers returns
                values = {f.name: getattr(a, f.name) for f in dataclasses.fields(a)}
                return self.create_proxy("call_function", type(a), (), values).node
            if not hasattr(a, "_fields"):
                raise Refused(f"its code makes a {type(a).__name__}")
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        plain = node.op == "call_module" and type(
            self.root.get_submodule(str(node.target))
        ).__module__.startswith("torch.nn.modules")
        tensor = node.op == "placeholder" or plain
        proxy = _Value(node, self) if tensor else _Proxy(node, self)
        if node.op == "call_module":
            self.alive.append(weakref.ref(proxy))
        return proxy

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        names, constants, root = self.arguments.tensors, self.arguments.constants, self.root

        def call(*tensors: Any) -> Any:
            return root_fn(root, **dict(zip(names, tensors, strict=True)), **constants)

        return call, [self.create_proxy("placeholder", name, (), {}) for name in names]


def _same_memory(one: Tensor, two: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        alike = one.shape == two.shape and one.stride() == two.stride() and one.dtype == two.dtype
        return alike and one.numel() > 0 and one.data_ptr() == two.data_ptr()


def overrides_call(module: nn.Module) -> bool:
    """Whether a call of the module does more than `torch.nn.Module` does."""
    order = type(module).__mro__
    return any("__call__" in c.__dict__ for c in order[: order.index(nn.Module)])


class _RealOperations(TorchFunctionMode):
    """Refuses operations on real tensors: the graph would hold their results as constants."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        leaves = tree_leaves((args, kwargs))
        if not any(type(leaf) in _PROXIES for leaf in leaves) and name not in _CONSTANT:
            raise Refused(f"its code calls {name or func} on no traced value")
        return func(*args, **kwargs)
