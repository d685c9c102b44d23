"""Group, layer, instance and RMS norm as functions. `functional` has their names too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonnorm import activation as activations
from tritonnorm.conditions import (
    Accepted,
    call_key,
    check_residual,
    log_once,
    overridden,
    refused_vectors,
    surroundings,
    unsupported,
    widened,
)

_accepted = Accepted()


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    activation_args: Sequence[float] = (),
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(group_norm(input) + residual)``, in one pass over the data where it fits.

    By default, and positionally, what `torch.nn.functional.group_norm` is (Wu and He, 2018). Where
    the kernels cannot run PyTorch's own implementation and activation do, and the reason is logged
    once.

    Args:
        input: ``[N, C, ...]`` float16, bfloat16, float32 or float64, of any strides.
        num_groups: a divisor of C; the channels of a group share a mean and a variance in each
            sample.
        weight: ``[C]`` scale, the dtype of ``input`` or float32; None is 1.
        bias: ``[C]`` shift, likewise; None is 0.
        eps: added to the variance.
        activation: a name of `tritonnorm.activation.ACTIVATIONS`, or None.
        activation_args: its parameters, as in `torch.nn.functional`.
        residual: added before the activation; shape, dtype and device of ``input``.

    Returns:
        A tensor of the shape, dtype and memory format of ``input``; channels-last stays so.

    Raises:
        ValueError: the residual or the activation is wrong; the message names it.
        RuntimeError: what PyTorch refuses, with PyTorch's own message and type.
    """
    input, weight, bias, residual = widened("group_norm", input, weight, bias, residual)
    fine = _accept(
        "group_norm", (input, weight, bias, residual), (num_groups, eps), activation,
        activation_args, lambda: _refused_channels(input, num_groups, weight, bias),
    )  # fmt: skip
    if fine is None:
        y = F.group_norm(input, num_groups, weight, bias, eps)
        return _epilogue(y, residual, activation, activation_args)
    from . import autograd

    return autograd.group_norm(input, residual, weight, bias, num_groups, True, eps, *fine)[0]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    activation_args: Sequence[float] = (),
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(layer_norm(input) + residual)``, in one pass over the data where it fits.

    By default, and positionally, what `torch.nn.functional.layer_norm` is (Ba, Kiros and Hinton,
    2016). Otherwise as `group_norm`.

    Args:
        input: ``[..., *normalized_shape]``, of any strides.
        normalized_shape: the last dimensions, whose values share a mean and a variance.
        weight: ``normalized_shape`` scale, the dtype of ``input`` or float32; None is 1.
        bias: ``normalized_shape`` shift, likewise; None is 0.
        eps: added to the variance.
        activation: a name of `tritonnorm.activation.ACTIVATIONS`, or None.
        activation_args: its parameters, as in `torch.nn.functional`.
        residual: added before the activation; shape, dtype and device of ``input``.

    Returns:
        A contiguous tensor of the shape and dtype of ``input``.

    Raises:
        ValueError: the residual or the activation is wrong; the message names it.
        RuntimeError: what PyTorch refuses, with PyTorch's own message and type.
    """
    input, weight, bias, residual = widened("layer_norm", input, weight, bias, residual)
    y = _rows(
        "layer_norm", input, normalized_shape, weight, bias, eps, activation, activation_args,
        residual, True,
    )  # fmt: skip
    if y is None:
        y = F.layer_norm(input, list(normalized_shape), weight, bias, eps)
        y = _epilogue(y, residual, activation, activation_args)
    return y


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: str | None = None,
    activation_args: Sequence[float] = (),
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(rms_norm(input) + residual)``, in one pass over the data where it fits.

    By default, and positionally, what `torch.nn.functional.rms_norm` is (Zhang and Sennrich, 2019):
    the input over its root mean square, times the weight. Otherwise as `layer_norm`.

    Args:
        input: ``[..., *normalized_shape]``, of any strides.
        normalized_shape: the last dimensions, whose values share a mean square.
        weight: ``normalized_shape`` scale, the dtype of ``input`` or float32; None is 1.
        eps: added to the mean square; None is the epsilon of float32 (of float64 for float64).
        activation: a name of `tritonnorm.activation.ACTIVATIONS`, or None.
        activation_args: its parameters, as in `torch.nn.functional`.
        residual: added before the activation; shape, dtype and device of ``input``.

    Returns:
        A contiguous tensor of the shape and dtype of ``input``.

    Raises:
        ValueError: the residual or the activation is wrong; the message names it.
        RuntimeError: what PyTorch refuses, with PyTorch's own message and type.
    """
    input, weight, _, residual = widened("rms_norm", input, weight, None, residual)
    y = _rows(
        "rms_norm", input, normalized_shape, weight, None, eps, activation, activation_args,
        residual, False,
    )  # fmt: skip
    if y is None:
        y = F.rms_norm(input, list(normalized_shape), weight, eps)
        y = _epilogue(y, residual, activation, activation_args)
    return y


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    activation_args: Sequence[float] = (),
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(instance_norm(input) + residual)``, in one pass over the data where it fits.

    By default, and positionally, what `torch.nn.functional.instance_norm` is (Ulyanov, Vedaldi and
    Lempitsky, 2016). Otherwise as `group_norm`.

    Args:
        input: ``[N, C, ...]`` float16, bfloat16, float32 or float64, of any strides.
        running_mean: ``[C]``; moved in place towards the mean of the samples' means, if given.
        running_var: ``[C]``; likewise towards the mean of their unbiased variances.
        weight: ``[C]`` scale, the dtype of ``input`` or float32; None is 1.
        bias: ``[C]`` shift, likewise; None is 0.
        use_input_stats: normalize each sample with its own statistics, else with the running ones.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        activation: a name of `tritonnorm.activation.ACTIVATIONS`, or None.
        activation_args: its parameters, as in `torch.nn.functional`.
        residual: added before the activation; shape, dtype and device of ``input``.

    Returns:
        A tensor of the shape, dtype and memory format of ``input``; channels-last stays so.

    Raises:
        ValueError: the residual or the activation is wrong; the message names it.
        RuntimeError: what PyTorch refuses, with PyTorch's own message and type.
    """
    epilogue: dict[str, Any] = {"activation": activation, "activation_args": activation_args}
    if not use_input_stats and running_mean is not None and running_var is not None:
        from tritonnorm import functional

        return functional.batch_norm(
            input, running_mean, running_var, weight, bias, False, momentum, eps,
            residual=residual, **epilogue,
        )  # fmt: skip
    input, weight, bias, residual = widened("instance_norm", input, weight, bias, residual)
    running = (running_mean, running_var)

    def refused() -> str | None:
        one_value = input.numel() == input.shape[0] * input.shape[1]
        if not use_input_stats or one_value or (running_mean is None) != (running_var is None):
            return "PyTorch has the last word on these statistics"
        return _refused_channels(input, input.shape[1], weight, bias)

    fine = _accept(
        "instance_norm", (input, weight, bias, residual, *running), (use_input_stats, eps),
        activation, activation_args, refused,
    )  # fmt: skip
    if fine is None:
        y = F.instance_norm(input, *running, weight, bias, use_input_stats, momentum, eps)
        return _epilogue(y, residual, **epilogue)
    from . import autograd

    own_eps = eps + 0.0  # dynamo loses a float that it first meets within an autograd.Function
    y, mean, rstd = autograd.group_norm(
        input, residual, weight, bias, input.shape[1], True, eps, *fine
    )
    if running_mean is not None and running_var is not None:
        torch.ops.tritonnorm.instance_norm_update(
            running_mean, running_var, mean, rstd, input[0, 0].numel(), momentum, own_eps
        )
    return y


def _rows(
    name: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    activation: str | None,
    activation_args: Sequence[float],
    residual: Tensor | None,
    centred: bool,
) -> Tensor | None:
    """Layer or RMS norm by the kernels, or None where PyTorch must do it."""
    shape = tuple(normalized_shape)
    fine = _accept(
        name, (input, weight, bias, residual), (shape, eps), activation, activation_args,
        lambda: _refused_rows(input, shape, weight, bias),
    )  # fmt: skip
    if fine is None:
        return None
    from . import autograd

    if eps is None:
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        eps = torch.finfo(wide).eps
    if len(shape) > 1:
        weight = None if weight is None else weight.reshape(-1)
        bias = None if bias is None else bias.reshape(-1)
    return autograd.group_norm(
        input, residual, weight, bias, 1, centred, eps, *fine, math.prod(shape)
    )[0]


def _accept(
    name: str,
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
    activation: str | None,
    activation_args: Sequence[float],
    refused: Any,
) -> tuple[str, tuple[float, ...]] | None:
    """The activation's name and parameters where the kernels run, or None where PyTorch must, which
    raises what it refuses."""
    input, weight, bias, residual = tensors[:4]
    assert input is not None
    reason = overridden(tensors)  # first: a tracer would record that it was looked at
    key = None
    if reason is None and not torch.compiler.is_compiling():
        key = call_key(tensors, activation, activation_args, (name, *options))
    accepted = None if key is None else _accepted.get(key)
    if accepted is not None and surroundings(input) is None:
        return accepted
    act, act_args = activations.resolve(activation, activation_args)
    if reason is None:
        if residual is not None:
            check_residual(residual, input)
        reason = surroundings(input) or refused()
        reason = reason or unsupported(input, (("weight", weight), ("bias", bias)))
    if reason is not None:
        log_once(name, reason)
        return None
    accepted = act.name if act else "", act_args
    if key is not None:
        _accepted.put(key, accepted)
    return accepted


def _refused_channels(
    input: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None
) -> str | None:
    """Why PyTorch must look at it, or None."""
    if input.dim() < 2 or groups < 1 or input.shape[1] % groups:
        return f"an input of shape {tuple(input.shape)} in {groups} groups"
    if input.numel() == groups:
        return "a single value in each group"
    return refused_vectors(input, (input.shape[1],), weight, bias)


def _refused_rows(
    input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None
) -> str | None:
    """Why PyTorch must look at a layer or RMS norm, or None."""
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        return f"an input of shape {tuple(input.shape)} over {shape}"
    return refused_vectors(input, shape, weight, bias)


def _epilogue(
    y: Tensor, residual: Tensor | None, activation: str | None, activation_args: Sequence[float]
) -> Tensor:
    """What follows PyTorch's own norm."""
    if residual is not None:
        y = y + residual
    return activations.apply(*activations.resolve(activation, activation_args), y)
