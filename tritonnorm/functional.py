"""Batch norm as a function: the checks, and the choice between kernels and PyTorch. The other norms
are in `norms`, and have their names here too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activation as activations
from .conditions import (
    Accepted,
    Kind,
    batch_norm_key,
    check_batch_norm,
    check_device,
    log_once,
    overridden,
    surroundings,
    unsupported_batch_norm,
)
from .norms.functional import group_norm as group_norm
from .norms.functional import instance_norm as instance_norm
from .norms.functional import layer_norm as layer_norm
from .norms.functional import rms_norm as rms_norm

_accepted = Accepted()


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    activation_args: Sequence[float] = (),
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    """``activation(batch_norm(input) + residual)``, in one pass over the data where it fits.

    By default, and positionally, what `torch.nn.functional.batch_norm` is (Ioffe and Szegedy,
    2015). On a GPU it runs as Triton kernels; where they cannot (a CPU tensor, a dtype without
    kernels, an empty batch, a tracer) PyTorch's own implementation and activation run instead, and
    the reason is logged once.

    Args:
        input: ``[N, C, ...]`` float16, bfloat16, float32 or float64, of any strides.
        running_mean: ``[C]`` running mean, updated in place if training; may be None if training.
        running_var: ``[C]`` running (unbiased) variance, likewise.
        weight: ``[C]`` scale, the dtype of ``input`` or float32; None is 1.
        bias: ``[C]`` shift, likewise; None is 0.
        training: normalize with the statistics of this batch, else with the running ones.
        momentum: weight of this batch in the running statistics; None weighs all batches equally
            and needs ``num_batches_tracked``.
        eps: added to the variance.
        activation: a name of `tritonnorm.activation.ACTIVATIONS`, "prelu", or None.
        activation_args: its parameters, as in `torch.nn.functional` (``negative_slope``, ``alpha``,
            ...).
        residual: added before the activation; shape, dtype and device of ``input``.
        num_batches_tracked: int64 scalar, incremented in place if training.
        slope: ``[C]`` or ``[1]``, the learned slope below zero of "prelu" (He et al., 2015), which
            gets a gradient; the dtype of ``input`` or float32. None for other activations.

    Returns:
        A tensor of the shape, dtype and memory format of ``input``.

    Raises:
        ValueError: an argument is of the wrong shape, dtype, device or name; the message names it.
        RuntimeError: a C-vector of the wrong length, or no running statistics when not training;
            the type is PyTorch's own.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual, num_batches_tracked, slope)
    seen = overridden(tensors)  # first: a tracer would record that it was looked at
    key = None
    compiling = torch.compiler.is_compiling()
    known = slope is None or isinstance(slope, Tensor)
    if seen is None and known and not compiling:
        key = batch_norm_key(
            input, residual, slope,
            (weight, bias, running_mean, running_var, num_batches_tracked),
            (running_mean, running_var), activation, activation_args,
            (training, momentum is None, eps),
        )  # fmt: skip
    kind = None if key is None else _accepted.get(key)
    if kind is None or surroundings(input):
        channels = input.shape[1] if slope is not None and input.dim() > 1 else 0
        act, act_args = activations.resolve_learned(activation, activation_args, slope, channels)
        reason = seen
        if reason is None:
            check_batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps, residual,
                num_batches_tracked,
            )  # fmt: skip
            if slope is not None:
                check_device("slope", slope, input)
            reason = surroundings(input) or unsupported_batch_norm(*tensors[:5], slope)
        if reason is not None:
            log_once("batch_norm", reason)
            return _by_torch(
                input, running_mean, running_var, weight, bias, training, momentum, eps, act,
                act_args, residual, num_batches_tracked, slope,
            )  # fmt: skip
        kind = Kind(act.name if act else "", act_args)
        if key is not None:
            _accepted.put(key, kind)
    # Dynamo would guard the global, and compile a second time.
    kernels = _autograd() if compiling or _imported is None else _imported
    return kernels.batch_norm(
        input, residual, weight, bias, running_mean, running_var,
        num_batches_tracked if training else None, training, momentum, eps,
        kind.activation, kind.activation_args, slope, None if key is None else kind,
    )  # fmt: skip


def _autograd() -> Any:
    """The module that launches kernels. It is imported with the first call: it needs triton."""
    from . import autograd

    if not torch.compiler.is_compiling():
        global _imported
        _imported = autograd
    return autograd


_imported: Any = None


def _by_torch(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    act: activations.Activation | None,
    act_args: Sequence[float],
    residual: Tensor | None,
    num_batches_tracked: Tensor | None,
    slope: Tensor | None,
) -> Tensor:
    """PyTorch's batch norm, then the same epilogue."""
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(num_batches_tracked)
    y = F.batch_norm(
        input, running_mean, running_var, weight, bias, training,
        0.0 if momentum is None else momentum, eps,
    )  # fmt: skip
    if residual is not None:
        y = y + residual
    return activations.apply(act, act_args, y, slope)
