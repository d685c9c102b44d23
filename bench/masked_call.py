"""A call of masked batch norm as the harness speaks of it, and its tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.call import Call, Direction, Tensors
from tritonnorm import masked_batch_norm
from tritonnorm.problem import Problem, View

__all__ = ["MaskedCall", "MaskedTensors"]


@dataclass(frozen=True)
class MaskedCall(Call):
    """``activation(masked_batch_norm(x))`` of sequences ``[N, C, L]``, and its gradients.

    `channels_last` is the layout NLC. Padding lies at the end: sequence i of N has
    ``L (1 - padding (i % 4) / 3)`` valid positions.

    Attributes:
        padding: the share of the shortest sequences that is padding.
    """

    padding: float = 0.0

    @property
    def op(self) -> str:
        """``masked BN``, ``masked BN+relu``, ..."""
        return f"masked {super().op}"

    @property
    def layout(self) -> str:
        """``NLC`` or ``NCL``."""
        return "NLC" if self.channels_last else "NCL"

    def problem(self, direction: Direction) -> Problem:
        """What one direction is to the planner."""
        n, c, length = self.shape
        view = View(1, c, n * length, True) if self.channels_last else View(n, c, length, False)
        plain = Call.problem(replace(self, channels_last=False), direction)
        return replace(plain, view=view, form="masked")

    def tensors(
        self, device: str | torch.device = "cpu", generator: torch.Generator | None = None
    ) -> MaskedTensors:
        """Its tensors, as of `Call`; the input is ``[N, L, C]`` where that is the layout."""
        n, c, length = self.shape
        t = Call.tensors(replace(self, channels_last=False), device, generator)
        parts = {f: getattr(t, f) for f in ("weight", "bias", "running_mean", "running_var")}
        x, dy = t.x.detach(), t.dy
        if self.channels_last:
            x, dy = x.reshape(n, length, c), dy.reshape(n, length, c)
        short = torch.arange(n, device=device) % 4 * (self.padding * length / 3)
        lengths = length - short.long()
        x.requires_grad_("x" in self.needs)
        return MaskedTensors(
            call=self, x=x, residual=None, dy=dy, **parts, counter=t.counter, lengths=lengths
        )


@dataclass(kw_only=True)
class MaskedTensors(Tensors):
    """The tensors of a call, and the lengths of the sequences ``[N]``."""

    lengths: Tensor

    def forward(self, **options: Any) -> Tensor:
        """The output, by this library."""
        return masked_batch_norm(
            *(self.x, self.running_mean, self.running_var, self.weight, self.bias),
            training=self.call.training,
            lengths=self.lengths,
            layout="NLC" if self.call.channels_last else "NCL",
            activation=self.call.activation,
            num_batches_tracked=self.counter,
            **options,
        )
