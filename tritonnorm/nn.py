"""Modules that take the place of torch.nn's: same constructor, same state_dict, subclasses of the
originals.

Each computes ``activation(batch_norm(input) + residual)``. They differ from their originals by two
attributes, ``activation`` and ``activation_args``, and by the optional second argument of
``forward``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from . import functional
from .activation import resolve

# torch >= 2.13 builds a batch norm with a weight and no bias.
_HAS_BIAS_ARGUMENT = "bias" in inspect.signature(torch.nn.BatchNorm2d).parameters


class _FusedBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """Shared by the three modules; mixed in before the torch class of each rank."""

    activation: str | None = None
    activation_args: tuple[float, ...] = ()

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
        act, _ = resolve(activation, activation_args)
        options = {"bias": bias} if _HAS_BIAS_ARGUMENT else {}
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **options
        )
        if not bias and not _HAS_BIAS_ARGUMENT:
            self.register_parameter("bias", None)
        self.activation = act.name if act else None
        self.activation_args = tuple(float(a) for a in activation_args)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(batch_norm(input) + residual)``.

        Args:
            input: ``[N, C, ...]`` of the rank of the module's name.
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
        if not has_torch_function((input,)):
            self._check_input_dim(input)
        track = self.training and self.track_running_stats
        use_buffers = track or not self.training
        running_mean = self.running_mean if use_buffers else None
        running_var = self.running_var if use_buffers else None
        counter = self.num_batches_tracked if track else None
        return functional.batch_norm(
            input,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            # Without a counter a cumulative average has nothing to count: torch leaves the buffers
            # alone.
            0.0 if self.momentum is None and counter is None else self.momentum,
            self.eps,
            activation=activation,
            activation_args=activation_args,
            residual=residual,
            num_batches_tracked=counter,
        )

    def extra_repr(self) -> str:
        """The original's description, and the activation if there is one."""
        text = super().extra_repr()
        if self.activation is not None:
            text += f", activation={self.activation}"
        if self.activation_args:
            text += f", activation_args={self.activation_args}"
        return text


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
