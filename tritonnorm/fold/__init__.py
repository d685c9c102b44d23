"""fold(model): batch norms in eval mode become part of the layers around them.

recorded runs (record.py, graph.py) -> plans (plan.py: walk.py, rules.py) -> what each module
becomes (sites.py, algebra.py) -> checks (verify.py) -> the user's own model (edit.py)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tritonnorm.fold.checkpoint import fold_state_dict
from tritonnorm.report import LEFT, Report, Row

if TYPE_CHECKING:
    from tritonnorm.flow.inputs import Call

__all__ = ["fold", "fold_state_dict"]

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
    """Fold every batch norm into the layers around it, wherever that is provably exact.

    A folded batch norm becomes `nn.Identity` (or the activation it carried); the layers get new
    weight and bias parameters of the same dtype, device, memory format and `requires_grad`. Only
    batch norms in eval mode fold; all others are left, each with its reason in the report.

    Args:
        model: the model; a copy of it is folded unless `inplace`.
        example_inputs: what to run the model on, to see what each batch norm follows and what
            uses its output: a tensor, a tuple of arguments, a dict of keyword arguments, or a
            list of these, each its own run. A fold is made only when it holds in every run.
            Without inputs only what `nn.Sequential` or a torch.fx trace proves is folded.
        inplace: edit the model itself. Optimizers then hold parameters that are no longer in it.
        rules: "exact", or "all": also make parametrised weights plain, which is exact too but
            takes the parametrisation away.
        filter_fn: called as `filter_fn(batch_norm, name)`; the batch norm is left when it
            returns False.
        verify: check each pair in float64 on random data and, given example inputs, the whole
            model; a fold that fails is not made, and its row says so.
        strict: raise when any batch norm would be left, or only fused with its activation;
            nothing is changed then.
        dry_run: only report; the model returned is the one given.

    Returns:
        The folded model and the report, one row per batch norm. `report.undo()` takes the fold
        back. A model that cannot be folded at all, as it is compiled, scripted or wrapped, comes
        back itself, with the reason in every row.

    Raises:
        ValueError: an argument is not as described, the model raised on the example inputs, the
            model cannot be copied (and `inplace` is False), or `strict` and a batch norm is left.
    """
    from tritonnorm.flow.inputs import calls_from  # here: what follows takes 60 ms to import

    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if rules not in ("exact", "all"):
        raise ValueError(f"rules: expected 'exact' or 'all', got {rules!r}")
    if rules == "all" and inplace:
        raise ValueError("rules: expected 'exact' with inplace=True, got 'all', which has no undo")
    calls = None if example_inputs is None else calls_from(example_inputs)
    with torch.inference_mode(False):  # what is made under it could never be trained
        return _fold(model, calls, inplace, rules, filter_fn, verify, strict, dry_run)


def _fold(
    model: nn.Module,
    calls: list[Call] | None,
    inplace: bool,
    rules: str,
    filter_fn: Filter | None,
    verify: bool,
    strict: bool,
    dry_run: bool,
) -> tuple[nn.Module, Report]:
    from tritonnorm.fold import inspect
    from tritonnorm.fold.edit import apply
    from tritonnorm.fold.job import Job
    from tritonnorm.fold.verify import search

    report = Report("fold", dry_run=dry_run)
    if reason := inspect.frozen_reason(model):
        report.rows = [
            Row(name or "(root)", type(bn).__name__, LEFT, reason)
            for name, bn in inspect.batch_norms(model)
        ]
        report.notes.append(reason)
        _finish(report, strict)
        return model, report
    work = model if inplace else _copy(model)
    job = Job(work, calls, filter_fn, bake=rules == "all")
    search(job, report, verify)
    job.describe(report)
    _finish(report, strict)
    if dry_run:
        return model, report
    applied = apply(work, job.outcome.sites, inspect.Names.of(work), job.tails)
    report.on_undo(applied.undo)
    return work, report


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            "model: expected one that copy.deepcopy can copy, or inplace=True; copying raised "
            f"{type(error).__name__}: {error}"
        ) from error


def _finish(report: Report, strict: bool) -> None:
    """Apply `strict`.

    Raises:
        ValueError: `strict`, and a batch norm is left; the message holds the report.
    """
    if strict and report.remaining:
        raise ValueError(f"strict: expected every batch norm to fold, got\n{report}")
