"""SyncBatchNorm, and the conversion of a model's batch norms to it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritonnorm import nn as ours
from tritonnorm.activated import named
from tritonnorm.conditions import has_override
from tritonnorm.nn import _HAS_BIAS_ARGUMENT, _FusedBatchNorm

from .functional import sync_batch_norm

torch.fx.wrap("sync_batch_norm")  # a traced model calls it as it is, with its collectives


class _Synchronized(_FusedBatchNorm):
    """The statistics of all ranks in training; mixed in before a class of `tritonnorm.nn`."""

    process_group: Any = None

    def run(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: str | None,
        activation_args: tuple[float, ...],
        slope: Tensor | None = None,
    ) -> Tensor:
        group = self._group() if self.training else None
        if group is None:
            return super().run(input, residual, activation, activation_args, slope)
        if slope is not None:  # its sum is none of those that the ranks exchange
            y = self.run(input, residual, None, ())
            return F.prelu(y, slope.to(y.dtype))
        if not has_override((input,)):
            self._check_input_dim(input)
            if input.shape[1] == 0:
                raise ValueError("input: expected at least one channel, got 0")
        track = self.track_running_stats
        counter = self.num_batches_tracked if track else None
        return sync_batch_norm(
            input,
            self.running_mean if track else None,
            self.running_var if track else None,
            self.weight,
            self.bias,
            0.0 if self.momentum is None and counter is None else self.momentum,
            self.eps,
            group.size(),
            group.group_name,
            activation,
            activation_args,
            residual,
            counter,
        )

    def _group(self) -> Any:
        """The process group if it has more than one rank, this one among them; else None."""
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_initialized():
            return None
        group = self.process_group
        if group is None:
            group = distributed.group.WORLD
        return group if distributed.get_world_size(group) > 1 else None


class SyncBatchNorm(_Synchronized, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm`, with activation and residual fused, on GPUs and on the CPU.

    In training its statistics are those of the batches of all ranks of a process group, which may
    be of different sizes, and empty on some ranks. Forward and backward each take one collective;
    none waits for the GPU. The gradients of weight and bias are those of this rank's batch: data
    parallel wrappers average them. In eval mode, without an initialised process group, and in a
    group of one rank it is a plain batch norm. Unlike torch's it takes CPU tensors, over gloo.

    Args:
        num_features: C of an input ``[N, C, ...]``.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None for a cumulative average.
        affine: learn a weight and a bias per channel.
        track_running_stats: keep running statistics, and use them in eval mode.
        process_group: the ranks that share statistics; None for all.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers.
        bias: learn a bias, if affine.
        activation: name of an activation of `tritonnorm.activation.ACTIVATIONS`, or None.
        activation_args: its parameters.

    Raises:
        ValueError: the activation is unknown or its parameters are too many.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        activation_args: Sequence[float] = (),
    ) -> None:
        chosen = named(activation, activation_args)
        options = {"bias": bias} if _HAS_BIAS_ARGUMENT else {}
        nn.SyncBatchNorm.__init__(
            self, num_features, eps, momentum, affine, track_running_stats, process_group,
            device, dtype, **options,
        )  # fmt: skip
        if not bias and not _HAS_BIAS_ARGUMENT:
            self.register_parameter("bias", None)
        self.activation, self.activation_args = chosen

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """`tritonnorm.convert_sync_batchnorm`."""
        return convert_sync_batchnorm(module, process_group)


class SyncBatchNormAct2d(_Synchronized, ours.BatchNormAct2d):
    """`BatchNormAct2d` with the statistics of all ranks: what `convert_sync_batchnorm` makes of
    it."""


_CONVERTED: dict[type[nn.Module], type[nn.Module]] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), SyncBatchNorm),
    **dict.fromkeys((ours.BatchNorm1d, ours.BatchNorm2d, ours.BatchNorm3d), SyncBatchNorm),
    nn.SyncBatchNorm: SyncBatchNorm,
    ours.BatchNormAct2d: SyncBatchNormAct2d,
}
_SYNCHRONIZED = (SyncBatchNorm, SyncBatchNormAct2d)
_BEFORE = "_tritonnorm_before_sync"  # class and process group of a converted module


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Give every batch norm of a model the statistics of all ranks, in place.

    Each batch norm stays the same object, by a change of class: its parameters, buffers, hooks,
    training flag, its activation, and every place that holds it. Batch norms that are synchronised
    already get the process group.

    Args:
        module: a model of batch norms of torch and of this library, or one of them. Those of other
            classes (a subclass may compute something else) stay, with a warning.
        process_group: the ranks that share statistics; None for all.

    Returns:
        The same module. `revert_sync_batchnorm` takes it back.

    Raises:
        ValueError: it is not a module.
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    for name, found in module.named_modules():
        own = type(found)
        if own in _CONVERTED and "forward" not in found.__dict__:
            state = found.__dict__
            state[_BEFORE] = (own, state.get("process_group"))
            found.__class__ = _CONVERTED[own]
            state["process_group"] = process_group
        elif own in _SYNCHRONIZED:
            found.process_group = process_group
        elif isinstance(found, _BatchNorm):
            warnings.warn(
                f"{name or 'the model'}: a {own.__module__}.{own.__qualname__} is left, which may "
                "compute something else than a batch norm of torch.nn",
                stacklevel=2,
            )
    return module


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Undo `convert_sync_batchnorm`: every module it changed gets its class back.

    Args:
        module: the model; it is edited in place.

    Returns:
        The same module.
    """
    for found in module.modules():
        state = found.__dict__
        if type(found) in _SYNCHRONIZED and _BEFORE in state:
            own, group = state.pop(_BEFORE)
            found.__class__ = own
            del state["process_group"]
            if own is nn.SyncBatchNorm:
                state["process_group"] = group
    return module
