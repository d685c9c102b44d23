"""The one check that holds a case of `tests.cases` to the specification, on any device.

`check` runs forward and backward with any algorithm, and compares every result with
`tritonnorm.reference` in float64. The yardstick is PyTorch in the same dtype on the same device:
our error may be twice its error, plus a slack of a few units in the last place (ulp):

* ``FEW`` = 2 ulp of the accumulator's dtype, at the scale of the terms that a quantity sums up.
  PyTorch's CPU kernels sum fp32 in float64, so 2x their error would ask fp32 sums to be exact.
  Over the matrix in the interpreter our error exceeds 2x PyTorch's and the rounding by 0.1 such
  ulp at the most; the rest is for a GPU's approximate exp and division, 2 ulp each.
* 1 ulp of the stored dtype, at the scale of the stored tensor: its rounding, and one flip of it.

While our code runs, every tensor it allocates is filled with NaN: an unwritten element fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cases import LAYOUTS, Case
from tritonnorm import functional, reference
from tritonnorm.activation import apply, resolve_learned
from tritonnorm.plan import force_plan
from tritonnorm.problem import View

FEW = 2
EPS = 1e-5

# Where a derivative jumps. Within rounding of it either side is right, so no gradient goes there.
JUMPS = {
    "relu": (0.0,),
    "relu6": (0.0, 6.0),
    "leaky_relu": (0.0,),
    "prelu": (0.0,),
    "hardsigmoid": (-3.0, 3.0),
    "hardswish": (-3.0, 3.0),
    "elu": (0.0,),
}


@dataclass
class Data:
    """The tensors of one call. ``counter`` is num_batches_tracked."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    counter: Tensor | None
    dy: Tensor
    slope: Tensor | None = None

    def copies(self) -> Data:
        """The same, with running statistics and a counter of its own."""
        own = {n: getattr(self, n) for n in ("running_mean", "running_var", "counter")}
        return replace(self, **{n: None if t is None else t.clone() for n, t in own.items()})


def build(case: Case, device: str | torch.device = "cpu") -> Data:
    """Tensors of a case; the values are those of a CPU generator, whatever the device."""
    generator = torch.Generator().manual_seed(len(str(case)))
    c, kind = case.shape[1], case.parameters or case.dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def placed(values: Tensor, layout: str) -> Tensor:
        return LAYOUTS[layout](values.to(case.dtype).to(device))

    def vector(values: Tensor, wanted: bool) -> Tensor | None:
        return values.to(kind).to(device) if wanted else None

    of_channel = reference.channels(
        torch.linspace(-1, 1, c, dtype=torch.float64), normal(*case.shape)
    )
    x = placed(normal(*case.shape) * case.std + case.mean + of_channel, case.layout)
    residual = placed(normal(*case.shape), case.residual) if case.residual else None
    signs = 1.0 - 2.0 * (torch.arange(c) % 3 == 2)
    weight = vector((normal(c).abs() + 0.5) * signs, case.affine in ("both", "weight"))
    bias = vector(normal(c), case.affine in ("both", "bias"))
    tracked = case.track or not case.training
    mean, var = vector(normal(c) + case.mean, tracked), vector(normal(c).abs() + 0.5, tracked)
    counter = torch.tensor(3, device=device) if tracked else None
    v = reference.forward(
        *_cpu(x, mean, var, weight, bias), case.training, EPS, residual=_cpu(residual)[0]
    )
    dy = normal(*case.shape)
    slope = vector(normal(c if case.slope == "channel" else 1), case.slope is not None)
    margin = 4 * torch.finfo(case.dtype).eps * float(v.y.abs().max())
    for jump in JUMPS.get(case.activation or "", ()):
        dy = torch.where((v.y - jump).abs() <= margin, 0.0, dy)
    return Data(x, residual, weight, bias, mean, var, counter, placed(dy, case.grad), slope)


def _cpu(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().double().cpu() for t in tensors]


Function = Callable[[Case, Data], Tensor]


def by_tritonnorm(case: Case, d: Data) -> Tensor:
    return functional.batch_norm(
        d.x, d.running_mean, d.running_var, d.weight, d.bias, case.training, case.momentum, EPS,
        activation=case.activation, activation_args=case.args, residual=d.residual,
        num_batches_tracked=d.counter, slope=d.slope,
    )  # fmt: skip


