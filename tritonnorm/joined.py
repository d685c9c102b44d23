"""What the modules of `conv_nn` share: a layer, its batch norm, and their fold in eval mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import activation as activations
from . import folding
from . import nn as ours
from .activated import torch_class
from .conditions import has_override, transformed
from .folding import Folded, Source
from .settings import logger

_Self = TypeVar("_Self", bound="Joined")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Cache:
    """A folded weight and bias, and what they were computed from.

    The aliases keep the memory of their sources, so that an address cannot come back with other
    contents. ``folded`` is None where the fold was refused.
    """

    def __init__(self, source: Source, folded: Folded | None) -> None:
        self.aliases = [None if t is None else t.detach() for t in source.tensors]
        self.facts = [None if t is None else _facts(t) for t in source.tensors]
        self.eps = source.eps
        self.folded = folded

    def holds_for(self, tensors: tuple[Tensor | None, ...], eps: float) -> bool:
        """Whether the sources are still the same memory, with as many writes to it."""
        if eps != self.eps:
            return False
        for before, now in zip(self.facts, tensors, strict=True):
            if before is None or now is None:
                if before is not None or now is not None:
                    return False
            elif now.__class__ is not before[0] or before != _facts(now):
                return False
        return True


def _facts(t: Tensor) -> tuple[Any, ...]:
    version = -1 if t.is_inference() else t._version
    return t.__class__, version, t.data_ptr(), t.shape, t.stride(), t.dtype, t.device


class Joined(nn.Module):
    """A layer, then a batch norm. `_key` is the name of the layer in the module.

    Attributes:
        bn: the batch norm, one of `tritonnorm.nn`, which holds activation and eps.
    """

    _layer_class: type[nn.Module]
    _norm_class: type[nn.Module]
    _key = "conv"
    bn: Any

    def __init__(self, layer: nn.Module, bn: nn.Module) -> None:
        super().__init__()
        self._modules[self._key] = layer
        self.bn = bn
        self._folded: _Cache | None = None

    @classmethod
    def from_modules(
        cls: type[_Self],
        layer: nn.Module,
        bn: nn.Module,
        *,
        activation: str | None = None,
        activation_args: Sequence[float] = (),
    ) -> _Self:
        """Join two modules that exist; the parameters and buffers stay the same objects.

        Args:
            layer: exactly of torch's class.
            bn: torch's batch norm of the rank, or this library's, which is used as it is.
            activation: name of the activation after torch's batch norm, or None.
            activation_args: its parameters.

        Raises:
            ValueError: a module is of another class, their channels differ, or an activation is
                given although ``bn`` has its own.
        """
        plain = torch_class(cls._norm_class)
        if type(layer) is not cls._layer_class:
            expected = cls._layer_class.__name__
            raise ValueError(f"layer: expected torch.nn.{expected}, got {type(layer).__name__}")
        if type(bn) not in (plain, cls._norm_class):
            raise ValueError(f"bn: expected torch.nn.{plain.__name__}, got {type(bn).__name__}")
        channels = getattr(layer, "out_channels", None) or layer.out_features
        if channels != bn.num_features:
            raise ValueError(f"bn: expected {channels} channels, got {bn.num_features}")
        if type(bn) is plain:
            options = {"activation": activation, "activation_args": activation_args}
            bn = _as_ours(cls._norm_class, bn, options)
        elif activation is not None or activation_args:
            raise ValueError("activation: expected None, as bn is a batch norm with its own")
        joined = cls.__new__(cls)
        Joined.__init__(joined, layer, bn)
        joined.training = bn.training
        return joined

    @property
    def layer(self) -> Any:
        """The layer, whatever its name."""
        return self._modules[self._key]

    def is_plain(self) -> bool:
        """Whether both modules are what they were built as, without hooks, with statistics."""
        return _foldable(self.layer, self.bn, self._layer_class, self._norm_class)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(bn(layer(input)) + residual)``.

        Args:
            input: what the layer takes.
            residual: shape and dtype of the layer's output, added before the activation.
        """
        return self._compute(input, residual)

    def _compute(self, input: Tensor, residual: Tensor | None, *size: Any) -> Tensor:
        layer, bn = self.layer, self.bn
        folded = self._fold(input, residual, layer, bn)
        if folded is None:
            y = layer(input, *size)
            if isinstance(bn, ours._FusedBatchNorm):
                return bn(y) if residual is None else bn(y, residual)
            # `fold` was here: only the activation is left.
            return bn(y if residual is None else y + residual)
        y = folding.run(layer, input, folded, *size)
        if residual is not None:
            folding.check_residual(residual, y)
            y = y + residual
        if bn.activation is None:
            return y
        return activations.apply(*activations.resolve(bn.activation, bn.activation_args), y)

    def _fold(self, input: Tensor, residual: Tensor | None, layer: Any, bn: Any) -> Folded | None:
        """The weight and bias that need no batch norm after them, or None to run both modules."""
        if bn.training or not self.is_plain():
            return None
        if has_override((input, residual)) or input.dim() != folding.dimensions(layer):
            return None
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None  # the graph outlives the values of the parameters
        if transformed() is not None:
            return None
        p, q, buffers = layer._parameters, bn._parameters, bn._buffers
        tensors = (
            p["weight"], p["bias"], buffers["running_mean"], buffers["running_var"],
            q["weight"], q["bias"],
        )  # fmt: skip
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return None
        known = self._folded
        if known is not None and known.holds_for(tensors, bn.eps):
            return known.folded
        source = Source.of(layer, bn)
        if not source.plain:
            return None
        if any(t is not None and t.is_inference() for t in tensors):
            return _fold_once(source)  # without version counters nothing can be remembered
        self._folded = _Cache(source, _fold_once(source))
        return self._folded.folded

    def refresh(self) -> None:
        """Let go of the folded weight; the next forward in eval mode folds again.

        Needed only after writing through ``parameter.data`` or a NumPy view in eval mode, which
        leaves no trace that could be noticed. `train` and `eval` do it too.
        """
        self._folded = None

    def train(self: _Self, mode: bool = True) -> _Self:
        """As `torch.nn.Module.train`; the folded weight is computed anew."""
        self._folded = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": None}  # copies and pickles start without


def _fold_once(source: Source) -> Folded | None:
    with torch.inference_mode(False), torch.no_grad():
        exact = folding.fold(source)
        reason = folding.refusal(source, exact)
        if reason is not None:
            logger.info("a batch norm in eval mode is not folded: %s", reason)
            return None
        return folding.rounded(exact, source.weight)


def _foldable(layer: Any, bn: Any, layer_class: Any, norm_class: Any) -> bool:
    """Whether both modules are plain, so that not running them cannot be noticed."""
    if type(layer) is not layer_class or type(bn) is not norm_class:
        return False
    if bn._buffers.get("running_mean") is None or "weight" not in layer._parameters:
        return False
    for module in (layer, bn):
        own = module.__dict__
        if "forward" in own or any([own[name] for name in _HOOKS]):  # noqa: C419  a list is faster
            return False
    return True


def _as_ours(kind: Any, bn: Any, options: dict[str, Any]) -> nn.Module:
    """A batch norm of this library that holds the parameters and buffers of torch's."""
    made = kind(
        bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats, device="meta",
        **options,
    )  # fmt: skip
    made._parameters.update(bn._parameters)
    made._buffers.update(bn._buffers)
    made.training = bn.training
    return made
