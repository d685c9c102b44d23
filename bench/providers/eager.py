"""PyTorch as it is: one operator for each of batch norm, addition and activation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import norm_call
from bench.call import Call, Tensors
from bench.norm_call import NormCall
from bench.providers.base import Forward, Provider
from bench.suites import Case
from tritonnorm.activation import ACTIVATIONS

__all__ = ["Cudnn", "Eager", "backend", "epilogue", "of_call", "operators"]


def operators(
    call: Call,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    counter: Tensor,
) -> Tensor:
    """What an `nn.BatchNorm` module, the addition and the activation are in PyTorch's operators."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, call.training)
    return epilogue(call, y, residual, counter)


def of_call(call: Call | NormCall) -> Callable[..., Tensor]:
    """The operators of a batch norm, or of another norm."""
    return norm_call.operators if isinstance(call, NormCall) else operators


def epilogue(call: Call, y: Tensor, residual: Tensor | None, counter: Tensor) -> Tensor:
    """All of it but the batch norm itself."""
    if call.training:
        counter.add_(1)
    if residual is not None:
        y = y + residual
    return ACTIVATIONS[call.activation].function(y) if call.activation else y


def backend(t: Tensors) -> str:
    """Which batch norm PyTorch's dispatcher picks: native, cudnn or miopen."""
    picked = torch._C._select_batch_norm_backend(
        *(t.x, t.weight, t.bias, t.running_mean, t.running_var, t.call.training, 1e-5)
    )
    return str(picked).rpartition(".")[2].lower()


class Eager(Provider):
    """`torch.nn.functional.batch_norm`, ``+``, and the activation."""

    name = "eager"
    what = "PyTorch, eager; the plan is the backend that it picked"
    norms = True

    def setup(self, case: Case) -> Forward:
        def forward(t: Tensors) -> Tensor:
            return of_call(case.call)(case.call, *t.all)

        return forward

    def plan(self, case: Case, tensors: Tensors) -> str:
        return "" if isinstance(case.call, NormCall) else backend(tensors)


class Cudnn(Provider):
    """cuDNN's batch norm where PyTorch's own choice would be another."""

    name = "cudnn"
    what = "cuDNN's batch norm, called directly, then PyTorch's operators"

    def absent(self) -> str | None:
        there = torch.cuda.is_available() and torch.backends.cudnn.is_available()
        return None if there else "cuDNN is not available"

    def declines(self, case: Case) -> str | None:
        if case.call.dtype not in (torch.float16, torch.float32):
            return f"PyTorch's cuDNN binding has no {case.call.type}"
        return None

    def setup(self, case: Case) -> Forward:
        momentum, eps = 0.1, 1e-5
        call = case.call
        assert isinstance(call, Call)  # it has no other norms

        def forward(t: Tensors) -> Tensor:
            y, *_ = torch.cudnn_batch_norm(
                *(t.x, t.weight, t.bias, t.running_mean, t.running_var, t.call.training),
                *(momentum, eps),
            )
            return epilogue(call, y, t.residual, t.counter)

        return forward
