"""Checks of a fold in float64: each pair on random data, and the whole model on real inputs.

A comparison in the model's own precision proves little: rounding alone can move the outputs of a
deep network by a tenth. In float64 a correct fold agrees to about 1e-12.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tritonnorm.fold.algebra import Folded
from tritonnorm.fold.edit import Edit, apply
from tritonnorm.fold.guard import StateGuard, quiet_run
from tritonnorm.fold.inputs import Call, tensors_in

TOLERANCE = 1e-9  # relative, float64; the largest seen over 130 correct models is about 1e-11
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


def check_pair(edit: Edit) -> PairCheck:
    """Run layer and batch norm in float64 on random data, unfolded and folded, and compare.

    The rounded parameters may differ by half a unit in the last place each, so their output is
    held against that bound, element by element.
    """
    pair = edit.pair
    with quiet_run():
        layer = _double(pair.producer)
        bn = copy.deepcopy(pair.bn).double()
        x = torch.randn(_input_shape(layer), dtype=torch.float64, device=edit.exact.weight.device)
        raw = layer(x)
        expected = nn.functional.batch_norm(
            raw,
            bn.running_mean,  # type: ignore[arg-type]
            bn.running_var,  # type: ignore[arg-type]
            bn.weight,  # type: ignore[arg-type]
            bn.bias,  # type: ignore[arg-type]
            eps=bn.eps,  # type: ignore[arg-type]
        )
        folded = _with(layer, edit.exact)(x)
        stored = _with(layer, edit.stored)(x)
        magnitude = Folded(edit.exact.weight.abs(), edit.exact.bias.abs())
        bound = _with(layer, magnitude)(x.abs()) * torch.finfo(edit.stored.weight.dtype).eps
        # Where conv bias and mean cancel, the unfolded pair is the less accurate one.
        size = torch.maximum(expected.abs().amax(), edit.scale * raw.abs().amax())
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


def _double(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer).double()


def _with(layer: nn.Module, folded: Folded) -> nn.Module:
    other = copy.deepcopy(layer)
    other.weight = nn.Parameter(folded.weight.double(), requires_grad=False)
    other.bias = nn.Parameter(folded.bias.double(), requires_grad=False)
    return other


def _input_shape(layer: Any) -> tuple[int, ...]:
    """A small batch on which every element of the kernel meets data."""
    if type(layer) is nn.Linear:
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


@dataclass
class ModelCheck:
    """The whole-model check.

    Attributes:
        error: largest relative error of any output on any input; None when it could not be run.
        bad: for the name of each batch norm that was rolled back, what its fold did.
        note: one sentence for the report.
    """

    error: float | None = None
    bad: dict[str, str] = field(default_factory=dict)
    note: str = ""


def check_model(model: nn.Module, edits: Sequence[Edit], calls: Sequence[Call]) -> ModelCheck:
    """Compare a float64 copy of the model, unfolded and folded, on the example inputs.

    When they differ, every pair is tried alone, so that the bad ones can be named and left out.
    """
    try:
        double = copy.deepcopy(model).double()
        inputs = [call.double() for call in calls]
        expected = [_outputs(double, call) for call in inputs]
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return ModelCheck(note=f"whole-model check not run: no float64 run is possible ({why})")
    if not any(expected):
        return ModelCheck(note="whole-model check not run: the model returns no real tensor")

    def attempt(some: Sequence[Edit]) -> tuple[float, str]:
        return _attempt(double, some, inputs, expected)

    worst, problem = attempt(edits)
    bad: dict[str, str] = {}
    if problem:
        bad = {e.pair.name: why for e in edits if (why := attempt([e])[1])}
        rest = [edit for edit in edits if edit.pair.name not in bad]
        worst, problem = attempt(rest)
        if problem:  # wrong only together: no single pair can be named, so none is folded
            bad |= {edit.pair.name: f"with the other folds, {problem}" for edit in rest}
            worst = 0.0
    count = f"{len(calls)} example input{'' if len(calls) == 1 else 's'}"
    note = f"whole model in float64 on {count}: largest relative error {worst:.2g}"
    return ModelCheck(worst, bad, note)


def _attempt(
    double: nn.Module,
    edits: Sequence[Edit],
    inputs: Sequence[Call],
    expected: Sequence[list[Tensor]],
) -> tuple[float, str]:
    """Largest relative error with these edits made, and what is wrong, if anything."""
    applied = apply(double, edits, exact=True)
    try:
        errors = [
            _relative(a, b)
            for call, before in zip(inputs, expected, strict=True)
            for a, b in zip(before, _outputs(double, call), strict=True)
        ]
    except Exception as error:
        return float("inf"), f"the folded model raised {type(error).__name__}: {error}"
    finally:
        applied.undo()
    worst = max(errors, default=0.0)
    problem = "" if worst <= TOLERANCE else f"relative error {worst:.2g} in the model's output"
    return worst, problem


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
