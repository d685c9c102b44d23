"""Whether a provider's result of a group, layer, instance or RMS norm is right, against float64.

A few samples (or rows) at a time, so that the float64 copies of a large tensor need little memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.norm_call import NormCall, NormTensors
from tritonnorm.norms import reference

__all__ = ["norm_errors"]

CHUNK = 1 << 25  # elements in float64 at once


def norm_errors(
    call: NormCall, t: NormTensors, y: Tensor, gradients: dict[str, Tensor]
) -> dict[str, float]:
    """The largest error of each result, relative to the largest value of its tensor."""

    def rows(x: Tensor) -> Tensor:
        return x.detach().reshape(-1, call.shape[-1]) if call.rows else x.detach()

    x, dy, found = rows(t.x), rows(t.dy), rows(y)
    residual = None if t.residual is None else rows(t.residual)
    errors: dict[str, float] = {}
    values: dict[str, float] = {}
    sums: dict[str, Tensor] = {}

    def add(name: str, mine: Tensor, right: Tensor) -> None:
        error = float((mine.double() - right).abs().max())
        errors[name] = max(errors.get(name, 0.0), error if error == error else float("inf"))
        values[name] = max(values.get(name, 0.0), float(right.abs().max()))

    groups = {"group": call.groups, "instance": call.shape[1]}.get(call.norm, 1)
    wide = torch.float64 if call.dtype == torch.float64 else torch.float32
    eps = torch.finfo(wide).eps if call.norm == "rms" else 1e-5
    step = max(1, CHUNK * x.shape[0] // x.numel())
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        z = None if residual is None else residual[part]
        weight = t.weight.detach()
        bias = None if t.bias is None else t.bias.detach()
        given = (x[part], groups, weight, bias, eps, call.norm != "rms", call.activation, (), z)
        add("y", found[part], reference.forward(*given))
        if gradients:
            right = reference.backward(dy[part], *given)
            for name in gradients:
                exact = getattr(right, f"d{name}")
                if name in ("weight", "bias"):
                    sums[name] = sums.get(name, torch.zeros_like(exact)) + exact
                else:
                    add(f"d{name}", rows(gradients[name])[part], exact)
    for name, exact in sums.items():
        add(f"d{name}", gradients[name], exact)
    return {n: e / values[n] if values[n] else e for n, e in errors.items()}
