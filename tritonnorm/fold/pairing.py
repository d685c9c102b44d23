"""Which layer each batch norm follows, in training as well as in eval mode: for `freeze`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from tritonnorm.fold.inputs import calls_from
from tritonnorm.fold.inspect import (
    batch_norms,
    frozen_reason,
    is_batch_norm,
    never_trained,
    rule_name,
)
from tritonnorm.fold.pairs import Finder

__all__ = ["Both", "batch_norms", "frozen_reason", "never_trained", "rule_name"]


class Both:
    """Pairs that hold in training mode, with the batch norms in eval mode, and in eval mode."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        calls = None if example_inputs is None else calls_from(example_inputs)
        self._model = model
        with _modes(model, True):
            self._training = Finder(model, calls)
        with _modes(model, False):
            self._eval = Finder(model, calls)

    def find(self, bn: nn.Module) -> tuple[tuple[nn.Module, nn.Module] | None, str]:
        """The layer and the batch norm, and what proves it; or None, and why there is none."""
        found = []
        for finder, training in ((self._training, True), (self._eval, False)):
            with _modes(self._model, training):
                answer = finder.find(bn)
            if isinstance(answer, str):
                return None, f"in {'training' if training else 'eval'} mode: {answer}"
            found.append(answer)
        first, second = found
        if first.producer is not second.producer:
            return None, "the batch norm follows another layer in eval mode"
        return (first.producer, bn), f"nothing else uses the output of its partner ({first.proof})"


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
