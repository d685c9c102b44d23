"""Which layer each batch norm follows, in training as well as in eval mode: for `freeze`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from tritonnorm.flow.inputs import calls_from
from tritonnorm.fold.inspect import (
    Names,
    batch_norms,
    frozen_reason,
    is_batch_norm,
    never_trained,
    rule_name,
)
from tritonnorm.fold.job import Job
from tritonnorm.fold.outcome import Outcome

__all__ = ["Both", "batch_norms", "frozen_reason", "never_trained", "rule_name"]


class Both:
    """Pairs that hold in training mode, with the batch norms in eval mode, and in eval mode."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        calls = None if example_inputs is None else calls_from(example_inputs)
        self._names = Names.of(model)
        self._found: list[tuple[str, Outcome]] = []
        for training in (True, False):
            with _modes(model, training):
                job = Job(model, calls, None)
                outcome = job.plan() if job.found else job.outcome
            outcome.reasons = {**outcome.reasons, **job.reasons}
            self._found.append(("training" if training else "eval", outcome))

    def find(self, bn: nn.Module) -> tuple[tuple[nn.Module, nn.Module] | None, str]:
        """The layer and the batch norm, and what proves it; or None, and why there is none."""
        partners, proof = [], ""
        for mode, outcome in self._found:
            name = self._names[bn]
            plan = outcome.plans.get(name)
            if plan is None or not plan.direct:
                why = outcome.reasons.get(name, "it does not follow one layer directly")
                return None, f"in {mode} mode: {why}"
            partners.append(plan.partners[0])
            proof = plan.proof or "recorded run"
        if partners[0] != partners[1]:
            return None, "the batch norm follows another layer in eval mode"
        layer = self._names.modules[partners[0]]
        return (layer, bn), f"nothing else uses the output of its partner ({proof})"


@contextlib.contextmanager
def _modes(model: nn.Module, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = training and not is_batch_norm(module)
        yield
    finally:
        for module, mode in before:
            module.training = mode
