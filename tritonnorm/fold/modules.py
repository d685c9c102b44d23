"""What a fold leaves in the place of a batch norm where it is not an identity."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tritonnorm import functional, settings
from tritonnorm.activation import apply, resolve

__all__ = ["AddActivation", "ChannelShift", "Zero"]


class AddActivation(nn.Module):
    """``activation(x + residual)``: what is left of a fused batch norm that takes a residual.

    Args:
        activation: the module of the activation, or None.
    """

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Add and activate; shapes as in `tritonnorm.BatchNorm2d`."""
        if residual is not None:
            x = x + residual
        return x if self.activation is None else self.activation(x)


class ChannelShift(nn.Module):
    """``x + shift`` with one number per channel: what is left when only the scale folds.

    Args:
        shift: ``[C]``, a buffer.
        tail: run on the result, with any further arguments; None for nothing.
        activation: name and parameters of an activation, as in `tritonnorm.BatchNorm2d`. On a GPU
            both run in one launch: a batch norm with mean -shift and variance 1.
    """

    shift: Tensor
    one: Tensor

    def __init__(
        self,
        shift: Tensor,
        tail: nn.Module | None = None,
        activation: tuple[str, tuple[float, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        if activation is not None:
            self.register_buffer("one", torch.ones_like(shift), persistent=False)
        self.tail = tail
        self.activation = activation

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        """Add to ``[N, C, ...]``; the dtype of ``x`` is kept."""
        kernels = (x.is_cuda or settings.interpreting()) and not settings.disabled()
        if self.activation is not None and kernels:
            name, args = self.activation
            return functional.batch_norm(
                x, -self.shift, self.one, eps=0.0, activation=name, activation_args=args
            )
        y = x + self.shift.to(x.dtype).view(-1, *(1,) * (x.dim() - 2))
        if self.activation is not None:
            return apply(*resolve(*self.activation), y)
        return y if self.tail is None else self.tail(y, *more)

    def extra_repr(self) -> str:
        """The number of channels, and the activation."""
        name = "" if self.activation is None else f", activation={self.activation[0]}"
        return f"{self.shift.numel()}{name}"


class Zero(nn.Module):
    """A zero, of shape (): what is left of a branch that another branch of the same sum took in."""

    def forward(self, x: Tensor) -> Tensor:
        """A zero of the dtype and device of ``x``."""
        return torch.zeros((), dtype=x.dtype, device=x.device)
