"""Other libraries of fused batch norm. Each is measured where it imports.

Their interfaces: apex.contrib.groupbn (NVIDIA/apex), attorch.BatchNorm2d (BobMcDear/attorch),
flag_gems.use_gems (FlagOpen/FlagGems), inplace_abn.inplace_abn (mapillary/inplace_abn).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.call import Tensors
from bench.providers.base import Forward, Provider, imported, missing
from bench.providers.eager import Eager
from bench.suites import Case

__all__ = ["Apex", "Attorch", "FlagGems", "InPlaceABN"]


class Apex(Provider):
    """apex's persistent NHWC kernels, with ReLU and addition fused."""

    name = "apex"
    what = "apex.contrib.groupbn, CUDA: persistent kernels, fp16 NHWC"

    def absent(self) -> str | None:
        return missing("apex.contrib.groupbn")

    def declines(self, case: Case) -> str | None:
        call = case.call
        if call.dtype != torch.float16 or not call.channels_last or len(call.shape) != 4:
            return "fp16 NHWC images only"
        if call.shape[1] % 4:
            return "channels must be a multiple of 4"
        if (call.activation, call.residual) not in ((None, False), ("relu", False), ("relu", True)):
            return "BN, BN+relu and BN+add+relu only"
        return None

    def setup(self, case: Case) -> Forward:
        kind = imported("apex.contrib.groupbn").BatchNorm2d_NHWC
        modules: dict[int, nn.Module] = {}

        def module(t: Tensors) -> Any:
            made = kind(case.call.shape[1], fuse_relu=case.call.activation is not None).cuda()
            made.train(case.call.training)
            for name in ("weight", "bias"):
                delattr(made, name)
                setattr(made, name, getattr(t, name))  # a tensor of ours, not a parameter
            made.running_mean, made.running_var = t.running_mean, t.running_var
            return made

        def forward(t: Tensors) -> Tensor:
            if id(t) not in modules:
                modules[id(t)] = module(t)
            z = () if t.residual is None else (t.residual.permute(0, 2, 3, 1),)
            y: Tensor = modules[id(t)](t.x.permute(0, 2, 3, 1), *z)
            return y.permute(0, 3, 1, 2)

        return forward


class Attorch(Provider):
    """attorch's Triton kernels, one program per channel, activation and addition fused."""

    name = "attorch"
    what = "attorch.BatchNorm2d, Triton: one program per channel"
    activations = (None, "relu", "sigmoid", "tanh", "gelu", "silu", "mish")

    def absent(self) -> str | None:
        return missing("attorch.batch_norm_layer")

    def declines(self, case: Case) -> str | None:
        call = case.call
        if len(call.shape) > 4:
            return "two to four dimensions only"
        if call.activation not in self.activations:
            return f"has no {call.activation}"
        return None

    def setup(self, case: Case) -> Forward:
        function = imported("attorch.batch_norm_layer").BatchNormAutoGrad
        call = case.call

        def forward(t: Tensors) -> Tensor:
            y: Tensor = function.apply(
                *(t.x, call.training, t.weight, t.bias, t.running_mean, t.running_var),
                *(0.1, 1e-5, True, t.residual, call.activation),
            )
            return y

        return forward


class FlagGems(Provider):
    """FlagGems in the place of PyTorch's operators, one for each, none fused."""

    name = "flag_gems"
    what = "flag_gems.use_gems: Triton kernels in the place of PyTorch's operators"

    def absent(self) -> str | None:
        return missing("flag_gems")

    def setup(self, case: Case) -> Forward:
        return Eager().setup(case)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        with imported("flag_gems").use_gems():
            yield


class InPlaceABN(Provider):
    """inplace_abn: the output overwrites the input.

    Its backward needs the overwritten input to come from another operation, whose time would count,
    so it is measured forward.
    """

    name = "inplace_abn"
    what = "inplace_abn, CUDA: the output overwrites the input; forward only"
    in_place = True
    activations = (None, "leaky_relu", "elu")

    def absent(self) -> str | None:
        return missing("inplace_abn")

    def declines(self, case: Case) -> str | None:
        if "backward" in case.mode:
            return "works in place: its backward cannot be timed by itself"
        if case.call.dtype == torch.bfloat16:
            return "has no bfloat16"
        if case.call.residual or case.call.activation not in self.activations:
            return f"has no {case.call.op}"
        return None

    def setup(self, case: Case) -> Forward:
        function = imported("inplace_abn").inplace_abn
        activation, slope = case.call.activation or "identity", 0.01
        slope = 1.0 if activation == "elu" else slope

        def forward(t: Tensors) -> Tensor:
            y: Tensor = function(
                *(t.x.detach(), t.weight, t.bias, t.running_mean, t.running_var),
                *(case.call.training, 0.1, 1e-5, activation, slope),
            )
            return y

        return forward
