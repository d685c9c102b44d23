"""A call of group, layer, instance or RMS norm as the harness speaks of it, and its tensors.

It answers to what `bench.call.Call` answers to, so that the audits and the runner take both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.call import Direction
from tritonnorm import functional
from tritonnorm.activation import ACTIVATIONS
from tritonnorm.norms.problem import GroupProblem, described
from tritonnorm.problem import Activity

Norm = Literal["group", "layer", "instance", "rms"]
SHORT: dict[Norm, str] = {"group": "GN", "layer": "LN", "instance": "IN", "rms": "RMS"}


@dataclass(frozen=True)
class NormCall:
    """What is called: ``activation(norm(x) + residual)``, and its gradients.

    Attributes:
        norm: which one. Layer and RMS norm are over the last dimension.
        shape: of the input, ``[N, C, ...]``, or ``[..., D]`` for layer and RMS norm.
        groups: of a group norm.
        channels_last: the memory format; needs four or five dimensions.
        dtype: of input and residual. Parameters and statistics are float32 (float64 for float64).
        activation: a name of `tritonnorm.activation.ACTIVATIONS`, or None.
        residual: whether there is one.
        needs: which gradients are asked for: x, r(esidual), w(eight), b(ias); at least one.
    """

    norm: Norm
    shape: tuple[int, ...]
    groups: int = 32
    channels_last: bool = False
    dtype: torch.dtype = torch.bfloat16
    activation: str | None = None
    residual: bool = False
    needs: str = "xrwb"

    training = True  # the statistics are always those of the input
    mode = "training"

    @property
    def op(self) -> str:
        """``GN``, ``GN+silu``, ``LN+add``, ..."""
        parts = [SHORT[self.norm], *(["add"] if self.residual else [])]
        return "+".join([*parts, *filter(None, [self.activation])])

    @property
    def rows(self) -> bool:
        """Whether it is over the last dimension."""
        return self.norm in ("layer", "rms")

    @property
    def layout(self) -> str:
        """``NHWC``, ``NCHW`` or ``rows``, whatever the rank."""
        return "rows" if self.rows else "NHWC" if self.channels_last else "NCHW"

    @property
    def size(self) -> str:
        """The shape as ``32x320x64x64``, with the groups of a group norm as ``/32``."""
        of = f"/{self.groups}" if self.norm == "group" else ""
        return "x".join(map(str, self.shape)) + of

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

    @property
    def parameters(self) -> int:
        """Length of weight and bias."""
        return self.shape[-1] if self.rows else self.shape[1]

    def problem(self, direction: Direction) -> GroupProblem:
        """What one direction is to the planner. The operators build the same from the tensors."""
        shape = (math.prod(self.shape[:-1]), self.shape[-1]) if self.rows else self.shape
        x = torch.empty(shape, device="meta").contiguous(memory_format=self.memory_format)
        groups = {"group": self.groups, "instance": shape[1]}.get(self.norm, 1)
        activity: Activity = "none"
        if self.activation is not None:
            activity = "two_valued" if ACTIVATIONS[self.activation].two_valued else "smooth"
        active, needs = activity != "none", (True, False, True, True)
        if direction == "backward":
            dx, dresidual, dweight, dbias = (name in self.needs for name in "xrwb")
            needs = (dx, dresidual and self.residual and active, dweight, dbias)
            needs = (*needs[:3], dbias and self.norm != "rms")
        residual = self.residual and (active or direction == "forward")
        described_as = (direction, shape, x.stride(), self.dtype, groups, self.norm != "rms")
        return described(*described_as, activity, residual, needs)[0]

    def tensors(
        self, device: str | torch.device = "cpu", generator: torch.Generator | None = None
    ) -> NormTensors:
        """Its tensors: normal random values, or without a generator whatever the memory holds."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32

        def activation_tensor() -> Tensor:
            t = torch.empty(
                self.shape, dtype=self.dtype, device=device, memory_format=self.memory_format
            )
            return t if generator is None else t.normal_(generator=generator)

        def vector(low: float, high: float) -> Tensor:
            t = torch.empty(self.parameters, dtype=wide, device=device)
            return t if generator is None else t.uniform_(low, high, generator=generator)

        residual = activation_tensor() if self.residual else None
        bias = None if self.norm == "rms" else vector(-1.0, 1.0)
        return NormTensors(
            call=self,
            x=activation_tensor().requires_grad_("x" in self.needs),
            residual=None if residual is None else residual.requires_grad_("r" in self.needs),
            dy=activation_tensor(),
            weight=vector(0.5, 1.5).requires_grad_("w" in self.needs),
            bias=None if bias is None else bias.requires_grad_("b" in self.needs),
        )


@dataclass
class NormTensors:
    """The tensors of a call."""

    call: NormCall
    x: Tensor
    residual: Tensor | None
    dy: Tensor
    weight: Tensor
    bias: Tensor | None

    def with_own_statistics(self, in_place: bool = False) -> NormTensors:
        """The same: these norms have no running statistics, and none works in place."""
        return self

    def in_one_dtype(self) -> NormTensors:
        """With parameters in the dtype of x, the only one that some of PyTorch's kernels take."""
        w, b = (
            None if t is None else t.detach().to(self.x.dtype).requires_grad_(t.requires_grad)
            for t in (self.weight, self.bias)
        )
        assert w is not None
        return replace(self, weight=w, bias=b)

    @property
    def all(self) -> tuple[Any, ...]:
        """x, residual, weight, bias."""
        return (self.x, self.residual, self.weight, self.bias)

    @property
    def inputs(self) -> list[Tensor]:
        """What a gradient is asked for, of x, residual, weight and bias."""
        return [t for t in self.all if t is not None and t.requires_grad]

    def forward(self, **options: Any) -> Tensor:
        """The output, by this library."""
        fused = {"activation": self.call.activation, "residual": self.residual}
        return normed(functional, self.call, self.x, self.weight, self.bias, **fused, **options)

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        """The gradients of `inputs` for the upstream gradient dy; the graph stays."""
        return torch.autograd.grad(y, self.inputs, self.dy, retain_graph=True)


def normed(
    module: Any, call: NormCall, x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any
) -> Tensor:
    """The norm by the functions of a module that has torch's: ours, or torch's own."""
    y: Tensor
    if call.norm == "group":
        y = module.group_norm(x, call.groups, weight, bias, **options)
    elif call.norm == "instance":
        y = module.instance_norm(x, weight=weight, bias=bias, **options)
    elif call.norm == "layer":
        y = module.layer_norm(x, call.shape[-1:], weight, bias, **options)
    else:
        y = module.rms_norm(x, call.shape[-1:], weight, **options)
    return y


def operators(
    call: NormCall, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The norm, the addition and the activation in PyTorch's operators."""
    y = normed(F, call, x, weight, bias)
    if residual is not None:
        y = y + residual
    return ACTIVATIONS[call.activation].function(y) if call.activation else y
