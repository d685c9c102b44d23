"""The algebra of folding a batch norm into the layer before it: float64 tensors, no modules.

In eval mode a batch norm is y = s*x + t per channel, with s = gamma / sqrt(var + eps) and
t = beta - mean*s. The formulas are derived in `docs/folding.md`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class FoldRefused(Exception):
    """The fold is not safe for the numbers at hand; the message is the reason, in words."""


@dataclass(frozen=True)
class ScaleShift:
    """A batch norm in eval mode as y = scale*x + shift; both of shape (C,), float64."""

    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Folded:
    """Weight and bias of the folded layer; the weight has the shape of the layer's own weight."""

    weight: Tensor
    bias: Tensor


def scale_shift(
    mean: Tensor, var: Tensor, eps: float, gamma: Tensor | None, beta: Tensor | None
) -> ScaleShift:
    """Scale and shift of a batch norm from its running statistics.

    Args:
        mean: running mean, (C,), any real floating dtype.
        var: running variance, (C,).
        eps: added to the variance.
        gamma: weight, (C,), or None for 1.
        beta: bias, (C,), or None for 0.

    Raises:
        FoldRefused: a variance is negative, or a statistic, gamma or beta is NaN or infinite,
            or var + eps is 0.
    """
    mean, var = mean.detach().double(), var.detach().double()
    gamma = torch.ones_like(mean) if gamma is None else gamma.detach().double()
    beta = torch.zeros_like(mean) if beta is None else beta.detach().double()
    sources = {"running_mean": mean, "running_var": var, "weight": gamma, "bias": beta}
    for name, value in sources.items():
        _refuse(~torch.isfinite(value), f"{name} is not finite")
    _refuse(var < 0, "running_var is negative")
    _refuse(var + eps <= 0, "running_var + eps is 0")
    scale = gamma / torch.sqrt(var + eps)
    return ScaleShift(scale, beta - mean * scale)


def fold_conv(weight: Tensor, bias: Tensor | None, affine: ScaleShift) -> Folded:
    """Fold into a convolution or linear layer: its weight is (C_out, ...), one row per channel.

    Groups, stride, dilation and the padding mode do not appear: they decide which inputs a row
    meets, and the whole row is scaled.
    """
    scale = affine.scale.reshape(-1, *(1,) * (weight.dim() - 1))
    return Folded(weight.detach().double() * scale, _fold_bias(bias, affine))


def fold_conv_transpose(
    weight: Tensor, bias: Tensor | None, groups: int, affine: ScaleShift
) -> Folded:
    """Fold into a transposed convolution: its weight is (C_in, C_out/groups, ...).

    Output channel g*(C_out/groups) + j belongs to input channels g*(C_in/groups) and up, so
    the scale is laid out as (groups, 1, C_out/groups, 1, ...) over the weight split into groups.
    """
    split = weight.detach().double().unflatten(0, (groups, -1))
    scale = affine.scale.reshape(groups, 1, -1, *(1,) * (weight.dim() - 2))
    return Folded((split * scale).flatten(0, 1), _fold_bias(bias, affine))


def fold_before_conv(
    weight: Tensor, bias: Tensor | None, groups: int, affine: ScaleShift
) -> Folded:
    """Fold what comes before a convolution or linear layer into it; its input has C_in channels.

    Output channel o meets the input channels of its own group only, so the scale is laid out as
    (groups, 1, C_in/groups, 1, ...). The shift reaches the output through every weight, which is a
    constant per channel only where no padding takes the place of an input.
    """
    split = weight.detach().double().unflatten(0, (groups, -1))
    layout = (groups, 1, -1, *(1,) * (weight.dim() - 2))
    reached = (split * affine.shift.reshape(layout)).flatten(2).sum(2).flatten()
    old = torch.zeros_like(reached) if bias is None else bias.detach().double()
    return Folded((split * affine.scale.reshape(layout)).flatten(0, 1), old + reached)


def fold_before_conv_transpose(weight: Tensor, bias: Tensor | None, affine: ScaleShift) -> Folded:
    """Fold a scale before a transposed convolution into it: its weight is (C_in, ...)."""
    scale = affine.scale.reshape(-1, *(1,) * (weight.dim() - 1))
    new = weight.detach().double() * scale
    if bias is not None:
        return Folded(new, bias.detach().double())
    return Folded(new, new.new_zeros(()))


def _fold_bias(bias: Tensor | None, affine: ScaleShift) -> Tensor:
    if bias is None:
        return affine.shift
    return bias.detach().double() * affine.scale + affine.shift


def cast(folded: Folded, like: Tensor, channel_max: Tensor) -> Folded:
    """Round the folded parameters once to the dtype and memory format of `like`.

    Args:
        folded: float64 parameters.
        like: the layer's own weight.
        channel_max: largest |folded weight| of each output channel, (C_out,), float64.

    Raises:
        FoldRefused: a channel overflows in that dtype, or all of a channel that is not zero
            becomes subnormal (it would lose its precision there).
    """
    info = torch.finfo(like.dtype)
    name = str(like.dtype).removeprefix("torch.")
    bias = folded.bias.to(like.device, like.dtype)
    _refuse(channel_max > info.max, f"the folded weight overflows in {name}")
    _refuse(~torch.isfinite(bias), f"the folded bias overflows in {name}")
    subnormal = (channel_max > 0) & (channel_max < info.smallest_normal)
    _refuse(subnormal, f"the folded weight is subnormal in {name}")
    weight = torch.empty_like(like, requires_grad=False).copy_(folded.weight)
    return Folded(weight, bias)


def channel_maximum(weight: Tensor, groups: int | None = None) -> Tensor:
    """Largest |weight| of each output channel, (C_out,); `groups` only for a transposed layer."""
    if groups is None:
        return weight.abs().flatten(1).amax(1)
    split = weight.abs().unflatten(0, (groups, -1)).transpose(1, 2)
    return split.flatten(2).amax(2).flatten()


def _refuse(bad: Tensor, message: str) -> None:
    """Raise with the first channels at which `bad` (C,) is true."""
    channels = bad.nonzero().flatten().tolist()
    if channels:
        shown = ", ".join(str(channel) for channel in channels[:4])
        more = f" and {len(channels) - 4} more" if len(channels) > 4 else ""
        raise FoldRefused(f"{message} (channel {shown}{more})")
