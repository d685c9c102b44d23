"""The classes that `freeze` gives to a layer and to its batch norm, and the fold of all of them.

The layer runs with the folded weight and bias; the batch norm only adds the residual and applies
its activation. A `Group` folds all layers of a model before each of its forwards. A layer that runs
outside of that folds for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import activation as activations
from . import conditions, folding
from . import nn as ours
from .activated import Activated
from .folding import Folded, Source


def fold_all(sources: Sequence[Source]) -> list[Folded]:
    """Folds that gradients flow through: by one launch for all pairs of the same dtypes, and where
    kernels cannot run, as PyTorch operations."""
    kinds: dict[Any, list[int]] = {}
    for i, source in enumerate(sources):
        kinds.setdefault(_kind(source), []).append(i)
    found: dict[int, Folded] = {}
    for kind, indices in kinds.items():
        some = [sources[i] for i in indices]
        if kind is None:
            folded = folding.differentiable(some)
        else:
            from . import fold_ops

            folded = fold_ops.fold(some)
        found.update(zip(indices, folded, strict=True))
    return [found[i] for i in range(len(sources))]


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _kind(source: Source) -> tuple[Any, ...] | None:
    """What pairs of one launch have in common, or None if the kernels cannot fold this one."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if not source.plain or conditions.surroundings(source.weight) is not None:
        return None
    if not conditions.has_triton() or source.weight.device.type not in ("cuda", "cpu"):
        return None
    from .kernels.folding import layout

    vectors = [t for t in source.tensors[1:] if t is not None]
    if layout(source) is None or not all(t.is_contiguous() for t in vectors):
        return None
    weight, bias, mean, var, gamma, beta = source.tensors
    assert weight is not None and mean is not None and var is not None
    affine = {t.dtype for t in (gamma, beta) if t is not None} or {mean.dtype}
    if (bias is not None and bias.dtype != weight.dtype) or var.dtype != mean.dtype:
        return None
    dtypes = (weight.dtype, *affine, mean.dtype)
    if len(affine) > 1 or any(d not in _DTYPES for d in dtypes):
        return None
    if len({t.device for t in (weight, *vectors)}) > 1:
        return None
    return (weight.device, *dtypes)


class State:
    """What a frozen layer knows: its batch norm, and the fold of the forward that is running."""

    def __init__(self, bn: nn.Module) -> None:
        self.bn = bn
        self.folded: Folded | None = None
        self.open = False  # while the forward of the whole model runs

    def __getstate__(self) -> dict[str, Any]:
        return {"bn": self.bn, "folded": None, "open": False}

    def take(self) -> Folded | None:
        """The fold that the whole model made, if this call belongs to that forward.

        Also in backward, where a checkpoint runs the forward again. A reentrant one ran without
        gradients first; its second run has a backward of its own, and so has to fold for itself.
        """
        folded = self.folded
        again = torch._C._current_graph_task_id() != -1
        if folded is None or not (self.open or again):
            return None
        if folded.weight.requires_grad and not torch.is_grad_enabled():
            self.folded = None
        return folded


class FrozenLayer(nn.Module):
    """Mixed in before the class of a layer; `_frozen` is its `State`."""

    _frozen: State

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """What the layer and its batch norm compute; ``output_size`` as in the layer's class."""
        expected = folding.dimensions(self)
        if input.dim() != expected:
            raise ValueError(f"input: expected {expected} dimensions, got {input.dim()}")
        folded = None if torch.compiler.is_compiling() else self._frozen.take()
        if folded is None:
            (folded,) = fold_all([Source.of(self, self._frozen.bn)])
        return folding.run(self, input, folded, output_size)


class FrozenNorm(Activated):
    """Mixed in before the class of a batch norm: nothing is left of it but its activation."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(input + residual)``."""
        if residual is not None:
            folding.check_residual(residual, input)
            input = input + residual
        found = activations.resolve(self.activation, self.activation_args)
        return activations.apply(*found, input)


class Group:
    """Folds the layers of a model in one go; its two methods are hooks of the model."""

    def __init__(self, layers: Sequence[FrozenLayer]) -> None:
        self.layers = list(layers)

    def before(self, module: nn.Module, args: Any) -> None:
        """Fold all layers for the forward that begins."""
        if torch.compiler.is_compiling():
            return
        states = [layer._frozen for layer in self.layers]
        for state in states:
            state.folded = None  # before the new ones are made: both need the memory
        sources = [Source.of(layer, s.bn) for layer, s in zip(self.layers, states, strict=True)]
        for state, folded in zip(states, fold_all(sources), strict=True):
            state.folded, state.open = folded, True

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """The forward is over, also when it raised. Its backward may run parts of it again."""
        if torch.compiler.is_compiling():
            return
        for layer in self.layers:
            state = layer._frozen
            state.open = False
            if state.folded is not None and not state.folded.weight.requires_grad:
                state.folded = None


def launches_of(model: nn.Module) -> list[list[Source]]:
    """The pairs that each launch of a frozen model folds together; those without kernels are left
    out."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    groups = {getattr(hook, "__self__", None): None for hook in hooks}
    together = [group.layers for group in groups if isinstance(group, Group)]
    grouped = {layer for layers in together for layer in layers}
    alone = [m for m in model.modules() if isinstance(m, FrozenLayer) and m not in grouped]
    found: list[list[Source]] = []
    for layers in [*together, *([layer] for layer in alone)]:
        kinds: dict[Any, list[Source]] = {}
        for source in (Source.of(layer, layer._frozen.bn) for layer in layers):
            kinds.setdefault(_kind(source), []).append(source)
        found += [sources for kind, sources in kinds.items() if kind is not None]
    return found


def _derived(mixin: type[nn.Module], plain: type[nn.Module], prefix: str) -> type[nn.Module]:
    name = f"{prefix}{plain.__name__}"
    found = type(name, (mixin, plain), {"__module__": __name__, "__doc__": mixin.__doc__})
    globals()[name] = found  # where a pickle looks for it
    return found


_NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
)
#: Plain class -> frozen class.
LAYERS = {plain: _derived(FrozenLayer, plain, "Frozen") for plain in folding.LAYERS}
NORMS = {plain: _derived(FrozenNorm, plain, "Frozen") for plain in _NORMS} | {
    plain: _derived(FrozenNorm, plain, "FrozenFused")
    for plain in (ours.BatchNorm1d, ours.BatchNorm2d, ours.BatchNorm3d)
}
PLAIN = {frozen: plain for plain, frozen in (LAYERS | NORMS).items()}
