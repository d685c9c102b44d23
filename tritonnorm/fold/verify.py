"""Checks of a fold in float64: each pair on random data, and the whole model on real inputs.

A comparison in the model's own precision proves little: rounding alone can move the outputs of a
deep network by a tenth. In float64 a correct fold agrees to about 1e-12.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tritonnorm.flow.guard import StateGuard, quiet_run
from tritonnorm.flow.inputs import Call, tensors_in
from tritonnorm.fold.algebra import Folded
from tritonnorm.fold.edit import apply
from tritonnorm.fold.job import Job
from tritonnorm.fold.plan import Outcome
from tritonnorm.fold.sites import Site, affine_of
from tritonnorm.report import Report

TOLERANCE = 1e-9  # relative, float64; the largest seen over 130 correct models is about 1e-11
MOST = 8  # folds that are looked for one by one before all are given up
SAMPLE = 4096  # elements of each output of a batch norm that are compared
_LOW = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PairCheck:
    """Errors of one folded pair on random data, relative to the largest output.

    Attributes:
        exact: with the float64 parameters; shows whether the algebra is right.
        stored: with the rounded parameters; what the user gets.
        problem: why the pair must not be folded; empty when all is well.
    """

    exact: float
    stored: float
    problem: str = ""


def check_pair(layer: nn.Module, bn: nn.Module, site: Site) -> PairCheck:
    """Run layer and batch norm in float64 on random data, unfolded and folded, and compare.

    The rounded parameters may differ by half a unit in the last place each, so their output is
    held against that bound, element by element.
    """
    assert site.exact is not None and site.stored is not None and site.affine is None
    exact, stored_ = (_on(folded, layer) for folded in (site.exact, site.stored))
    with quiet_run():
        layer, bn = _double(layer), _double(bn)
        x = torch.randn(_input_shape(layer), dtype=torch.float64, device=exact.weight.device)
        raw = layer(x)
        expected = nn.functional.batch_norm(
            raw,
            bn.running_mean,  # type: ignore[arg-type]
            bn.running_var,  # type: ignore[arg-type]
            bn.weight,  # type: ignore[arg-type]
            bn.bias,  # type: ignore[arg-type]
            eps=bn.eps,  # type: ignore[arg-type]
        )
        folded = _with(layer, exact)(x)
        stored = _with(layer, stored_)(x)
        magnitude = Folded(exact.weight.abs(), exact.bias.abs())
        bound = _with(layer, magnitude)(x.abs()) * torch.finfo(stored_.weight.dtype).eps
        # Where conv bias and mean cancel, the unfolded pair is the less accurate one.
        scale = affine_of(bn).scale.abs().amax().to(raw.device)
        size = torch.maximum(expected.abs().amax(), scale * raw.abs().amax())
    check = PairCheck(_relative(expected, folded, size), _relative(expected, stored, size))
    if not check.exact <= TOLERANCE:
        return PairCheck(
            check.exact, check.stored, f"check failed: relative error {check.exact:.2g} in float64"
        )
    if not bool(((stored - folded).abs() <= bound + TOLERANCE * size).all()):
        return PairCheck(
            check.exact, check.stored, "check failed: rounding is worse than it may be"
        )
    return check


def _double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


def _on(folded: Folded, layer: nn.Module) -> Folded:
    device = next(layer.parameters()).device
    return Folded(folded.weight.to(device), folded.bias.to(device))


def _with(layer: nn.Module, folded: Folded) -> nn.Module:
    other = copy.deepcopy(layer)
    other.weight = nn.Parameter(folded.weight.double(), requires_grad=False)
    other.bias = nn.Parameter(folded.bias.double(), requires_grad=False)
    return other


def _input_shape(layer: Any) -> tuple[int, ...]:
    """A small batch on which every element of the kernel meets data."""
    if isinstance(layer, nn.Linear):
        return (3, layer.in_features)
    sizes = [
        dilation * (kernel - 1) + stride + 2
        for dilation, kernel, stride in zip(
            layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    ]
    return (2, layer.in_channels, *sizes)


def _relative(expected: Tensor, got: Tensor, size: Tensor | None = None) -> float:
    """Largest error relative to the largest value; infinite when NaN or infinity differ."""
    if expected.shape != got.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    finite = torch.isfinite(expected)
    if not torch.equal(expected.nan_to_num()[~finite], got.nan_to_num()[~finite]):
        return float("inf")
    error = (expected - got)[finite].abs()
    if error.numel() == 0 or not bool(error.any()):
        return 0.0
    if size is None:
        size = expected[finite].abs().amax()
    ratio = float(error.amax() / size) if bool(size > 0) else float("inf")
    return float("inf") if ratio != ratio else ratio


class ModelCheck:
    """A float64 copy of the model, and what it gives on the example inputs.

    Attributes:
        problem: why there is none; empty otherwise.
        errors: of the last comparison, at the output of each batch norm and of what took its place.
    """

    def __init__(self, job: Job, calls: Sequence[Call]) -> None:
        self.problem = ""
        self.calls = len(calls)
        self.errors: dict[str, float] = {}
        try:
            self.double = copy.deepcopy(job.model).double()
            self.inputs = [call.double() for call in calls]
            with _samples(self.double, job.found) as self.samples:
                self.expected = [_outputs(self.double, call) for call in self.inputs]
        except Exception as error:
            text = str(error).strip().splitlines()[0] if str(error) else ""
            self.problem = f"no float64 run is possible ({type(error).__name__}: {text})"
            return
        if not any(self.expected):
            self.problem = "the model returns no real tensor"

    def __call__(self, job: Job, outcome: Outcome) -> tuple[float, str]:
        """Largest relative error of any output with these plans, and what is wrong, if anything."""
        try:
            applied = apply(self.double, outcome.sites, job.names, job.tails, exact=True)
        except Exception as error:
            return float("inf"), f"the edit raised {type(error).__name__}: {error}"
        try:
            with _samples(self.double, outcome.plans) as samples:
                got = [_outputs(self.double, call) for call in self.inputs]
            errors = [
                _relative(a, b)
                for before, after in zip(self.expected, got, strict=True)
                for a, b in zip(before, after, strict=True)
            ]
            self.errors = {
                name: max(map(_relative, self.samples[name], parts))
                for name, parts in samples.items()
                if len(self.samples.get(name, ())) == len(parts)
            }
        except Exception as error:
            return float("inf"), f"the folded model raised {type(error).__name__}: {error}"
        finally:
            applied.undo()
        worst = max(errors, default=0.0)
        problem = "" if worst <= TOLERANCE else f"relative error {worst:.2g} in the model's output"
        return worst, problem


def search(job: Job, report: Report, verify: bool) -> None:
    """Plan, check, and drop what fails, until all that is left is right.

    Each pair of a layer and the batch norm behind it is checked on random data, then the whole
    model on the example inputs. When that fails, the first fold that makes it fail is found by
    bisection, dropped and named.
    """
    job.outcome = job.plan()
    if job.outcome.made and (reason := job.changed()):
        job.dropped |= dict.fromkeys(job.outcome.made, f"{reason}; give example_inputs")
        job.outcome = job.plan()
    if not verify:
        return
    while failed := _pairs(job):
        job.dropped |= failed
        job.outcome = job.plan()
    if not job.calls or not job.outcome.made:
        return
    check = ModelCheck(job, job.calls)
    if check.problem:
        report.notes.append(f"whole-model check not run: {check.problem}")
        return
    worst, problem = check(job, job.outcome)
    for _ in range(MOST):
        if not problem:
            break
        name, why = _culprit(job, check)
        job.dropped[name] = f"rolled back: {why}"
        job.outcome = job.plan()
        worst, problem = check(job, job.outcome)
    if problem:
        for name in job.outcome.made:
            job.dropped[name] = f"rolled back: with the other folds, {problem}"
        job.outcome, worst = job.plan(), 0.0
    report.error = worst
    # Where a later fold goes through an identity its output is another, and means nothing.
    fine = {name: error for name, error in check.errors.items() if error <= TOLERANCE}
    job.errors = fine | job.errors
    count = f"{check.calls} example input{'' if check.calls == 1 else 's'}"
    report.notes.append(f"whole model in float64 on {count}: largest relative error {worst:.2g}")
    stored, dtypes = _as_stored(job.outcome)
    if dtypes:
        rounded, _ = check(job, stored)
        report.notes.append(f"of it with the new parameters rounded to {dtypes}: {rounded:.2g}")


def _as_stored(outcome: Outcome) -> tuple[Outcome, str]:
    """The same folds with the float64 parameters rounded as they are stored, and the dtypes of
    those with 16 bits. A mean that is large beside its deviation makes such a bias large."""
    sites, dtypes = dict(outcome.sites), set()
    for module, site in outcome.sites.items():
        if site.stored is not None:
            weight, bias = site.stored.weight, site.stored.bias
            sites[module] = replace(site, exact=Folded(weight.double(), bias.double()))
            dtypes.add(str(weight.dtype).removeprefix("torch."))
    return replace(outcome, sites=sites), " and ".join(sorted(dtypes & {"bfloat16", "float16"}))


def _pairs(job: Job) -> dict[str, str]:
    failed = {}
    for plan, layer, bn in job.pairs():
        site = job.outcome.sites[layer]
        if site.exact is None or site.stored is None:
            continue
        check = check_pair(layer, bn, site)
        job.errors[plan.name] = check.stored
        if check.problem:
            failed[plan.name] = check.problem
    return failed


def _culprit(job: Job, check: ModelCheck) -> tuple[str, str]:
    """The first fold with which the model is wrong, while it is right with those before it."""
    names = job.outcome.made
    right, wrong = 0, len(names)
    why = check(job, job.plan(names))[1] or "it is wrong together with others"
    while wrong - right > 1:
        middle = (right + wrong) // 2
        problem = check(job, job.plan(names[:middle]))[1]
        if problem:
            wrong, why = middle, problem
        else:
            right = middle
    return names[wrong - 1], why


@contextlib.contextmanager
def _samples(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Some elements of each output of the modules with these names, while a model runs."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, out: Any) -> None:
        if isinstance(out, Tensor) and out.numel():
            step = max(1, out.numel() // SAMPLE)
            found.setdefault(name, []).append(out.detach().flatten()[::step].clone())

    handles = [
        model.get_submodule("" if name == "(root)" else name).register_forward_hook(
            lambda m, args, out, name=name: keep(name, out)
        )
        for name in names
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _outputs(model: nn.Module, call: Call) -> list[Tensor]:
    guard = StateGuard(model)
    try:
        with quiet_run(), _default_double(), _Double(), guard:
            result = call.run(model)
        return [t.detach().clone() for t in tensors_in(result) if t.is_floating_point()]
    finally:
        guard.restore()


@contextlib.contextmanager
def _default_double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Double(TorchDispatchMode):
    """Turns the casts to a lower precision that are written into a forward into float64."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _LOW:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
