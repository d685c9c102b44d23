"""The fold of a batch norm with given statistics into the layer before it, as PyTorch expressions.

With s = gamma / sqrt(var + eps) the folded layer has the weight s*w and the bias
s*(b - mean) + beta. The expressions have derivatives of any order. `docs/folding.md` derives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS: tuple[type[nn.Module], ...] = (*CONVS, *TRANSPOSED, nn.Linear)
_TRANSPOSED_FORWARD = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


class Source(NamedTuple):
    """What one fold is computed from.

    Attributes:
        weight: of the layer: one row per channel, or of a transposed convolution
            ``(C_in, C / groups, ...)``.
        bias: ``[C]`` or None for 0.
        mean, var: ``[C]`` running statistics.
        gamma, beta: ``[C]`` weight and bias of the batch norm, or None for 1 and 0.
        eps: added to the variance.
        groups: groups of a transposed convolution; 0 for every other layer.
    """

    weight: Tensor
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    groups: int = 0

    @classmethod
    def of(cls, layer: Any, bn: Any) -> Source:
        """The tensors of a layer and of a batch norm with running statistics."""
        groups = layer.groups if isinstance(layer, TRANSPOSED) else 0
        return cls(
            layer.weight, layer.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias,
            float(bn.eps), groups,
        )  # fmt: skip

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The six tensors, in the order of the fields."""
        return self[:6]

    @property
    def needs_grad(self) -> bool:
        """Whether a gradient can be asked for, of any of them."""
        return torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in self.tensors
        )

    @property
    def plain(self) -> bool:
        """Whether all are strided tensors with values, and none is a subclass."""
        return all(
            t is None or (t.__class__ in _PLAIN and t.layout is torch.strided and not t.is_meta)
            for t in self.tensors
        )


class Folded(NamedTuple):
    """Weight and bias of the folded layer; the weight has the shape of the layer's own."""

    weight: Tensor
    bias: Tensor


def by_channel(vector: Tensor, weight: Tensor, groups: int) -> Tensor:
    """``vector`` [C] in a shape that multiplies ``weight``, split into groups if transposed."""
    if groups:
        return vector.reshape(groups, 1, -1, *(1,) * (weight.dim() - 2))
    return vector.reshape(-1, *(1,) * (weight.dim() - 1))


def fold(source: Source, wide: torch.dtype = torch.float64) -> Folded:
    """The folded weight and bias, in the dtype ``wide`` in which they are computed."""
    weight, mean = source.weight.to(wide), source.mean.to(wide)
    scale = torch.rsqrt(source.var.to(wide) + source.eps)
    if source.gamma is not None:
        scale = scale * source.gamma.to(wide)
    shift = -mean if source.bias is None else source.bias.to(wide) - mean
    bias = shift * scale
    if source.beta is not None:
        bias = bias + source.beta.to(wide)
    if source.groups:
        split = weight.unflatten(0, (source.groups, -1))
        return Folded((split * by_channel(scale, weight, source.groups)).flatten(0, 1), bias)
    return Folded(weight * by_channel(scale, weight, 0), bias)


def rounded(folded: Folded, like: Tensor) -> Folded:
    """The same in the dtype and memory format of the layer's own weight ``like``."""
    return Folded(folded.weight.to(like.dtype), folded.bias.to(like.dtype))


@torch.no_grad()
def refusal(source: Source, exact: Folded) -> str | None:
    """Why the float64 fold cannot be rounded to the dtype of the weight, or None. Reads values."""
    info = torch.finfo(source.weight.dtype)
    weight = exact.weight.abs()
    if source.groups:
        weight = weight.unflatten(0, (source.groups, -1)).transpose(1, 2).flatten(0, 1)
    peak = weight.flatten(1).amax(1) if weight.numel() else exact.bias.new_zeros(1)
    finite = (peak <= info.max).all() & (exact.bias.abs() <= info.max).all()
    faults = torch.stack([~finite, ((peak > 0) & (peak < info.smallest_normal)).any()]).tolist()
    name = str(source.weight.dtype).removeprefix("torch.")
    if faults[0]:
        return f"the folded weight or bias is not finite in {name}"
    return f"a channel of the folded weight is subnormal in {name}" if faults[1] else None


def minimum_bytes(sources: Sequence[Source], backward: bool = False) -> int:
    """The fewest bytes that folding them moves, or that their gradients do.

    Forward reads every tensor and writes w' and b'. Backward reads the gradients of these, and all
    but beta again; it writes the gradients of weight, bias, gamma and beta, whether or not a layer
    has a bias and a batch norm gamma and beta.
    """
    total = 0
    for s in sources:
        w, c = s.weight.numel() * s.weight.element_size(), s.mean.numel()
        vectors = [t for t in (s.bias, s.mean, s.var, s.gamma) if t is not None]
        small = sum(c * t.element_size() for t in vectors) + c * s.weight.element_size()
        if backward:
            affine = s.mean if s.gamma is None else s.gamma
            total += 3 * w + small + c * s.weight.element_size() + 2 * c * affine.element_size()
        else:
            total += 2 * w + small + (0 if s.beta is None else c * s.beta.element_size())
    return total


def run(layer: Any, input: Tensor, folded: Folded, output_size: list[int] | None = None) -> Tensor:
    """What a layer computes, with another weight and bias.

    Args:
        layer: of exactly one of the classes of `LAYERS`, or of a subclass with their attributes.
        input: its input.
        folded: the weight and bias.
        output_size: of a transposed convolution only, as its forward takes it.
    """
    weight, bias = folded
    if isinstance(layer, nn.Linear):
        return F.linear(input, weight, bias)
    if not isinstance(layer, TRANSPOSED):
        return layer._conv_forward(input, weight, bias)
    rank = weight.dim() - 2
    conv: Any = layer
    padding = conv._output_padding(
        input, output_size, conv.stride, conv.padding, conv.kernel_size, rank, conv.dilation
    )
    return _TRANSPOSED_FORWARD[rank - 1](
        input, weight, bias, conv.stride, conv.padding, padding, conv.groups, conv.dilation
    )


def check_residual(residual: Tensor, y: Tensor) -> None:
    """Raise ValueError if a residual does not have the shape and dtype of the output ``y``."""
    if residual.shape != y.shape:
        raise ValueError(f"residual: expected the shape {tuple(y.shape)}, got {residual.shape}")
    if residual.dtype != y.dtype:
        raise ValueError(f"residual: expected the dtype {y.dtype}, got {residual.dtype}")


def dimensions(layer: Any) -> int:
    """Dimensions of a batched input on which a batch norm acts on the layer's channels."""
    return 2 if isinstance(layer, nn.Linear) else int(layer.weight.dim())


def differentiable(sources: Sequence[Source]) -> list[Folded]:
    """Folds that gradients flow through, for training: computed in float32, or where a tensor is
    float64 in float64, and rounded to the dtype of each weight."""
    found = []
    for source in sources:
        wide = torch.float32
        for t in source.tensors:
            wide = wide if t is None else torch.promote_types(wide, t.dtype)
        found.append(rounded(fold(source, wide), source.weight))
    return found
