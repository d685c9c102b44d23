"""Batch norm over padded sequences: the statistics are those of the valid positions alone.

``lengths`` or a ``mask`` say which positions are valid. Padding may hold anything, NaN too: it
comes out as zero, and its gradient is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonnorm import conditions, functional, reference
from tritonnorm.activated import Activated, named
from tritonnorm.activation import Activation, apply, resolve

Layout = Literal["NCL", "NLC"]


def masked_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    layout: Layout = "NCL",
    activation: str | None = None,
    activation_args: Sequence[float] = (),
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """``activation(batch_norm(input))`` over the valid positions of padded sequences.

    On a GPU it runs as Triton kernels, elsewhere as PyTorch operations. The number of valid
    positions is counted on the device; the host never waits for it. A batch with a single valid
    position has variance 0 and comes out as its ``bias``; one with none comes out as zeros. Neither
    changes the running statistics or the counter, since there is no variance in it. Without a mask
    and lengths the call is `functional.batch_norm`.

    Args:
        input: ``[N, C, L]``, or ``[N, L, C]`` with that ``layout``; float16, bfloat16, float32 or
            float64.
        running_mean: ``[C]``, updated in place if training; may be None if training.
        running_var: ``[C]`` likewise, unbiased: its factor is n / (n - 1) for n valid positions.
        weight: ``[C]`` scale, or None for 1.
        bias: ``[C]`` shift, or None for 0.
        training: normalize with the statistics of this batch, else with the running ones.
        momentum: weight of this batch in the running statistics; None weighs all batches equally
            and needs ``num_batches_tracked``.
        eps: added to the variance.
        mask: bool ``[N, L]``, True at valid positions, which may lie anywhere.
        lengths: integer ``[N]``: the first so many positions are valid; not with ``mask``.
        layout: "NCL" or "NLC", the order of the dimensions of ``input``.
        activation: a name of `tritonnorm.activation.ACTIVATIONS`, or None.
        activation_args: its parameters.
        num_batches_tracked: int64 scalar, incremented in place if training.

    Returns:
        A tensor of the shape and dtype of ``input``, zero in the padding.

    Raises:
        ValueError: an argument is of the wrong shape, dtype, device or name; the message names it.
        RuntimeError: a C-vector of the wrong length, or no running statistics when not training.
    """
    if layout not in ("NCL", "NLC"):
        raise ValueError(f"layout: expected 'NCL' or 'NLC', got {layout!r}")
    if input.dim() != 3:
        raise ValueError(f"input: expected 3 dimensions {layout}, got {input.dim()}D")
    if mask is not None and lengths is not None:
        raise ValueError("mask, lengths: expected one of them, got both")
    x = input.mT if layout == "NLC" else input
    if mask is None and lengths is None:
        y = functional.batch_norm(
            *(x, running_mean, running_var, weight, bias, training, momentum, eps),
            activation=activation,
            activation_args=activation_args,
            num_batches_tracked=num_batches_tracked,
        )
        return y.mT if layout == "NLC" else y
    act, act_args = resolve(activation, activation_args)
    tensors = (x, running_mean, running_var, weight, bias)
    conditions.check_batch_norm(*tensors, training, momentum, eps, None, num_batches_tracked)
    keep = valid_positions(x.shape[0], x.shape[2], mask, lengths, x.device)
    counter = num_batches_tracked if training else None
    reason = conditions.overridden((*tensors, keep)) or conditions.surroundings(x)
    reason = reason or conditions.unsupported_batch_norm(*tensors)
    if reason is None:
        from . import ops

        y = ops.masked_batch_norm(
            x, keep.contiguous().view(torch.uint8), weight, bias, running_mean, running_var,
            counter, training, momentum, eps, act.name if act else "", act_args,
        )  # fmt: skip
    else:
        conditions.log_once("masked_batch_norm", reason)
        running = (running_mean, running_var, counter)
        by = _by_index if _host_knows(x) else _by_operations
        y = by(x, keep, weight, bias, running, training, momentum, eps, act, act_args)
    return y.mT if layout == "NLC" else y


def valid_positions(
    samples: int, length: int, mask: Tensor | None, lengths: Tensor | None, device: torch.device
) -> Tensor:
    """The bool mask ``[samples, length]`` that a mask or lengths stand for.

    Raises:
        ValueError: wrong shape, dtype or device.
    """
    for name, given, shape in (("mask", mask, (samples, length)), ("lengths", lengths, (samples,))):
        if given is None:
            continue
        if given.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(given.shape)}")
        if given.device != device:
            raise ValueError(f"{name}: expected on {device} like input, got {given.device}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask: expected torch.bool, got {mask.dtype}")
        return mask
    assert lengths is not None
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths: expected an integer dtype, got {lengths.dtype}")
    return torch.arange(length, device=device) < lengths[:, None]


def _host_knows(x: Tensor) -> bool:
    """Whether positions can be picked by index: where nothing waits and nothing is traced."""
    return (
        x.device.type == "cpu"
        and x.__class__ in (Tensor, torch.nn.Parameter)
        and x.dtype.is_floating_point
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def _by_index(
    x: Tensor,
    keep: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor | None, Tensor | None, Tensor | None],
    training: bool,
    momentum: float | None,
    eps: float,
    act: Activation | None,
    args: Sequence[float],
) -> Tensor:
    """The valid positions picked by index, through PyTorch's batch norm, and put back."""
    n, c, length = x.shape
    at = keep.reshape(-1).nonzero()[:, 0]
    if training and len(at) < 2:  # nothing is tracked
        nothing = (None, None, None)
        return _by_operations(x, keep, weight, bias, nothing, training, momentum, eps, act, args)
    mean, var, counter = running
    if counter is not None:
        counter.add_(1)
        momentum = 1.0 / float(counter) if momentum is None else momentum
    rows = x.movedim(1, 2).reshape(n * length, c)
    picked = rows if len(at) == len(rows) else rows.index_select(0, at)
    y = F.batch_norm(picked, mean, var, weight, bias, training, momentum or 0.0, eps)
    y = apply(act, args, y)
    if picked is not rows:
        y = rows.new_zeros(rows.shape).index_copy(0, at, y)
    return y.reshape(n, length, c).movedim(2, 1)


