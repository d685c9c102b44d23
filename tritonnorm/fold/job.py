"""One fold of one model: what may fold, the plans for it, and the rows of the report."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import nn

from tritonnorm.flow.inputs import Call
from tritonnorm.fold import inspect
from tritonnorm.fold.algebra import FoldRefused, ScaleShift
from tritonnorm.fold.change import Stop
from tritonnorm.fold.edit import apply, tail_of
from tritonnorm.fold.frozen import recognise
from tritonnorm.fold.graph import Run
from tritonnorm.fold.inspect import Names
from tritonnorm.fold.pairs import Finder, Pair
from tritonnorm.fold.plan import Outcome, Plan, Planner
from tritonnorm.fold.record import record
from tritonnorm.fold.trace import changed
from tritonnorm.report import LEFT, Report, Row


class Job:
    """The analysis of a model, done once, and the plans that follow from it.

    Attributes:
        model, calls: as given to `fold`.
        found: every batch norm by its name, in order.
        reasons: why some of them never fold.
        norms: the others.
        outcome: the plans made last.
        errors: of folded pairs, relative, in float64, by name.
        dropped: folds that were taken back, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: list[Call] | None,
        filter_fn: Callable[[nn.Module, str], bool] | None,
        bake: bool = False,
    ) -> None:
        self.model, self.calls = model, calls
        self.baked = inspect.bake(model) if bake else 0
        self.names = Names.of(model)
        self.found = {path or "(root)": bn for path, bn in inspect.batch_norms(model)}
        self.reasons: dict[str, str] = {}
        self.norms: dict[str, nn.Module] = {}
        self.tails: dict[nn.Module, nn.Module] = {}
        self.errors: dict[str, float] = {}
        self.dropped: dict[str, str] = {}
        self.outcome = Outcome()
        self.runs: list[Run] = []
        self._affines: dict[nn.Module, ScaleShift] = {}
        self._finder: Finder | None = None
        self._classify(filter_fn)
        if not self.found:
            return
        if calls:
            self.runs = record(model, calls)
            self._classes()
        else:
            self._finder = Finder(model)
            self._classes()

    def _classify(self, filter_fn: Callable[[nn.Module, str], bool] | None) -> None:
        compiled = tuple(f"{name}." for name in inspect.compiled_parts(self.model))
        held = inspect.held(self.model)
        for name, bn in self.found.items():
            path = "" if name == "(root)" else name
            if filter_fn is not None and not filter_fn(bn, path):
                self.reasons[name] = "left out by filter_fn"
            elif reason := inspect.batch_norm_reason(bn):
                self.reasons[name] = reason
            elif holder := held.get(id(bn)):
                self.reasons[name] = f"it is also held by {holder}, which would keep it"
            elif bn is self.model:
                self.reasons[name] = "the model itself is the batch norm: nothing comes before it"
            elif any(
                path_.startswith(compiled)
                for path_, module in self.model.named_modules(remove_duplicate=False)
                if module is bn and compiled
            ):
                self.reasons[name] = "it is inside a compiled module: fold before torch.compile"
            else:
                self.norms[name] = bn

    def _classes(self) -> None:
        """Batch norms of classes that are not known count when the runs show what they are."""
        for name, bn in list(self.norms.items()):
            if inspect.is_plain_norm(bn):
                spans = (span for run in self.runs for span in run.spans.get(id(bn), ()))
                residual = any(len(span.inputs) > 1 for span in spans)
                if (tail := tail_of(bn, residual)) is not None:
                    self.tails[bn] = tail
                continue
            known = recognise(bn, self.runs) if self.runs else inspect.unknown_class(bn)
            if isinstance(known, str):
                self.reasons[name] = known
                del self.norms[name]
                continue
            self._affines[bn] = known.affine
            if known.tail is not None:
                self.tails[bn] = known.tail

    def plan(self, names: Collection[str] | None = None) -> Outcome:
        """Plan the folds of these batch norms, of all that may fold by default."""
        norms = {
            name: bn
            for name, bn in self.norms.items()
            if name not in self.dropped and (names is None or name in names)
        }
        planner = Planner(self.model, self.runs, norms, self._affines)
        if self._finder is None:
            return planner.run()
        for name, bn in norms.items():
            answer = self._finder.find(bn)
            if isinstance(answer, Pair):
                try:
                    planner.direct(name, answer.producer, answer.proof)
                except (Stop, FoldRefused) as refusal:
                    answer = str(refusal)
            if isinstance(answer, str):
                planner.out.reasons[name] = answer
        return planner.out

    def changed(self) -> str:
        """Without example inputs: why the folded model may do something else, or nothing."""
        if self._finder is None or isinstance(self._finder.traces, str):
            return ""
        applied = apply(self.model, self.outcome.sites, self.names, self.tails)
        try:
            return changed(self.model, self._finder.traces)
        finally:
            applied.undo()

    def pairs(self) -> list[tuple[Plan, nn.Module, nn.Module]]:
        """The plans that concern one layer and one batch norm alone, with both."""
        partners = [p for plan in self.outcome.plans.values() for p in plan.partners]
        partners += [*self.outcome.merged, *self.outcome.merged.values()]
        found = []
        for plan in self.outcome.plans.values():
            plain = self.norms[plan.name] not in self._affines
            if plan.direct and plain and partners.count(plan.partners[0]) == 1:
                layer = self.names.modules[plan.partners[0]]
                found.append((plan, layer, self.norms[plan.name]))
        return found

    def describe(self, report: Report) -> None:
        """Put one row per batch norm into the report, and the notes."""
        untrained = []
        for name, bn in self.found.items():
            kind, plan = type(bn).__name__, self.outcome.plans.get(name)
            if plan is None:
                reason = (
                    self.dropped.get(name)
                    or self.reasons.get(name)
                    or self.outcome.reasons.get(name)
                    or "no rule applies"
                )
                fused = self.outcome.fused.get(name)
                if fused is None:
                    report.rows.append(Row(name, kind, LEFT, reason))
                else:
                    reason = f"{reason}; so it runs in one launch with its activation"
                    report.rows.append(Row(name, kind, "fused", reason, "bn + activation", fused))
                continue
            reason = plan.reason
            report.eps[name] = float(getattr(bn, "eps", 1e-5))
            if inspect.never_trained(bn):
                untrained.append(name)
                reason += "; its statistics were never updated"
            decision = "reduced" if plan.reduced else "folded"
            partners = plan.partners[:3] + (("...",) if len(plan.partners) > 3 else ())
            more = (", ".join(partners), plan.scale, self.errors.get(name))
            proof = plan.proof or "recorded run"
            report.rows.append(Row(name, kind, decision, f"{reason} ({proof})", plan.rule, *more))
        if untrained:
            report.notes.append(
                f"{len(untrained)} folded batch norm{'s have' if len(untrained) > 1 else ' has'} "
                "the running statistics of a new module (mean 0, variance 1): was a checkpoint "
                "loaded?"
            )
        if self.baked:
            report.notes.append(f"{self.baked} parametrised layers have plain weights now")
        if size := sum(plan.bytes for plan in self.outcome.plans.values()):
            report.notes.append(f"weights that were shared have copies now: {size} bytes more")
        for branch, into in self.outcome.merged.items():
            report.notes.append(f"{branch} was merged into {into}, which runs beside it")
        if functions := sum(len(run.functional()) for run in self.runs[:1]):
            report.notes.append(
                f"{functions} call{'s' if functions > 1 else ''} of F.batch_norm in the forward "
                "of other modules stay: there is no module to take away"
            )