def by_torch(case: Case, d: Data) -> Tensor:
    """The same call from PyTorch's own parts."""
    momentum = case.momentum
    if case.training and d.counter is not None:
        d.counter.add_(1)
        momentum = 1.0 / d.counter.item() if momentum is None else momentum
    y = F.batch_norm(
        d.x, d.running_mean, d.running_var, d.weight, d.bias, case.training, momentum or 0.0, EPS
    )
    found = resolve_learned(case.activation, case.args, d.slope, case.shape[1])
    return apply(*found, y if d.residual is None else y + d.residual, d.slope)


def results(function: Function, case: Case, data: Data, gradients: bool) -> dict[str, Tensor]:
    """Output, running statistics and (with ``gradients``) the gradients of one call."""
    d = data.copies()
    leaves = {"x": "x", "residual": "r", "weight": "w", "bias": "b", "slope": "s"}
    asked = {n: getattr(d, n) for n, short in leaves.items() if short in case.needs}
    asked = {
        n: t.detach().requires_grad_() for n, t in asked.items() if gradients and t is not None
    }
    d = replace(d, **asked)
    with torch.set_grad_enabled(gradients):
        y = function(case, d)
    found = {"y": y.detach(), "running_mean": d.running_mean, "running_var": d.running_var}
    found["counter"] = d.counter
    if asked:
        for name, g in zip(asked, torch.autograd.grad(y, list(asked.values()), d.dy), strict=True):
            found[f"d{name}"] = g
    return {n: t for n, t in found.items() if t is not None}


