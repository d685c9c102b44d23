"""Group, layer, instance and RMS norm: cases, and the one check that holds them to float64.

The yardstick is that of `tests.matrix`: twice PyTorch's error in the same dtype, plus `FEW` ulp of
the accumulator at the scale of the terms that a quantity sums up, and 1 ulp of what is stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cases import LAYOUTS
from tests.matrix import FEW, JUMPS, poisoned
from tritonnorm import functional
from tritonnorm.activation import resolve
from tritonnorm.norms import reference as group_reference
from tritonnorm.plan import force_plan

EPS = 1e-5


@dataclass(frozen=True)
class NormCase:
    """One call; layer and RMS norm are over the last dimension. Its name lists what differs from
    the defaults."""

    norm: str
    shape: tuple[int, ...]
    groups: int = 1
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype | None = None
    activation: str | None = None
    args: tuple[float, ...] = ()
    residual: str | None = None
    affine: str = "both"
    grad: str = "contiguous"
    needs: str = "xrwb"
    mean: float = 1.0

    def __str__(self) -> str:
        parts = [self.norm, "x".join(map(str, self.shape))]
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}={value}".replace("torch.", "").replace(" ", ""))
        return "-".join(parts)

    @property
    def rows(self) -> bool:
        return self.norm in ("layer", "rms")

    @property
    def vector(self) -> int:
        """Length of weight and bias."""
        return self.shape[-1] if self.rows else self.shape[1]

    @property
    def in_groups(self) -> int:
        return {"group": self.groups, "instance": self.shape[1]}.get(self.norm, 1)

    def channels_second(self, t: Tensor) -> Tensor:
        """As ``[N, C, ...]``."""
        return t.reshape(-1, self.shape[-1]) if self.rows else t


@dataclass
class NormData:
    """The tensors of a case."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor

    @property
    def named(self) -> dict[str, Tensor]:
        return {n: t for n, t in vars(self).items() if n != "dy" and t is not None}


