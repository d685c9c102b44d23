"""Liger's Triton kernels for the norms of language models (linkedin/Liger-Kernel).

Its interface: ``liger_layer_norm(x, weight, bias, eps)``, ``liger_rms_norm(x, weight, eps, offset,
casting_mode, in_place)`` and ``liger_group_norm(x, weight, bias, channels, groups, eps)``. The
addition and the activation are PyTorch's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bench.norm_call import NormCall
from bench.providers.base import Forward, Provider, imported, missing
from bench.suites import Case
from tritonnorm.activation import ACTIVATIONS

__all__ = ["Liger"]

_MODULE = "liger_kernel.transformers.functional"


class Liger(Provider):
    """Layer, RMS and group norm; the rest in PyTorch's operators."""

    name = "liger"
    what = "liger_kernel, Triton: layer, RMS and group norm"
    norms = True

    def absent(self) -> str | None:
        return missing(_MODULE)

    def declines(self, case: Case) -> str | None:
        if not isinstance(case.call, NormCall) or case.call.norm == "instance":
            return "layer, RMS and group norm only"
        if case.call.channels_last:
            return "contiguous input only"
        return None

    def setup(self, case: Case) -> Forward:
        liger = imported(_MODULE)
        call = case.call
        assert isinstance(call, NormCall)

        def norm(t: Any) -> Tensor:
            w, b = t.weight, t.bias
            if call.norm == "layer":
                y = liger.liger_layer_norm(t.x, w, b, 1e-5)
            elif call.norm == "rms":
                # Not in place: the upstream gradient is used again.
                y = liger.liger_rms_norm(t.x, w, 2.0**-23, 0.0, "llama", False)
            else:
                y = liger.liger_group_norm(t.x, w, b, call.shape[1], call.groups, 1e-5)
            return y

        def forward(t: Any) -> Tensor:
            y = norm(t)
            if t.residual is not None:
                y = y + t.residual
            return ACTIVATIONS[call.activation].function(y) if call.activation else y

        return forward
