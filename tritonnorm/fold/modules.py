"""What a fold leaves in the place of a batch norm where it is not an identity.

Annotations are not postponed here: `torch.jit.script` reads them.
"""

import torch
from torch import Tensor, nn

from tritonnorm import functional, settings
from tritonnorm.activation import ACTIVATIONS

__all__ = ["AddActivation", "ChannelShift", "Zero"]


class AddActivation(nn.Module):
    """``activation(input + residual)``: what is left of a fused batch norm that takes a residual.

    Args:
        activation: the module of the activation, or None.
    """

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Add and activate; shapes as in `tritonnorm.BatchNorm2d`."""
        y = input if residual is None else input + residual
        return y if self.activation is None else self.activation(y)


class ChannelShift(nn.Module):
    """``input + shift`` with one number per channel: what is left when only the scale folds.

    `torch.jit.script` and `torch.fx` take it as well.

    Args:
        shift: ``[C]``, a buffer.
        tail: run on the result; of an `AddActivation` only the activation, None for nothing.
        activation: in place of a tail, name and parameters of an activation as in
            `tritonnorm.BatchNorm2d`. On a GPU both run in one launch: a batch norm with mean
            -shift and variance 1.
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
            tail = ACTIVATIONS[activation[0]].module(*activation[1])
        self.tail = tail.activation if isinstance(tail, AddActivation) else tail
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Add to ``[N, C, ...]``, then the residual; the dtype of ``input`` is kept."""
        if not torch.jit.is_scripting() and self._fits(input):
            return self._by_kernel(input)
        y = (input.transpose(1, -1) + self.shift.to(input.dtype)).transpose(1, -1)
        if residual is not None:
            y = y + residual
        return y if self.tail is None else self.tail(y)

    @torch.jit.unused
    def _fits(self, input: Tensor) -> bool:
        if self.activation is None or not isinstance(input, Tensor):  # a proxy of torch.fx
            return False
        return (input.is_cuda or settings.interpreting()) and not settings.disabled()

    @torch.jit.unused
    def _by_kernel(self, input: Tensor) -> Tensor:
        assert self.activation is not None
        name, args = self.activation
        return functional.batch_norm(
            input, -self.shift, self.one, eps=0.0, activation=name, activation_args=args
        )

    def extra_repr(self) -> str:
        """The number of channels, and the activation."""
        name = "" if self.activation is None else f", activation={self.activation[0]}"
        return f"{self.shift.numel()}{name}"


class Zero(nn.Module):
    """A zero, of shape (): what is left of a branch that another branch of the same sum took in."""

    def forward(self, input: Tensor) -> Tensor:
        """A zero of the dtype and device of ``input``."""
        return torch.zeros((), dtype=input.dtype, device=input.device)
