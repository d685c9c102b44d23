"""The forward of a block in which norms run together with what follows them.

It stands on the module object, as its attribute `forward`; the class keeps its own. Every call is
checked first: where anything is not as it was when the code was made, the class's own forward runs,
which computes the same without fusing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from tritonnorm.activation import apply, resolve
from tritonnorm.conditions import has_override, is_exporting
from tritonnorm.fusing.watch import Global, Kind, Unwatched, is_still
from tritonnorm.nn import _FusedBatchNorm
from tritonnorm.norms.nn import _Fused

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL = tuple(f"_global{name}" for name in HOOKS)
_OURS = (_FusedBatchNorm, _Fused)


def fused(
    norm: Any,
    x: Tensor,
    activation: str | None,
    args: tuple[float, ...],
    slope: Tensor | None = None,
) -> Tensor:
    """``activation(norm(x))``; shapes as in `tritonnorm.BatchNorm2d` and the other norms.

    A prelu has a slope ``[1]`` or ``[C]``. Where it cannot be part of the call, PyTorch's prelu
    follows.
    """
    if slope is None and not widens(activation, x):
        return norm.run(x, None, activation, args)
    if slope is None:
        return apply(*resolve(activation, args), norm.run(x, None, None, ()))
    if fits(x, slope):
        return norm.run(x, None, activation, args, slope)
    return F.prelu(norm.run(x, None, None, ()), slope)


WIDENED = {"cuda": frozenset({"softplus"})}  # by torch's own registrations for autocast


def widens(activation: str | None, x: Tensor) -> bool:
    """Whether autocast computes an activation in float32, and gives float32."""
    where = x.device.type
    return activation in WIDENED.get(where, ()) and torch.is_autocast_enabled(where)


def fits(x: Tensor, slope: Tensor) -> bool:
    """Whether PyTorch's prelu of values like x gives their dtype, and takes the slope.

    It refuses to mix dtypes. Under autocast it computes in that dtype, whatever it is given.
    """
    where = x.device.type
    if x.dim() < 2 or slope.dim() > 1 or slope.numel() not in (1, x.shape[1]):
        return False
    if torch.is_autocast_enabled(where):
        lower = torch.get_autocast_dtype(where)
        return x.dtype == lower and slope.dtype in (lower, torch.float32)
    return x.dtype == slope.dtype and x.device == slope.device


def fused_add(
    norm: Any,
    x: Tensor,
    residual: Any,
    activation: str | None,
    args: tuple[float, ...],
    written: str,
    first: bool,
    slope: Tensor | None = None,
) -> Tensor:
    """``activation(norm(x) + residual)``, or with the operands the other way round if not `first`.

    One call where both operands are alike; where they are broadcast or promoted, PyTorch's
    addition as it was written, "+" or "+=". Under autocast the result of a norm may be wider than
    `x`, and a residual that is written to would stay as it is.
    """
    if (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
        and (not widens(activation, x) if slope is None else fits(x, slope))
        and (first or written == "+" or not torch.is_autocast_enabled(x.device.type))
    ):
        return norm.run(x, residual, activation, args, *(() if slope is None else (slope,)))
    y = norm.run(x, None, None, ())
    add: Callable[[Any, Any], Any] = operator.iadd if written == "+=" else operator.add
    y = add(y, residual) if first else add(residual, y)
    return apply(*resolve(activation, args), y) if slope is None else F.prelu(y, slope)


class FusedForward:
    """The forward of one block.

    Attributes:
        module: the block.
        sources: the code as Python text, in training and in eval mode. It can be read.
        names: the arguments that are tensors, in the order of the code's.
        order: the names of all positional arguments of the class's forward.
        constants: the values that the other arguments must have.
        given: those of them that are not what the call gets without them.
        skipped: modules that are not called; they must have no hooks.
        norms: the norms among them.
        tree: modules with the children that they must have.
        kinds: modules with the classes that they must be of.
        reads: attributes, by module and name, and what they must be.
        globals: what the names in the code are.
    """

    def __init__(self, module: nn.Module, **parts: Any) -> None:
        self.module = module
        self.sources: dict[bool, str] = parts["sources"]
        self.names: tuple[str, ...] = parts["names"]
        self.order: tuple[str, ...] = parts["order"]
        self.constants: dict[str, Any] = parts["constants"]
        self.given: tuple[str, ...] = parts["given"]
        self.skipped: tuple[nn.Module, ...] = parts["skipped"]
        self.norms: tuple[nn.Module, ...] = parts["norms"]
        self.tree: tuple[tuple[nn.Module, tuple[Any, ...]], ...] = parts["tree"]
        self.kinds: tuple[tuple[nn.Module, Kind], ...] = parts["kinds"]
        self.reads: tuple[tuple[Any, str, Any], ...] = parts["reads"]
        self.globals: dict[str, Any] = parts["globals"]
        self._compile()

    def _compile(self) -> None:
        self._reads = [
            (thing.resolved() if isinstance(thing, Global) else thing, name, value)
            for thing, name, value in self.reads
        ]
        self._code = {}
        made: dict[str, Any] = {}
        for training, source in self.sources.items():
            if source not in made:
                scope = {
                    k: v.resolved() if isinstance(v, Global) else v for k, v in self.globals.items()
                }
                exec(compile(source, "<tritonnorm fused forward>", "exec"), scope)
                made[source] = scope["forward"]
            self._code[training] = made[source]

    def __getstate__(self) -> dict[str, Any]:
        return {
            key: value for key, value in self.__dict__.items() if key not in ("_code", "_reads")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._compile()

    def replicate(self) -> nn.Module:
        """A replica for `torch.nn.DataParallel`, which runs the class's forward: this one is tied
        to the module on the first GPU."""
        replica: nn.Module = type(self.module)._replicate_for_data_parallel(self.module)
        self.remove(replica)
        return replica

    def install(self) -> None:
        """Put it on the module."""
        self.module.__dict__.update(forward=self, _replicate_for_data_parallel=self.replicate)

    @staticmethod
    def remove(module: nn.Module) -> None:
        """Take such a forward off a module."""
        for name in ("forward", "_replicate_for_data_parallel"):
            module.__dict__.pop(name, None)

    def gone(self) -> bool:
        """Whether a module was replaced by another, so that this code never runs again: `fold` asks
        that of any forward on an object."""
        return any(tuple(m._modules.values()) != children for m, children in self.tree)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the forward of the class computes."""
        if not has_override(args) and not is_exporting():
            tensors = self.tensors(args, kwargs)
            if tensors is not None and holds(self):
                return self.run(*tensors)
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __code__(self) -> Any:
        """That of the class's forward, for which `torch.export` looks."""
        return type(self.module).forward.__code__

    def run(self, *tensors: Tensor) -> Any:
        """The fused code, unchecked."""
        return self._code[self.module.training](self.module, *tensors)

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The tensors in the order of the code, or None where the arguments are of other kinds."""
        if not kwargs and len(args) == len(self.names) and not self.constants:
            return args if all(isinstance(a, Tensor) for a in args) else None
        if len(args) > len(self.order):
            return None
        found = dict(zip(self.order, args, strict=False))
        found.update(kwargs)
        tensors = []
        for name in self.names:
            tensor = found.pop(name, None)
            if not isinstance(tensor, Tensor):
                return None
            tensors.append(tensor)
        if any(name not in found for name in self.given):
            return None
        for name, value in found.items():
            if name not in self.constants:
                return None
            constant = self.constants[name]
            if type(value) is not type(constant) or isinstance(value, Tensor):
                return None
            if value is not constant and value != constant:
                return None
        return tensors


def holds(forward: FusedForward) -> bool:
    """Whether everything is as it was when the code was made."""
    for name in _GLOBAL:
        if getattr(_torch_module, name):
            return False
    for module in forward.skipped:
        d = module.__dict__
        if (
            d["_forward_hooks"]
            or d["_forward_pre_hooks"]
            or d["_backward_hooks"]
            or d["_backward_pre_hooks"]
            or "forward" in d
        ):
            return False
    if not all(kind.still(module) for module, kind in forward.kinds):
        return False
    for norm in forward.norms:
        if not isinstance(norm, _OURS) or norm.activation is not None:
            return False
    for module, children in forward.tree:
        if tuple(module._modules.values()) != children:
            return False
    if len(forward.sources) > 1:
        mode = forward.module.training
        if any(module.training is not mode for module, _ in forward.tree):
            return False
    return all(_same(module, name, value) for module, name, value in forward._reads)


def _same(module: Any, name: str, value: Any) -> bool:
    try:
        return is_still(module, name, value)
    except (AttributeError, Unwatched):
        return False
