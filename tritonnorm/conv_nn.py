"""A convolution or linear layer with its batch norm as one module.

Each computes ``activation(bn(layer(input)) + residual)``. In training that is the layer, and then
the fused batch norm. In eval mode it is the layer alone, with the batch norm folded into its weight
and bias. The parameters stay those of the two submodules, so a state_dict has the keys of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import nn as ours
from .joined import Joined

_Size = int | tuple[int, ...]


class _ConvBatchNorm(Joined):
    conv: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: str | _Size = 0,
        dilation: _Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str | None = None,
        activation_args: Sequence[float] = (),
    ) -> None:
        conv: Any = self._layer_class
        norm: Any = self._norm_class
        super().__init__(
            conv(
                in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
                padding_mode, device, dtype,
            ),
            norm(
                out_channels, eps, momentum, device=device, dtype=dtype,
                activation=activation, activation_args=activation_args,
            ),
        )  # fmt: skip


class ConvBatchNorm1d(_ConvBatchNorm):
    """`torch.nn.Conv1d` over ``(N, C, L)``, then `tritonnorm.nn.BatchNorm1d`, as one module.

    The submodules are ``conv`` and ``bn``. In eval mode, where nothing asks for gradients of the
    parameters, one convolution runs, with a weight and bias that are folded in float64, rounded
    once, and kept until a parameter, a buffer or the mode changes. Both submodules run where
    gradients of the parameters are asked for, under torch.compile and torch.export, with hooks on a
    submodule, and where the folded weight does not fit its dtype.

    Args:
        in_channels: and all up to ``padding_mode``, as in `torch.nn.Conv1d`.
        device: of all parameters and buffers.
        dtype: of all parameters and buffers.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None for a cumulative average.
        activation: name of an activation of `tritonnorm.activation.ACTIVATIONS`, or None.
        activation_args: its parameters.

    Raises:
        ValueError: what the two modules refuse.
    """

    _layer_class, _norm_class = nn.Conv1d, ours.BatchNorm1d


class ConvBatchNorm2d(_ConvBatchNorm):
    """`torch.nn.Conv2d`, then `tritonnorm.nn.BatchNorm2d`, as `ConvBatchNorm1d` is."""

    _layer_class, _norm_class = nn.Conv2d, ours.BatchNorm2d


class ConvBatchNorm3d(_ConvBatchNorm):
    """`torch.nn.Conv3d`, then `tritonnorm.nn.BatchNorm3d`, as `ConvBatchNorm1d` is."""

    _layer_class, _norm_class = nn.Conv3d, ours.BatchNorm3d


class _ConvTransposeBatchNorm(Joined):
    conv: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: _Size = 0,
        output_padding: _Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: _Size = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str | None = None,
        activation_args: Sequence[float] = (),
    ) -> None:
        conv: Any = self._layer_class
        norm: Any = self._norm_class
        super().__init__(
            conv(
                in_channels, out_channels, kernel_size, stride, padding, output_padding, groups,
                bias, dilation, padding_mode, device, dtype,
            ),
            norm(
                out_channels, eps, momentum, device=device, dtype=dtype,
                activation=activation, activation_args=activation_args,
            ),
        )  # fmt: skip

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        output_size: list[int] | None = None,
    ) -> Tensor:
        """``activation(bn(conv(input, output_size)) + residual)``."""
        return self._compute(input, residual, output_size)


class ConvTransposeBatchNorm1d(_ConvTransposeBatchNorm):
    """`torch.nn.ConvTranspose1d`, then `tritonnorm.nn.BatchNorm1d`, as `ConvBatchNorm1d` is."""

    _layer_class, _norm_class = nn.ConvTranspose1d, ours.BatchNorm1d


class ConvTransposeBatchNorm2d(_ConvTransposeBatchNorm):
    """`torch.nn.ConvTranspose2d`, then `tritonnorm.nn.BatchNorm2d`, as `ConvBatchNorm1d` is."""

    _layer_class, _norm_class = nn.ConvTranspose2d, ours.BatchNorm2d


class ConvTransposeBatchNorm3d(_ConvTransposeBatchNorm):
    """`torch.nn.ConvTranspose3d`, then `tritonnorm.nn.BatchNorm3d`, as `ConvBatchNorm1d` is."""

    _layer_class, _norm_class = nn.ConvTranspose3d, ours.BatchNorm3d


class LinearBatchNorm1d(Joined):
    """`torch.nn.Linear` over ``(N, C)``, then `tritonnorm.nn.BatchNorm1d`, as `ConvBatchNorm1d` is.

    The submodules are ``linear`` and ``bn``. With an input of three dimensions the batch norm acts
    on the second, which is not the layer's: both submodules run then.
    """

    _layer_class, _norm_class = nn.Linear, ours.BatchNorm1d
    _key = "linear"
    linear: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str | None = None,
        activation_args: Sequence[float] = (),
    ) -> None:
        super().__init__(
            nn.Linear(in_features, out_features, bias, device, dtype),
            ours.BatchNorm1d(
                out_features, eps, momentum, device=device, dtype=dtype,
                activation=activation, activation_args=activation_args,
            ),
        )  # fmt: skip