def expected(case: Case, data: Data) -> dict[str, tuple[Tensor, float]]:
    """What the specification says, each with the slack described at the top of this file."""
    x, residual, weight, bias, dy = _cpu(data.x, data.residual, data.weight, data.bias, data.dy)
    old = _cpu(data.running_mean, data.running_var)
    slope = _cpu(data.slope)[0]
    common: dict[str, Any] = {
        "activation": case.activation,
        "activation_args": case.args,
        "residual": residual,
        "slope": slope,
    }
    f = reference.forward(x, *old, weight, bias, case.training, EPS, **common)
    b = reference.backward(dy, x, f.mean, f.var, weight, bias, case.training, EPS, **common)
    count = x.numel() // x.shape[1]
    axes = [d for d in range(x.dim()) if d != 1]
    rstd = torch.rsqrt(f.var + EPS)
    scale = (rstd * (1 if weight is None else weight)).abs()
    normal = ((x - reference.channels(f.mean, x)) * reference.channels(rstd, x)).abs()
    # The terms of x-hat: x and the mean, whose own rounding counts when it is large.
    terms = normal + reference.channels(f.mean.abs() * rstd, x)
    size_v = float((terms * reference.channels(scale / rstd, x)).max())
    size_v += sum(float(t.abs().max()) for t in (bias, residual) if t is not None)
    found, _ = resolve_learned(case.activation, case.args, slope, x.shape[1])
    smooth = found is not None and not found.two_valued
    g = dy.abs() * (1.0 + size_v if smooth else 1.0)
    size_g = float(g.max())
    size = {
        "y": size_v,
        "dresidual": size_g,
        "dbias": float(g.sum(axes).max()),
        "dweight": float((g * terms).sum(axes).max()),
        "dx": float(scale.max()) * size_g * (2.0 + float(terms.max()) if case.training else 1.0),
    }
    tensors = {
        "y": f.y,
        "dx": b.dx,
        "dresidual": b.dresidual,
        "dweight": b.dweight,
        "dbias": b.dbias,
    }
    if slope is not None and b.dslope is not None:
        tensors["dslope"] = b.dslope
        size["dslope"] = float(g.sum() if slope.numel() == 1 else g.sum(axes).max())
    if old[0] is not None and old[1] is not None:
        new = (old[0], old[1])
        if case.training:
            new = reference.updated_running(new, f.mean, f.var, count, case.momentum, 4)
        tensors |= {"running_mean": new[0], "running_var": new[1]}
        size["running_mean"] = float(x.abs().mean(axes).max() + old[0].abs().max())
        size["running_var"] = float(f.var.max() * count / max(count - 1, 1) + old[1].max())
    accumulator = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps
    stored = dict.fromkeys(("y", "dx", "dresidual"), torch.finfo(case.dtype).eps)
    rounding = torch.finfo(case.parameters or case.dtype).eps
    return {
        n: (t, FEW * accumulator * size[n] + stored.get(n, rounding) * float(t.abs().max()))
        for n, t in tensors.items()
    }


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor that torch allocates without a value is filled with NaN (integers: 0xA5)."""

    def filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_and_fill(*args: Any, **kwargs: Any) -> Tensor:
            t = allocate(*args, **kwargs)
            if not t.is_meta:
                t.fill_(float("nan") if t.is_floating_point() else 0xA5)
            return t

        return allocate_and_fill

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
            (Tensor, "new_empty"), (Tensor, "new_empty_strided"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, filled(getattr(owner, name))))
        yield


@contextlib.contextmanager
def ran() -> Iterator[list[str]]:
    """The algorithms that the operators take while the context lasts, in order."""
    from tritonnorm import ops

    names: list[str] = []
    recipe = ops.recipe

    def recorded(*args: Any, **options: Any) -> Any:
        found = recipe(*args, **options)
        names.append(found.plan.algorithm)
        return found

    with mock.patch.object(ops, "recipe", recorded), mock.patch.object(ops, "of_kinds", {}):
        yield names


def small_tiles(x: Tensor) -> Any:
    """A configuration with tiles so small that tiny tensors have several, in two splits or more."""
    from tritonnorm.kernels.base import Config

    dense = torch.empty_like(x).stride()
    view = View.of(x.shape, dense, dense)
    assert view is not None
    return Config(8, 1, 8, splits=3) if view.channels_last else Config(4, 2, 16, splits=2)


def check(
    case: Case,
    device: str | torch.device = "cpu",
    algorithm: str | None = None,
    *,
    tiles: str = "formula",
    gradients: bool = True,
    config: Any = None,
) -> None:
    """Run a case and hold every result to the specification.

    Args:
        case: what to run.
        device: where.
        algorithm: forces it, with the ``config`` given; None leaves the choice to the plan.
        tiles: "formula", or "small" for `small_tiles`.
        gradients: with backward; else under `torch.no_grad`.

    Raises:
        AssertionError: a result is off, an input changed, or another algorithm (or no kernel) ran.
    """
    data = build(case, device)
    before = [t.clone() for t in (data.x, data.dy, data.weight, data.residual) if t is not None]
    if tiles == "small":
        config = small_tiles(data.x)
    forced = force_plan(algorithm, config) if algorithm else contextlib.nullcontext()
    with forced, poisoned(), ran() as algorithms:
        ours = results(by_tritonnorm, case, data, gradients)
    assert algorithms, "no kernel ran"
    assert algorithm in (None, algorithms[0]), f"{algorithms[0]} ran instead of {algorithm}"
    compare(case, data, ours, results(by_torch, case, data, gradients))
    after = [t for t in (data.x, data.dy, data.weight, data.residual) if t is not None]
    assert all(map(torch.equal, before, after)), "an input was written to"


def compare(case: Case, data: Data, ours: dict[str, Tensor], torchs: dict[str, Tensor]) -> None:
    """Hold results to the specification; the message lists everything that is off."""
    wrong = []
    for name in torchs:
        if name not in ours or ours[name].dtype != torchs[name].dtype:
            wrong.append(f"{name}: expected {torchs[name].dtype}, got {ours.get(name)}")
        elif name == "counter" or (name.startswith("running") and not case.training):
            if not torch.equal(ours[name], torchs[name]):
                wrong.append(f"{name}: expected {torchs[name]}, got {ours[name]}")
        else:
            value, slack = expected(case, data)[name]
            mine, theirs = ((t[name].double().cpu() - value).abs().max() for t in (ours, torchs))
            if not mine <= 2.0 * theirs + slack:  # also when it is NaN
                wrong.append(f"{name}: error {mine:.3g}, torch's {theirs:.3g}, slack {slack:.3g}")
    if ours["y"].stride() != torch.empty_like(data.x).stride():
        wrong.append(f"y: strides {ours['y'].stride()} for an input of {data.x.stride()}")
    assert not wrong, f"{case}\n" + "\n".join(wrong)
