"""One batch norm call as the harness speaks of it: shape, layout, dtype, epilogue; its tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tritonnorm import functional
from tritonnorm.activation import ACTIVATIONS
from tritonnorm.problem import Activity, Problem, View

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


@dataclass(frozen=True)
class Call:
    """What is called: ``activation(batch_norm(x) + residual)``, and its gradients.

    Attributes:
        shape: of the input, ``[N, C, ...]``.
        channels_last: the memory format; needs four or five dimensions.
        dtype: of input and residual. Parameters and statistics are float32 (float64 for float64).
        activation: a name of `tritonnorm.activation.ACTIVATIONS`, "prelu" with a slope for each
            channel and its gradient, or None.
        residual: whether there is one.
        training: statistics of the batch, else the running ones.
        needs: which gradients are asked for: x, r(esidual), w(eight), b(ias); "" for inference.
    """

    shape: tuple[int, ...]
    channels_last: bool = False
    dtype: torch.dtype = torch.bfloat16
    activation: str | None = None
    residual: bool = False
    training: bool = True
    needs: str = "xrwb"

    @property
    def op(self) -> str:
        """``BN``, ``BN+relu``, ``BN+add+relu``, ..."""
        parts = ["BN", *(["add"] if self.residual else []), *filter(None, [self.activation])]
        return "+".join(parts)

    @property
    def layout(self) -> str:
        """``NHWC`` or ``NCHW``, whatever the rank."""
        return "NHWC" if self.channels_last else "NCHW"

    @property
    def mode(self) -> str:
        """``training`` or ``inference``."""
        return "training" if self.training else "inference"

    @property
    def size(self) -> str:
        """The shape as ``32x64x56x56``."""
        return "x".join(map(str, self.shape))

    @property
    def type(self) -> str:
        """The dtype without its module."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def memory_format(self) -> torch.memory_format:
        if not self.channels_last:
            return torch.contiguous_format
        if len(self.shape) not in (4, 5):
            raise ValueError(f"channels_last: expected 4 or 5 dimensions, got {len(self.shape)}")
        return torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d

    def problem(self, direction: Direction) -> Problem:
        """What one direction is to the planner. The operators build the same from the tensors."""
        x = torch.empty(self.shape, dtype=self.dtype, device="meta")
        x = x.contiguous(memory_format=self.memory_format)
        view = View.of(self.shape, x.stride(), x.stride())
        assert view is not None  # dense
        activity: Activity = "none"
        if self.activation is not None:
            known = ACTIVATIONS.get(self.activation)  # not prelu
            activity = "two_valued" if known is not None and known.two_valued else "smooth"
        mask = self.residual and activity == "two_valued" and bool(self.needs)
        if direction == "forward":
            return Problem(
                "forward", self.training, view, self.dtype, activity, self.residual, mask
            )
        reads_residual = self.residual and activity != "none"
        return Problem(
            *("backward", self.training, view, self.dtype, activity, reads_residual, mask),
            needs_dx="x" in self.needs,
            needs_dresidual=reads_residual and "r" in self.needs,
            needs_dparams="w" in self.needs or "b" in self.needs or self.activation == "prelu",
        )

    def tensors(
        self, device: str | torch.device = "cpu", generator: torch.Generator | None = None
    ) -> Tensors:
        """Its tensors: normal random values, or without a generator whatever the memory holds."""
        statistics = torch.float64 if self.dtype == torch.float64 else torch.float32
        c = self.shape[1]

        def activation_tensor() -> Tensor:
            t = torch.empty(
                self.shape, dtype=self.dtype, device=device, memory_format=self.memory_format
            )
            return t if generator is None else t.normal_(generator=generator)

        def vector(low: float, high: float) -> Tensor:
            t = torch.empty(c, dtype=statistics, device=device)
            return t if generator is None else t.uniform_(low, high, generator=generator)

        return Tensors(
            call=self,
            x=activation_tensor().requires_grad_("x" in self.needs),
            residual=(
                activation_tensor().requires_grad_("r" in self.needs) if self.residual else None
            ),
            dy=activation_tensor(),
            weight=vector(0.5, 1.5).requires_grad_("w" in self.needs),
            bias=vector(-1.0, 1.0).requires_grad_("b" in self.needs),
            running_mean=vector(-1.0, 1.0),
            running_var=vector(0.5, 1.5),
            counter=torch.zeros((), dtype=torch.int64, device=device),
            slope=vector(-0.5, 0.5).requires_grad_() if self.activation == "prelu" else None,
        )


@dataclass
class Tensors:
    """The tensors of a call."""

    call: Call
    x: Tensor
    residual: Tensor | None
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    counter: Tensor
    slope: Tensor | None = None

    def with_own_statistics(self, in_place: bool = False) -> Tensors:
        """The same tensors, but running statistics and counter that nobody else changes; and x, for
        what works in place."""
        own = (self.running_mean.clone(), self.running_var.clone(), self.counter.clone())
        x = self.x.detach().clone().requires_grad_(self.x.requires_grad) if in_place else self.x
        return replace(self, x=x, running_mean=own[0], running_var=own[1], counter=own[2])

    @property
    def all(self) -> tuple[Any, ...]:
        """x, residual, weight, bias, running mean and variance, counter."""
        running = (self.running_mean, self.running_var, self.counter)
        return (self.x, self.residual, self.weight, self.bias, *running)

    @property
    def inputs(self) -> list[Tensor]:
        """What a gradient is asked for, of x, residual, weight, bias and slope."""
        all_of_them = (self.x, self.residual, self.weight, self.bias, self.slope)
        return [t for t in all_of_them if t is not None and t.requires_grad]

    def forward(self, **options: Any) -> Tensor:
        """The output, by this library."""
        return functional.batch_norm(
            *(self.x, self.running_mean, self.running_var, self.weight, self.bias),
            training=self.call.training,
            activation=self.call.activation,
            residual=self.residual,
            num_batches_tracked=self.counter,
            slope=self.slope,
            **options,
        )

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        """The gradients of `inputs` for the upstream gradient dy; the graph stays."""
        return torch.autograd.grad(y, self.inputs, self.dy, retain_graph=True)