def _by_operations(
    x: Tensor,
    keep: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor | None, Tensor | None, Tensor | None],
    training: bool,
    momentum: float | None,
    eps: float,
    act: Activation | None,
    args: Sequence[float],
) -> Tensor:
    """The same in PyTorch operations of fixed shapes, for devices and tracers."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_, w, b = (None if t is None else t.to(wide) for t in (x, weight, bias))
    assert x_ is not None
    mean, var, counter = running
    if training:
        found = reference.masked_moments(x_, keep)
        _track(found, mean, var, counter, momentum)
        mean, var = found.mean, found.var
    assert mean is not None and var is not None
    y = reference.masked_output(x_, keep, mean.to(wide), var.to(wide), w, b, eps, act, args)
    return y.to(x.dtype)


@torch.no_grad()
def _track(
    found: reference.Moments,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    momentum: float | None,
) -> None:
    """Move the running statistics, unless the batch has fewer than two valid positions."""
    tracked = found.number > 1
    if counter is not None:
        counter.add_(tracked)
    count = found.number.to(found.var.dtype)
    unbiased = found.var * (count / (count - 1).clamp(min=1))
    for running, new in ((running_mean, found.mean), (running_var, unbiased)):
        if running is not None:
            share = 1.0 / counter if momentum is None and counter is not None else momentum or 0.0
            moved = (1.0 - share) * running + share * new
            running.copy_(torch.where(tracked, moved, running))


class MaskedBatchNorm1d(Activated, torch.nn.BatchNorm1d):
    """Batch norm over padded sequences: statistics over the valid positions, zeros in the padding.

    `torch.nn.BatchNorm1d` whose ``forward`` takes a mask or lengths; the parameters, the buffers
    and the ``state_dict`` are the same. Without either all positions are valid. A batch with fewer
    than two valid positions leaves the running statistics and the counter alone, see
    `masked_batch_norm`.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None for a cumulative average.
        affine: learn a weight and a bias per channel.
        track_running_stats: keep running statistics, and use them in eval mode.
        device: of the parameters and buffers.
        dtype: of the parameters and buffers.
        layout: order of the input's dimensions, "NCL" or "NLC".
        activation: name of an activation of `tritonnorm.activation.ACTIVATIONS`, or None.
        activation_args: its parameters.

    Raises:
        ValueError: the layout or activation is unknown, or the activation has fewer parameters.
    """

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
        layout: Layout = "NCL",
        activation: str | None = None,
        activation_args: Sequence[float] = (),
    ) -> None:
        if layout not in ("NCL", "NLC"):
            raise ValueError(f"layout: expected 'NCL' or 'NLC', got {layout!r}")
        chosen = named(activation, activation_args)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.layout: Layout = layout
        self.activation, self.activation_args = chosen

    def forward(
        self, input: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Normalize the valid positions.

        Args:
            input: ``[N, C, L]`` or ``[N, L, C]``, as ``layout`` says.
            mask: bool ``[N, L]``, True at valid positions.
            lengths: integer ``[N]``, in place of a mask: the first positions are valid.
        """
        track = self.training and self.track_running_stats
        use_buffers = track or not self.training
        counter = self.num_batches_tracked if track else None
        return masked_batch_norm(
            input,
            self.running_mean if use_buffers else None,
            self.running_var if use_buffers else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            0.0 if self.momentum is None and counter is None else self.momentum,
            self.eps,
            mask=mask,
            lengths=lengths,
            layout=self.layout,
            activation=self.activation,
            activation_args=self.activation_args,
            num_batches_tracked=counter,
        )

    def extra_repr(self) -> str:
        """The original's description, the layout, and the activation if there is one."""
        text = torch.nn.BatchNorm1d.extra_repr(self)
        return f"{text}, layout={self.layout}{self.activation_repr()}"
