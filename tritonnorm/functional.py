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
    call_key,
    check_device,
    check_residual,
    log_once,
    overridden,
    unsupported,
)
from .conditions import has_triton as has_triton
from .conditions import surroundings as surroundings
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
    known = slope is None or isinstance(slope, Tensor)
    if seen is None and known and not torch.compiler.is_compiling():
        options = (training, momentum is None, eps)
        key = call_key(tensors, activation, activation_args, options)
    accepted = None if key is None else _accepted.get(key)
    if accepted is None or surroundings(input):
        channels = input.shape[1] if slope is not None and input.dim() > 1 else 0
        act, act_args = activations.resolve_learned(activation, activation_args, slope, channels)
        reason = seen
        if reason is None:
            _check(
                input, running_mean, running_var, weight, bias, training, momentum, eps, residual,
                num_batches_tracked,
            )  # fmt: skip
            if slope is not None:
                check_device("slope", slope, input)
            reason = surroundings(input) or _unsupported(*tensors[:5], slope)
        if reason is not None:
            log_once("batch_norm", reason)
            return _by_torch(
                input, running_mean, running_var, weight, bias, training, momentum, eps, act,
                act_args, residual, num_batches_tracked, slope,
            )  # fmt: skip
        accepted = act.name if act else "", act_args
        if key is not None:
            _accepted.put(key, accepted)
    return _autograd().batch_norm(
        input, residual, weight, bias, running_mean, running_var,
        num_batches_tracked if training else None, training, momentum, eps, *accepted, slope,
    )  # fmt: skip


def examine(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> str | None:
    """The checks of `batch_norm` for a part of a batch, which may be empty or a single value, and a
    reason why the kernels cannot compute it, or None."""
    tensors = (input, running_mean, running_var, weight, bias)
    _check(
        *tensors, True, momentum, eps, residual, num_batches_tracked, alone=False,
    )  # fmt: skip
    return surroundings(input) or _unsupported(*tensors)


def _check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    num_batches_tracked: Tensor | None,
    alone: bool = True,
) -> None:
    """Refuse what cannot be computed, before anything is launched or changed."""
    if input.dim() < 2:
        if input.shape == (0,):
            return  # PyTorch takes it, and answers with the same
        raise ValueError(f"input: expected at least 2 dimensions [N, C, ...], got {input.dim()}D")
    if not input.is_floating_point() and not input.is_complex():
        raise ValueError(f"input: expected a floating-point dtype, got {input.dtype}")
    channels = input.shape[1]
    for name, vector in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if vector is None:
            if not training and name.startswith("running"):
                raise RuntimeError(f"{name} must be defined in evaluation mode")
            continue
        if vector.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {vector.numel()}")
        check_device(name, vector, input)
    if training and (running_mean is None) != (running_var is None):
        raise ValueError("running_mean, running_var: expected both or neither, got one")
    if training and alone and channels and input.numel() == channels:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.shape}"
        )
    if training and eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if momentum is None and training and running_mean is not None and num_batches_tracked is None:
        raise ValueError("momentum: None (cumulative average) needs num_batches_tracked")
    if num_batches_tracked is not None:
        if num_batches_tracked.numel() != 1 or num_batches_tracked.dtype != torch.int64:
            raise ValueError(
                "num_batches_tracked: expected an int64 scalar, got "
                f"{num_batches_tracked.dtype} of shape {tuple(num_batches_tracked.shape)}"
            )
        check_device("num_batches_tracked", num_batches_tracked, input)
    if residual is not None:
        check_residual(residual, input)


def _unsupported(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None = None,
) -> str | None:
    """Why the kernels cannot compute this kind of tensors, or None."""
    running = (("running_mean", running_mean), ("running_var", running_var))
    vectors = (("weight", weight), ("bias", bias), ("slope", slope), *running)
    reason = unsupported(input, vectors)
    for name, vector in running:
        if reason is None and vector is not None and not vector.is_contiguous():
            return f"{name} is not contiguous"  # it is updated in place
    return reason


def _autograd() -> Any:
    """The module that launches kernels. It is imported with the first call: it needs triton."""
    global _imported
    if _imported is None:
        from . import autograd as _imported
    return _imported


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
