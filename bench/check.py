"""Whether a provider's result is right: nothing is timed before this.

Output, running statistics and gradients are held against `tritonnorm.reference` in float64, channel
by channel, so that the float64 copies of a large tensor need little memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.call import Tensors
from bench.norm_call import NormTensors
from bench.norm_check import norm_errors
from bench.providers.base import Forward, Provider
from bench.suites import Case
from tritonnorm import reference
from tritonnorm.activation import ACTIVATIONS, apply

__all__ = ["WrongResult", "check", "tolerance"]

CHUNK = 1 << 25  # elements in float64 at once: 256 MB a tensor, of which about ten are alive


class WrongResult(RuntimeError):
    """A provider computed something else than the operation."""


def tolerance(dtype: torch.dtype, result: str = "y") -> float:
    """The largest error of a right result, relative to the largest value of its tensor.

    Separate operators round after each: twice the spacing of ``dtype`` at most. The running
    statistics are float32 whatever the dtype; sums over a million values, and eps added to the
    weight (inplace_abn), are good to 4e-5.
    """
    if dtype == torch.float64:
        return 1e-10
    return 4e-5 if result.startswith("running") else max(2.0 * torch.finfo(dtype).eps, 4e-5)


@dataclass
class _Worst:
    """The largest error and the largest value of one result, over all channels."""

    error: float = 0.0
    value: float = 0.0

    def add(self, found: Tensor, right: Tensor) -> None:
        error = (found.double() - right).abs().max().item()
        self.error = max(self.error, error if error == error else float("inf"))
        self.value = max(self.value, right.abs().max().item())

    @property
    def relative(self) -> float:
        return self.error / self.value if self.value else self.error


@dataclass
class _Found:
    """What a provider computed for a set of tensors."""

    y: Tensor
    running: tuple[Tensor, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)


def check(case: Case, provider: Provider, forward: Forward, tensors: Tensors) -> float:
    """The largest relative error of all results of a case; the tensors are left as they were.

    Raises:
        WrongResult: one of them is beyond `tolerance`, or of another shape, dtype or device.
    """
    if isinstance(tensors, NormTensors):
        return _check_norm(case, provider, forward, tensors)
    dy = _settled(case, tensors) if "backward" in case.mode else tensors.dy
    found = _run(case, provider, forward, tensors, dy)
    like = tensors.x
    if (found.y.shape, found.y.dtype) != (like.shape, like.dtype):
        raise WrongResult(f"y is {found.y.dtype} of shape {tuple(found.y.shape)}")
    worst: dict[str, _Worst] = {}
    for part in _channels(like):
        for name, (mine, right) in _results(case, tensors, found, dy, part).items():
            worst.setdefault(name, _Worst()).add(mine, right)
    for name, result in worst.items():
        limit = tolerance(case.call.dtype, name)
        if not result.relative <= limit:
            raise WrongResult(f"wrong {name}: error {result.relative:.1e}, more than {limit:.1e}")
    return max(result.relative for result in worst.values())


def _check_norm(case: Case, provider: Provider, forward: Forward, t: NormTensors) -> float:
    """`check` for the other norms, with smooth activations."""
    with provider.around():
        y = forward(t)  # type: ignore[arg-type]  # a provider that has norms takes their tensors
        gradients = t.backward(y) if "backward" in case.mode else ()
    if (y.shape, y.dtype) != (t.x.shape, t.x.dtype):
        raise WrongResult(f"y is {y.dtype} of shape {tuple(y.shape)}")
    named = ("x", "residual", "weight", "bias")
    wanted = [n for n in named if getattr(t, n) is not None and getattr(t, n).requires_grad]
    found = dict(zip(wanted, gradients, strict=False))
    errors = norm_errors(t.call, t, y.detach(), found)
    limit = tolerance(case.call.dtype)
    for name, error in errors.items():
        if not error <= limit:
            raise WrongResult(f"wrong {name}: error {error:.1e}, more than {limit:.1e}")
    return max(errors.values())


def _run(case: Case, provider: Provider, forward: Forward, given: Tensors, dy: Tensor) -> _Found:
    t = given.with_own_statistics()
    before = t.x.detach().clone()
    with provider.around(), torch.set_grad_enabled(case.mode != "inference"):
        y = forward(t)
        gradients = torch.autograd.grad(y, t.inputs, dy) if "backward" in case.mode else ()
    found = _Found(y.detach(), (t.running_mean, t.running_var))
    if y.data_ptr() == t.x.data_ptr():  # it works in place
        found.y = found.y.clone()
        with torch.no_grad():
            t.x.copy_(before)
    named = ("x", "residual", "weight", "bias")
    wanted = [n for n in named if getattr(t, n) is not None and getattr(t, n).requires_grad]
    found.gradients = dict(zip(wanted, gradients, strict=False))
    return found


def _channels(x: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK * x.shape[1] // x.numel())
    for start in range(0, x.shape[1], step):
        yield slice(start, start + step)


def _settled(case: Case, t: Tensors) -> Tensor:
    """``dy``, but 0 where the activation bends within rounding: there either slope is right."""
    if case.call.activation is None:
        return t.dy
    dy = t.dy.clone()
    activation = ACTIVATIONS[case.call.activation]
    args = tuple(value for _, value in activation.defaults)
    for part in _channels(t.x):
        v = reference.forward(**_inputs(case, t, part)).y
        margin = 4 * torch.finfo(case.call.dtype).eps * v.abs().max()
        slopes = []
        for moved in (v - margin, v + margin):
            moved.requires_grad_()
            with torch.enable_grad():
                y = apply(activation, args, moved)
            slopes.append(torch.autograd.grad(y.sum(), moved)[0])
        bends = (slopes[1] - slopes[0]).abs() > 0.05
        dy[:, part] = torch.where(bends, 0.0, dy[:, part])
    return dy


def _inputs(case: Case, t: Tensors, part: slice) -> dict[str, Any]:
    """The arguments of `reference.forward` for some channels, without the activation."""
    return {
        "x": t.x.detach()[:, part],
        "running_mean": t.running_mean[part],
        "running_var": t.running_var[part],
        "weight": t.weight.detach()[part],
        "bias": t.bias.detach()[part],
        "training": case.call.training,
        "residual": None if t.residual is None else t.residual.detach()[:, part],
    }


def _results(
    case: Case, t: Tensors, found: _Found, dy: Tensor, part: slice
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (computed, right) of every result, for some channels."""
    given = _inputs(case, t, part)
    exact = reference.forward(**given, activation=case.call.activation)
    results = {"y": (found.y[:, part], exact.y)}
    if case.call.training:
        count = t.x.numel() // t.x.shape[1]
        before = (t.running_mean[part], t.running_var[part])
        running = reference.updated_running(before, exact.mean, exact.var, count, 0.1, 1)
        results["running_mean"] = (found.running[0][part], running[0])
        results["running_var"] = (found.running[1][part], running[1])
    if found.gradients:
        slope = reference.backward(
            *(dy[:, part], given["x"], exact.mean, exact.var, given["weight"], given["bias"]),
            training=case.call.training,
            activation=case.call.activation,
            residual=given["residual"],
        )
        right = {
            "x": slope.dx,
            "residual": slope.dresidual,
            "weight": slope.dweight,
            "bias": slope.dbias,
        }
        for name, gradient in found.gradients.items():
            mine = gradient[:, part] if gradient.dim() > 1 else gradient[part]
            results[f"d{name}"] = (mine, right[name])
    return results
