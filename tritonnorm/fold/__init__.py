"""fold(model): batch norms in eval mode become part of the convolution or linear layer before them.

graph of the data flow -> pairs.py -> edit.py (algebra.py) -> verify.py -> the user's own model
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from tritonnorm.fold import inspect
from tritonnorm.fold.algebra import FoldRefused
from tritonnorm.fold.edit import Edit, apply, plan_edit
from tritonnorm.fold.inputs import Call, calls_from
from tritonnorm.fold.pairs import Finder
from tritonnorm.fold.verify import check_model, check_pair
from tritonnorm.report import LEFT, Report, Row

__all__ = ["fold"]

Filter = Callable[[nn.Module, str], bool]


def fold(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    inplace: bool = False,
    rules: str = "exact",
    filter_fn: Filter | None = None,
    verify: bool = True,
    strict: bool = False,
    dry_run: bool = False,
) -> tuple[nn.Module, Report]:
    """Fold every batch norm that provably follows one convolution or linear layer into it.

    A folded batch norm becomes `nn.Identity` (or the activation it carried); the layer gets new
    weight and bias parameters of the same dtype, device, memory format and `requires_grad`. Only
    batch norms in eval mode fold; all others are left, each with its reason in the report.

    Args:
        model: the model; a copy of it is folded unless `inplace`.
        example_inputs: what to run the model on, to see which layer each batch norm follows: a
            tensor, a tuple of arguments, a dict of keyword arguments, or a list of these, each
            its own run. A pair folds only when it holds in every run. Without inputs only what
            `nn.Sequential` or a torch.fx trace proves is folded.
        inplace: edit the model itself. Optimizers then hold parameters that are no longer in it.
        rules: "exact", the only set of rules there is in this version.
        filter_fn: called as `filter_fn(batch_norm, name)`; the batch norm is left when it
            returns False.
        verify: check each pair in float64 on random data and, given example inputs, the whole
            model; a fold that fails is not made, and its row says so.
        strict: raise when any batch norm would be left; nothing is changed then.
        dry_run: only report; the model returned is the one given.

    Returns:
        The folded model and the report, one row per batch norm.

    Raises:
        ValueError: an argument is not as described, the model raised on the example inputs, the
            model cannot be copied (and `inplace` is False), or `strict` and a batch norm is left.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if rules != "exact":
        raise ValueError(f"rules: expected 'exact', the only rules of this version; got {rules!r}")
    calls = None if example_inputs is None else calls_from(example_inputs)
    report = Report("fold", dry_run=dry_run)
    if reason := inspect.frozen_reason(model):
        report.rows = [
            _left(name or "(root)", type(bn).__name__, reason)
            for name, bn in inspect.batch_norms(model)
        ]
        report.notes.append(reason)
        _finish(report, strict)
        return model, report
    work = model if inplace else _copy(model)
    edits = _plan(work, calls, filter_fn, verify, report)
    if verify and calls and edits:
        outcome = check_model(work, edits, calls)
        report.error = outcome.error
        report.notes.append(outcome.note)
        for i, row in enumerate(report.rows):
            if why := outcome.bad.get(row.name):
                report.rows[i] = _left(row.name, row.kind, f"rolled back: {why}")
        edits = [edit for edit in edits if edit.pair.name not in outcome.bad]
    _finish(report, strict)
    if dry_run:
        return model, report
    apply(work, edits)
    return work, report


def _plan(
    model: nn.Module,
    calls: list[Call] | None,
    filter_fn: Filter | None,
    verify: bool,
    report: Report,
) -> list[Edit]:
    """Put one row per batch norm into the report and return the edits to make; changes nothing."""
    found = list(inspect.batch_norms(model))
    finder = Finder(model, calls) if found else None
    edits: list[Edit] = []
    untrained: list[str] = []
    for path, bn in found:
        name, kind = path or "(root)", type(bn).__name__
        if filter_fn is not None and not filter_fn(bn, path):
            report.rows.append(_left(name, kind, "left out by filter_fn"))
            continue
        answer = finder.find(bn) if finder else ""
        if isinstance(answer, str):
            report.rows.append(_left(name, kind, answer))
            continue
        try:
            edit = plan_edit(answer)
        except FoldRefused as refusal:
            report.rows.append(_left(name, kind, str(refusal)))
            continue
        check = check_pair(edit) if verify else None
        if check and check.problem:
            report.rows.append(_left(name, kind, check.problem))
            continue
        edits.append(edit)
        reason = "nothing else uses the output of its partner"
        if inspect.never_trained(bn):
            untrained.append(name)
            reason += "; its statistics were never updated"
        report.rows.append(
            Row(
                name,
                kind,
                "folded",
                f"{reason} ({answer.proof})",
                answer.rule,
                answer.partner,
                edit.scale,
                check.stored if check else None,
            )
        )
    if untrained:
        report.notes.append(
            f"{len(untrained)} folded batch norm{'s have' if len(untrained) > 1 else ' has'} the "
            "running statistics of a new module (mean 0, variance 1): was a checkpoint loaded?"
        )
    return edits


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            "model: expected one that copy.deepcopy can copy, or inplace=True; copying raised "
            f"{type(error).__name__}: {error}"
        ) from error


def _left(name: str, kind: str, reason: str) -> Row:
    return Row(name, kind, LEFT, reason)


def _finish(report: Report, strict: bool) -> None:
    """Apply `strict`.

    Raises:
        ValueError: `strict`, and a batch norm is left; the message holds the report.
    """
    if strict and report.skipped:
        raise ValueError(f"strict: expected every batch norm to fold, got\n{report}")