def build(case: NormCase, device: str = "cpu") -> NormData:
    """Tensors of a case; the values are those of a CPU generator, whatever the device."""
    generator = torch.Generator().manual_seed(len(str(case)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def placed(values: Tensor, layout: str) -> Tensor:
        return LAYOUTS[layout](values.to(case.dtype).to(device))

    def vector(wanted: bool) -> Tensor | None:
        values = normal(case.vector)
        values = values + 0.5 * values.sign()
        return values.to(case.parameters or case.dtype).to(device) if wanted else None

    x = placed(normal(*case.shape) * 2.0 + case.mean, case.layout)
    residual = placed(normal(*case.shape), case.residual) if case.residual else None
    weight = vector(case.affine in ("both", "weight"))
    bias = vector(case.affine in ("both", "bias") and case.norm != "rms")
    data = NormData(x, residual, weight, bias, x)
    v, dy = expected_output(case, data, activation=None), normal(*case.shape)
    margin = 4 * torch.finfo(case.dtype).eps * max(1.0, float(v.abs().max()))
    for jump in JUMPS.get(case.activation or "", ()):
        dy = torch.where((v - jump).abs() <= margin, 0.0, dy)
    data.dy = placed(dy, case.grad)
    return data


def _doubles(case: NormCase, d: NormData) -> dict[str, Any]:
    found = {n: t.detach().double().cpu() for n, t in d.named.items()}
    for n in ("x", "residual"):
        if n in found:
            found[n] = case.channels_second(found[n])
    return {**found, "groups": case.in_groups, "centred": case.norm != "rms", "eps": EPS}


def expected_output(case: NormCase, d: NormData, **options: Any) -> Tensor:
    return group_reference.forward(**_doubles(case, d), **options).reshape(case.shape)


Function = Callable[[NormCase, NormData], Tensor]


def _by(module: Any, case: NormCase, d: NormData, **options: Any) -> Tensor:
    if case.norm == "group":
        return module.group_norm(d.x, case.groups, d.weight, d.bias, EPS, **options)
    if case.norm == "instance":
        return module.instance_norm(
            d.x, weight=d.weight, bias=d.bias, use_input_stats=True, eps=EPS, **options
        )
    shape = case.shape[-1:]
    if case.norm == "layer":
        return module.layer_norm(d.x, shape, d.weight, d.bias, EPS, **options)
    return module.rms_norm(d.x, shape, d.weight, EPS, **options)


def by_tritonnorm(case: NormCase, d: NormData) -> Tensor:
    options = {"activation": case.activation, "activation_args": case.args}
    return _by(functional, case, d, residual=d.residual, **options)


def by_torch(case: NormCase, d: NormData) -> Tensor:
    """The same from PyTorch's own parts, with parameters in the dtype of the input."""
    w, b = (None if t is None else t.to(d.x.dtype) for t in (d.weight, d.bias))
    if b is not None and w is None:  # its CPU kernels refuse a bias alone
        w = torch.ones_like(b)
    y = _by(F, case, NormData(d.x, None, w, b, d.dy))
    y = y if d.residual is None else y + d.residual
    found, args = resolve(case.activation, case.args)
    return y if found is None else found.function(y, *args)


def results(function: Function, case: NormCase, data: NormData) -> dict[str, Tensor]:
    """The output and the gradients asked for."""
    short = {"x": "x", "residual": "r", "weight": "w", "bias": "b"}
    leaves = {
        n: t.detach().requires_grad_() for n, t in data.named.items() if short[n] in case.needs
    }
    y = function(case, NormData(**{**vars(data), **leaves}))
    grads = torch.autograd.grad(y, list(leaves.values()), data.dy)
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


def expected(case: NormCase, data: NormData) -> dict[str, tuple[Tensor, float]]:
    """What the specification says, each with its slack."""
    d = _doubles(case, data)
    options = {"activation": case.activation, "activation_args": case.args}
    dy = case.channels_second(data.dy.detach().double().cpu())
    b = group_reference.backward(dy, **d, **options)
    y = group_reference.forward(**d, **options)
    x, groups, centred = d["x"], d["groups"], d["centred"]
    grouped = x.reshape(x.shape[0], groups, -1)
    mean = grouped.mean(2, keepdim=True) if centred else torch.zeros(1, dtype=x.dtype)
    rstd = torch.rsqrt((grouped - mean).square().mean(2, keepdim=True) + EPS)
    normal = ((grouped - mean) * rstd).abs()
    terms = (normal + (mean.abs() * rstd)).reshape(x.shape)
    weight = d["weight"].abs().max() if "weight" in d else 1.0
    size_v = float(terms.max() * weight)
    size_v += sum(float(d[n].abs().max()) for n in ("bias", "residual") if n in d)
    found, _ = resolve(case.activation, case.args)
    smooth = found is not None and not found.two_valued
    g = dy.abs() * (1.0 + size_v if smooth else 1.0)
    others = [i for i in range(x.dim()) if i != 1]
    size = {
        "y": size_v,
        "dresidual": float(g.max()),
        "dbias": float(g.sum(others).max()),
        "dweight": float((g * terms).sum(others).max()),
        "dx": float(rstd.max() * weight * g.max()) * (2.0 + float(terms.max())),
    }
    tensors = {"y": y, "dx": b.dx, "dresidual": b.dresidual, "dweight": b.dweight, "dbias": b.dbias}
    accumulator = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps
    stored = dict.fromkeys(("y", "dx", "dresidual"), torch.finfo(case.dtype).eps)
    rounding = torch.finfo(case.parameters or case.dtype).eps
    slack = {
        n: FEW * accumulator * size[n] + stored.get(n, rounding) * float(t.abs().max())
        for n, t in tensors.items()
    }
    for n in stored:
        tensors[n] = tensors[n].reshape(case.shape)
    return {n: (t, slack[n]) for n, t in tensors.items()}


@contextlib.contextmanager
def ran() -> Iterator[list[str]]:
    """The algorithms that the operators take while the context lasts, in order."""
    from tritonnorm.norms import ops as group_ops

    names: list[str] = []
    recipe = group_ops.recipe

    def recorded(*args: Any) -> Any:
        found = recipe(*args)
        names.append(found.plan.algorithm)
        return found

    with mock.patch.object(group_ops, "recipe", recorded):
        yield names


def compare(case: NormCase, data: NormData, ours: dict[str, Tensor], torchs: Any) -> None:
    """Hold results to the specification; the message lists everything that is off."""
    wrong = []
    known = expected(case, data)
    assert set(ours) == set(torchs)
    for name, mine in ours.items():
        value, slack = known[name]
        errors = [float((t.double().cpu() - value).abs().max()) for t in (mine, torchs[name])]
        if not errors[0] <= 2.0 * errors[1] + slack:  # also when it is NaN
            wrong.append(
                f"{name}: error {errors[0]:.3g}, torch's {errors[1]:.3g}, slack {slack:.3g}"
            )
        original = data.x if name in ("y", "dresidual") else data.named[name[1:]]
        if mine.dtype != original.dtype:
            wrong.append(f"{name}: {mine.dtype}")
    like = torch.empty_like(data.x)
    strides = like.contiguous().stride() if case.rows else like.stride()
    if ours["y"].stride() != strides:
        wrong.append(f"y: strides {ours['y'].stride()} for an input of {data.x.stride()}")
    assert not wrong, f"{case}\n" + "\n".join(wrong)


def check(
    case: NormCase, device: str = "cpu", algorithm: str | None = None, config: Any = None
) -> None:
    """Run a case forward and backward and hold every result to the specification."""
    data = build(case, device)
    before = [t.clone() for t in (data.dy, *data.named.values())]
    forced = force_plan(algorithm, config) if algorithm else contextlib.nullcontext()
    with forced, poisoned(), ran() as algorithms:
        ours = results(by_tritonnorm, case, data)
    assert algorithms, "no kernel ran"
    if algorithm is not None:
        assert set(algorithms) == {algorithm}, f"{algorithms} instead of {algorithm}"
    compare(case, data, ours, results(by_torch, case, data))
    assert all(map(torch.equal, before, (data.dy, *data.named.values()))), "an input changed"
