"""What decides between kernels and PyTorch, for every function of this library alike; and the
checks that all forms of batch norm share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function
from torch.utils._device import DeviceContext

from . import settings
from .device import is_simulated

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Whether torch computes a norm in float32 under autocast, by device: its own registrations say.
_WIDENED = {
    (name, device): torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)
    for name in ("group_norm", "layer_norm", "instance_norm", "rms_norm")
    for device, key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU"))
}
_logged: set[tuple[str, str]] = set()


class Kind:
    """Batch norms that `batch_norm_key` does not tell apart, and that passed all checks. Each
    is equal to itself alone."""

    __slots__ = ("activation", "activation_args")

    def __init__(self, activation: str, activation_args: tuple[float, ...]) -> None:
        self.activation, self.activation_args = activation, activation_args


class Accepted(dict[Any, Any]):
    """Keys of calls that passed all checks -> what is known of them."""

    MOST = 8192  # beyond it starts anew: shapes that change all the time must not fill memory

    def put(self, key: Any, known: Any) -> None:
        if len(self) >= self.MOST:
            self.clear()
        self[key] = known


def _hashable(activation: Any, activation_args: Any) -> bool:
    """Whether an epilogue is of the plain kinds that a key may hold."""
    if activation is not None and activation.__class__ is not str:
        return False
    return activation_args.__class__ is tuple and (
        not activation_args or all(a.__class__ is float for a in activation_args)
    )


def call_key(
    tensors: tuple[Any, ...],
    activation: str | None,
    activation_args: Sequence[float],
    options: tuple[Any, ...],
) -> tuple[Any, ...] | None:
    """What the checks look at, so that calls that are alike are checked once; None for a call with
    arguments that only a check may touch. The first tensor is the input."""
    if not _hashable(activation, activation_args):
        return None
    key: list[Any] = [tensors[0].layout, activation, activation_args, *options]
    for t in tensors:  # one tuple of all: a tuple of tuples costs more to hash and to compare
        if t is None:
            key.append(None)
        else:
            key += (t.shape, t.dtype, t.device, t.is_contiguous())
    return tuple(key)


def batch_norm_key(
    input: Tensor,
    residual: Tensor | None,
    slope: Tensor | None,
    vectors: tuple[Tensor | None, ...],
    running: tuple[Tensor | None, ...],
    activation: str | None,
    activation_args: Sequence[float],
    options: tuple[Any, ...],
) -> tuple[Any, ...] | None:
    """`call_key` for a batch norm, of less: ``vectors`` are looked at for how many elements they
    have, as every look costs the host. Of the ``running`` ones the layout counts too."""
    if not _hashable(activation, activation_args):
        return None
    key: list[Any] = [input.layout, input.shape, input.dtype, input.device, activation]
    key += (activation_args, *options)
    for t in (residual, slope):
        if t is None:
            key.append(None)
        else:
            key += (t.shape, t.dtype, t.device)
    for t in vectors:
        if t is None:
            key.append(None)
        else:
            key += (t.numel(), t.dtype, t.device)
    for t in running:
        key.append(t is None or t.is_contiguous())
    return tuple(key)


def check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    """Refuse a tensor that lies elsewhere than the input."""
    if tensor.device != input.device:
        raise ValueError(f"{name}: expected on {input.device} like input, got {tensor.device}")


def check_residual(residual: Tensor, input: Tensor) -> None:
    """Refuse a residual of another shape, dtype or device."""
    if residual.shape != input.shape:
        raise ValueError(
            f"residual: expected the shape of input {tuple(input.shape)}, "
            f"got {tuple(residual.shape)}"
        )
    if residual.dtype != input.dtype:
        raise ValueError(
            f"residual: expected the dtype of input {input.dtype}, got {residual.dtype}"
        )
    check_device("residual", residual, input)


def check_batch_norm(
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
    """Refuse a batch norm that cannot be computed, before anything is launched or changed.

    Arguments as in `functional.batch_norm`; not ``alone`` is a part of a batch, which may be a
    single value per channel.
    """
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


def has_override(arguments: Sequence[Any]) -> bool:
    """`torch.overrides.has_torch_function`, for which a default device is nothing: only functions
    that make tensors ask for it."""
    if not has_torch_function(arguments):
        return False
    if torch.compiler.is_compiling():
        return True
    modes = torch.overrides._get_current_function_mode_stack()
    if not modes or any(mode.__class__ is not DeviceContext for mode in modes):
        return True
    plain = torch._C._disabled_torch_function_impl
    kinds = {type(a) for a in arguments if hasattr(type(a), "__torch_function__")}
    return any(kind.__torch_function__ is not plain for kind in kinds - {Tensor})


def overridden(tensors: tuple[Tensor | None, ...]) -> str | None:
    """A reason to hand the whole call to PyTorch unseen, or None."""
    if has_override(tensors):
        return "an argument overrides torch functions (a tracer or a tensor subclass)"
    if not torch.compiler.is_compiling():
        if tensors[0] is not None and tensors[0].is_nested:
            return "input is nested"
        if torch._C._is_tracing():  # `torch.jit.is_tracing` of the host's code, at half the cost
            return "torch.jit is tracing"
    return None


def is_exporting() -> bool:
    """`torch.compiler.is_exporting`. The dynamo of torch 2.11 takes that for true in every compiled
    graph; the flag behind it it reads."""
    return torch.compiler._is_exporting_flag


def surroundings(input: Tensor) -> str | None:
    """A reason around the call, which may change from one to the next, or None."""
    if settings.disabled():
        return "TRITONNORM_DISABLE is set"
    if not (input.is_cuda or is_simulated() or settings.interpreting()):
        return f"input is on {input.device.type}, and Triton's interpreter is off"
    if is_exporting():
        return "the graph is being exported"
    return transformed()


def transformed() -> str | None:
    """What computes more around a call than its values and their gradients, or None."""
    if torch._C._are_functorch_transforms_active():  # the one such query that dynamo understands
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "torch.autograd.forward_ad is active"
    return None


def unsupported(input: Tensor, vectors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """Why the kernels cannot compute this kind of tensors, or None."""
    if input.device.type not in ("cuda", "cpu"):
        return f"input is on {input.device.type}"
    if not has_triton():
        return "triton is not installed"
    if input.dtype not in FLOATS:
        return f"input is {input.dtype}"
    if input.numel() == 0:
        return "input is empty"
    if input.layout != torch.strided:
        return f"input is {input.layout}"
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    for name, vector in vectors:
        if vector is not None and vector.dtype not in (input.dtype, wide):
            return f"{name} is {vector.dtype} with an input of {input.dtype}"
    return None


def unsupported_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None = None,
) -> str | None:
    """`unsupported` for the tensors of a batch norm."""
    running = (("running_mean", running_mean), ("running_var", running_var))
    vectors = (("weight", weight), ("bias", bias), ("slope", slope), *running)
    reason = unsupported(input, vectors)
    for name, vector in running:
        if reason is None and vector is not None and not vector.is_contiguous():
            return f"{name} is not contiguous"  # it is updated in place
    return reason


def refused_vectors(
    input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None
) -> str | None:
    """Why PyTorch must look at a weight and a bias, or None."""
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if tuple(vector.shape) != shape:
            return f"{name} is of shape {tuple(vector.shape)}"
        if vector.device != input.device:
            return f"{name} is on {vector.device}, and input on {input.device}"
    return None


def has_triton() -> bool:
    """Whether triton can be imported."""
    return _triton


# Looked up before a compiler can see it change, which would cost a second graph.
_triton = importlib.util.find_spec("triton") is not None


def log_once(function: str, reason: str) -> None:
    """Say once that a function runs in PyTorch, and why."""
    if torch.compiler.is_compiling() or (function, reason) in _logged:
        return
    _logged.add((function, reason))
    settings.logger.info("%s runs in PyTorch: %s", function, reason)


def widened(name: str, *tensors: Any) -> tuple[Any, ...]:
    """The tensors in float32 where torch's autocast asks for that."""
    if not (torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()):
        return tensors
    if overridden(tensors) is not None:
        return tensors
    device = tensors[0].device.type
    if not _WIDENED.get((name, device)) or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(
        t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t
        for t in tensors
    )
