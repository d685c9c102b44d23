"""Modules that take the place of torch.nn's: same constructor, same state_dict, subclasses of the
originals.

Each computes ``activation(batch_norm(input) + residual)``. They differ from their originals by two
attributes, ``activation`` and ``activation_args``, and by the optional second argument of
``forward``. `BatchNormAct2d` has the signature of timm's instead, with the activation as a module.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as _module

from . import functional
from .activated import Activated, named
from .activation import of_module, resolve
from .conditions import has_override

# torch >= 2.13 builds a batch norm with a weight and no bias.
_HAS_BIAS_ARGUMENT = "bias" in inspect.signature(torch.nn.BatchNorm2d).parameters


class _FusedBatchNorm(Activated, torch.nn.modules.batchnorm._BatchNorm):
    """Shared by the three modules; mixed in before the torch class of each rank."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        activation_args: Sequence[float] = (),
    ) -> None:
        chosen = named(activation, activation_args)  # refuses before anything is built
        options = {"bias": bias} if _HAS_BIAS_ARGUMENT else {}
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **options
        )
        if not bias and not _HAS_BIAS_ARGUMENT:
            self.register_parameter("bias", None)
        self.activation, self.activation_args = chosen

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(batch_norm(input) + residual)``.

        Args:
            input: ``[N, C, ...]`` of the rank of the module's name.
            residual: shape and dtype of ``input``, added before the activation.
        """
        return self.run(input, residual, self.activation, self.activation_args)

    def epilogue(self) -> tuple[str | None, tuple[float, ...]] | None:
        """Name and parameters of the activation; None if the module runs something else too."""
        return self.activation, self.activation_args

    def run(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: str | None,
        activation_args: tuple[float, ...],
        slope: Tensor | None = None,
    ) -> Tensor:
        """`forward` with an activation that is given, not that of the module."""
        if not has_override((input,)):
            self._check_input_dim(input)
        training = self.training
        track = training and self.track_running_stats
        weight, bias, mean, var, counter = self._tensors()
        use_buffers = track or not training
        counter, momentum = (counter if track else None), self.momentum
        if counter is not None and counter.dtype != torch.int64:  # as torch's module takes it
            counter.add_(1)
            momentum, counter = (1.0 / float(counter) if momentum is None else momentum), None
        return functional.batch_norm(
            input,
            mean if use_buffers else None,
            var if use_buffers else None,
            weight,
            bias,
            training or (mean is None and var is None),
            # Without a counter a cumulative average has nothing to count: torch leaves the buffers
            # alone.
            0.0 if momentum is None and counter is None else momentum,
            self.eps,
            activation=activation,
            activation_args=activation_args,
            residual=residual,
            num_batches_tracked=counter,
            slope=slope,
        )

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """Weight, bias, running mean and variance, counter.

        As attributes each would cost the host a failed look-up and a call; a parametrised tensor is
        an attribute only.
        """
        parameters, buffers = self._parameters, self._buffers
        try:
            return (
                *(parameters["weight"], parameters["bias"]),
                *(buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]),
            )
        except KeyError:
            found = (self.running_mean, self.running_var, self.num_batches_tracked)
            return (self.weight, self.bias, *found)


class BatchNorm1d(_FusedBatchNorm, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` over ``(N, C)`` or ``(N, C, L)``, with activation and residual fused.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None for a cumulative average.
        affine: learn a weight and a bias per channel.
        track_running_stats: keep running statistics, and use them in eval mode.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers.
        bias: learn a bias, if affine.
        activation: name of an activation of `tritonnorm.activation.ACTIVATIONS`, or None.
        activation_args: its parameters.

    Raises:
        ValueError: the activation is unknown or its parameters are too many.
    """


class BatchNorm2d(_FusedBatchNorm, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` over ``(N, C, H, W)``, with activation and residual fused.

    Arguments as in `BatchNorm1d`. Channels-last input gives channels-last output, without copies.
    """


class BatchNorm3d(_FusedBatchNorm, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` over ``(N, C, D, H, W)``, with activation and residual fused.

    Arguments as in `BatchNorm1d`. Channels-last input gives channels-last output, without copies.
    """


class BatchNormAct2d(BatchNorm2d):
    """Batch norm over ``(N, C, H, W)``, drop and activation: the signature of timm's class of this
    name, for models that take it as ``norm_layer``.

    `act` and `drop` are submodules, as there, so a `state_dict` goes either way. One kernel runs
    batch norm and activation if `act` is exactly a class of torch that
    `tritonnorm.activation.ACTIVATIONS` has, without hooks, and `drop` does nothing. Otherwise the
    three run one after the other. The attribute `activation` is not used.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None for a cumulative average.
        affine: learn a weight and a bias per channel.
        track_running_stats: keep running statistics, and use them in eval mode.
        apply_act: False makes `act` an identity.
        act_layer: class of the activation, or a function that makes one; the name of an activation
            as `tritonnorm.BatchNorm2d` takes it; or None for no activation.
        act_kwargs: its arguments.
        inplace: given to ``act_layer`` if that takes it.
        drop_layer: class of a module between the batch norm and the activation, or None.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers.

    Raises:
        ValueError: ``act_layer`` is a name that is unknown.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: Any = torch.nn.ReLU,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.drop = torch.nn.Identity() if drop_layer is None else drop_layer()
        self.act = _activation_module(act_layer if apply_act else None, act_kwargs or {}, inplace)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(drop(batch_norm(input)) + residual)``.

        Args:
            input: ``[N, C, H, W]``.
            residual: shape and dtype of ``input``, added before the activation.
        """
        found = self.epilogue()
        if found is not None and not (_hooked(self.drop) or _hooked(self.act)):
            return self.run(input, residual, *found)
        y = self.drop(self.run(input, None, None, ()))
        return self.act(y if residual is None else y + residual)

    def epilogue(self) -> tuple[str | None, tuple[float, ...]] | None:
        """Name and parameters of `act`; None if it, or `drop`, is more than that."""
        drop, act = self.drop, self.act
        dropout = isinstance(drop, torch.nn.modules.dropout._DropoutNd) and not drop.training
        idle = dropout or type(drop) is torch.nn.Identity
        return of_module(act) if idle else None


def _activation_module(layer: Any, options: dict[str, Any], inplace: bool) -> torch.nn.Module:
    """What timm's models mean by ``act_layer``."""
    if isinstance(layer, str):
        found, _ = resolve(layer)
        layer = None if found is None else found.module
    if layer is None:
        return torch.nn.Identity()
    if inplace and "inplace" not in options:
        with contextlib.suppress(TypeError):
            return layer(**options, inplace=True)
    return layer(**options)


def _hooked(module: torch.nn.Module) -> bool:
    own = module.__dict__
    everywhere = any(getattr(_module, f"_global{name}") for name in _HOOKS)
    return everywhere or "forward" in own or any(own[name] for name in _HOOKS)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
