"""Group, layer, instance and RMS norm as modules, in the manner of `nn`: same constructor, same
state_dict, subclasses of torch's.

Each computes ``activation(norm(input) + residual)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritonnorm import functional
from tritonnorm.activated import Activated, named
from tritonnorm.activation import apply, resolve
from tritonnorm.conditions import has_override

# torch >= 2.13 builds group and instance norms with a weight and no bias.
_HAS_BIAS_ARGUMENT = "bias" in inspect.signature(torch.nn.GroupNorm).parameters


def _bias(module: torch.nn.Module, bias: bool) -> None:
    """Without a bias, also where torch has no argument for that."""
    if not bias and not _HAS_BIAS_ARGUMENT:
        module.register_parameter("bias", None)


class _Fused(Activated):
    """Activation and residual; mixed in before the torch class."""

    def run(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: str | None,
        activation_args: tuple[float, ...],
    ) -> Tensor:
        """`forward` with an activation that is given, not that of the module."""
        raise NotImplementedError


class GroupNorm(_Fused, torch.nn.GroupNorm):
    """`torch.nn.GroupNorm` over ``(N, C, ...)``, with activation and residual fused.

    Channels-last input gives channels-last output, without copies.

    Args:
        num_groups: a divisor of the channels.
        num_channels: C.
        eps: added to the variance.
        affine: learn a weight and a bias per channel.
        device: of the parameters.
        dtype: of the parameters.
        bias: learn a bias, if affine.
        activation: name of an activation of `tritonnorm.activation.ACTIVATIONS`, or None.
        activation_args: its parameters.

    Raises:
        ValueError: the activation is unknown or its parameters are too many, or what torch refuses.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        activation_args: Sequence[float] = (),
    ) -> None:
        options = {"bias": bias} if _HAS_BIAS_ARGUMENT else {}
        super().__init__(num_groups, num_channels, eps, affine, device, dtype, **options)
        _bias(self, bias)
        self.activation, self.activation_args = named(activation, activation_args)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(group_norm(input) + residual)``.

        Args:
            input: ``[N, C, ...]``.
            residual: shape and dtype of ``input``, added before the activation.
        """
        return self.run(input, residual, self.activation, self.activation_args)

    def run(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: str | None,
        activation_args: tuple[float, ...],
    ) -> Tensor:
        """`forward` with an activation that is given, not that of the module."""
        return functional.group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps,
            residual=residual, activation=activation, activation_args=activation_args,
        )  # fmt: skip


class LayerNorm(_Fused, torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimensions, with activation and residual fused.

    Args:
        normalized_shape: the last dimensions, or the size of the last one.
        eps: added to the variance.
        elementwise_affine: learn a weight and a bias per element.
        bias: learn a bias, if elementwise_affine.
        device: of the parameters.
        dtype: of the parameters.
        activation: name of an activation of `tritonnorm.activation.ACTIVATIONS`, or None.
        activation_args: its parameters.

    Raises:
        ValueError: the activation is unknown or its parameters are too many.
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        activation_args: Sequence[float] = (),
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.activation, self.activation_args = named(activation, activation_args)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(layer_norm(input) + residual)``.

        Args:
            input: ``[..., *normalized_shape]``.
            residual: shape and dtype of ``input``, added before the activation.
        """
        return self.run(input, residual, self.activation, self.activation_args)

    def run(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: str | None,
        activation_args: tuple[float, ...],
    ) -> Tensor:
        """`forward` with an activation that is given, not that of the module."""
        return functional.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps,
            residual=residual, activation=activation, activation_args=activation_args,
        )  # fmt: skip


class RMSNorm(_Fused, torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimensions, with activation and residual fused.

    Args:
        normalized_shape: the last dimensions, or the size of the last one.
        eps: added to the mean square; None is the epsilon of float32 (of float64 for float64).
        elementwise_affine: learn a weight per element.
        device: of the parameters.
        dtype: of the parameters.
        activation: name of an activation of `tritonnorm.activation.ACTIVATIONS`, or None.
        activation_args: its parameters.

    Raises:
        ValueError: the activation is unknown or its parameters are too many.
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        activation_args: Sequence[float] = (),
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.activation, self.activation_args = named(activation, activation_args)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(rms_norm(input) + residual)``.

        Args:
            input: ``[..., *normalized_shape]``.
            residual: shape and dtype of ``input``, added before the activation.
        """
        return self.run(input, residual, self.activation, self.activation_args)

    def run(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: str | None,
        activation_args: tuple[float, ...],
    ) -> Tensor:
        """`forward` with an activation that is given, not that of the module."""
        return functional.rms_norm(
            input, self.normalized_shape, self.weight, self.eps,
            residual=residual, activation=activation, activation_args=activation_args,
        )  # fmt: skip


class _InstanceNorm(_Fused, torch.nn.modules.instancenorm._InstanceNorm):
    """Shared by the three modules; mixed in before the torch class of each rank."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        activation_args: Sequence[float] = (),
    ) -> None:
        options = {"bias": bias} if _HAS_BIAS_ARGUMENT else {}
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **options
        )
        _bias(self, bias)
        self.activation, self.activation_args = named(activation, activation_args)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(instance_norm(input) + residual)``.

        Args:
            input: ``[N, C, ...]`` of the rank of the module's name, or one sample ``[C, ...]``.
            residual: shape and dtype of ``input``, added before the activation.
        """
        return self.run(input, residual, self.activation, self.activation_args)

    def run(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: str | None,
        activation_args: tuple[float, ...],
    ) -> Tensor:
        """`forward` with an activation that is given, not that of the module."""
        if has_override((input,)):
            return self._normalized(input, residual, activation, activation_args)
        self._check_input_dim(input)
        one = input.dim() == self._get_no_batch_dim()
        if input.shape[0 if one else 1] != self.num_features:  # torch warns, or raises
            y = super().forward(input)
            y = y if residual is None else y + residual
            return apply(*resolve(activation, activation_args), y)
        if not one:
            return self._normalized(input, residual, activation, activation_args)
        residual = None if residual is None else residual.unsqueeze(0)
        y = self._normalized(input.unsqueeze(0), residual, activation, activation_args)
        return y.squeeze(0)

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return self._normalized(input, None, None, ())

    def _normalized(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: str | None,
        activation_args: tuple[float, ...],
    ) -> Tensor:
        return functional.instance_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum, self.eps,
            residual=residual, activation=activation, activation_args=activation_args,
        )  # fmt: skip


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` over ``(N, C, L)`` or ``(C, L)``, with activation and residual
    fused.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics.
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


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` over ``(N, C, H, W)`` or ``(C, H, W)``, with activation and
    residual fused.

    Arguments as in `InstanceNorm1d`. Channels-last input gives channels-last output.
    """


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` over ``(N, C, D, H, W)`` or ``(C, D, H, W)``, with activation and
    residual fused.

    Arguments as in `InstanceNorm1d`. Channels-last input gives channels-last output.
    """
