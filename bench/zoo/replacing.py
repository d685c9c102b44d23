"""What replace does to one model: batch norms fused, and a training step against the original's."""

from __future__ import annotations

import copy
import gc
import random
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import tritonnorm
from bench.zoo.consumers import fusable
from bench.zoo.families import Entry
from bench.zoo.measure import MAX_PARAMETERS, _call, _doubled, difference, settle, tensors_in

__all__ = ["LIMIT", "Replaced", "measure"]

LIMIT = 1e-10  # relative, float64


@dataclass
class Replaced:
    """What replace did to one model.

    Attributes:
        library, name: of the model.
        problem: why there are no figures; empty otherwise.
        raised: what replace, or the replaced model, raised; empty when neither did.
        norms: batch norms of torch's classes.
        fusable: how many of them could be fused, by the operations of a run; of two that are
            added to each other one.
        slopes: how many of these a prelu follows.
        fused: how many of the fusable ones are.
        more: fused ones beyond those, which the count of the fusable does not know.
        reasons: why the others are not.
        errors: largest differences, relative to the largest value: "eval", "train", "gradients",
            "statistics".
        with_inputs: whether it was given example inputs, because it did not fuse all without.
        seconds: of replace without them.
    """

    library: str
    name: str
    problem: str = ""
    raised: str = ""
    norms: int = 0
    fusable: int = 0
    slopes: int = 0
    fused: int = 0
    more: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    with_inputs: bool = False
    seconds: float = 0.0

    @property
    def wrong(self) -> bool:
        """Whether the replaced model computes something else."""
        return any(not error <= LIMIT for error in self.errors.values())

    def as_json(self) -> dict[str, Any]:
        """All attributes, for a file."""
        return asdict(self)


def measure(entry: Entry) -> Replaced:
    """Build one model, replace in float64, and compare outputs and one training step."""
    before = torch.get_default_dtype()
    try:
        return _measure(entry)
    finally:
        torch.set_default_dtype(before)
        gc.collect()


def _measure(entry: Entry) -> Replaced:
    result = Replaced(entry.library, entry.name)
    torch.manual_seed(0)
    try:
        model, inputs = entry.build()
        size = sum(p.numel() for p in model.parameters())
        if size > MAX_PARAMETERS:
            result.problem = f"{size / 1e6:.0f} M parameters"
            return result
        model = model.double().eval()
        torch.set_default_dtype(torch.float64)
        inputs = _doubled(inputs)
        settle(model, inputs)
        found = fusable(model, lambda: _call(model, inputs))
        plain = copy.deepcopy(model)
        expected = {"eval": _eval(plain, inputs)} | _step(plain, inputs)
        result.norms = sum(isinstance(m, _BatchNorm) for m in model.modules())
    except Exception as error:
        result.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        return result
    start = time.perf_counter()
    try:
        model, report = tritonnorm.replace(model)
        result.seconds = time.perf_counter() - start
        if report.counts.get("fused", 0) < len(found.groups):
            tritonnorm.restore(model)
            model, report = tritonnorm.replace(model, example_inputs=inputs)
            result.with_inputs = True
        got = {"eval": _eval(model, inputs)} | _step(model, inputs)
    except Exception as error:
        result.raised = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        result.raised += traceback.format_exc()[-600:]
        return result
    _lift(expected.get("gradients", []), got.get("gradients", []))
    result.errors = {what: difference(expected[what], got[what]) for what in expected}
    rows = {row.name: row for row in report.rows}
    names = {m: name or "(root)" for name, m in model.named_modules()}
    fused = {m for m, name in names.items() if name in rows and rows[name].decision == "fused"}
    result.fusable, result.slopes = len(found.groups), len(found.slopes)
    result.fused = sum(bool(group & fused) for group in found.groups)
    result.more = len(fused - {m for group in found.groups for m in group})
    missed = [m for group in found.groups if not group & fused for m in group]
    result.reasons = dict(Counter(rows[names[m]].reason for m in missed if names[m] in rows))
    return result


def _lift(expected: list[Tensor], got: list[Tensor]) -> None:
    """Put one value into every gradient, the same in both, to which the others are relative.

    Some gradients are zero but for rounding, such as that of a bias before a batch norm. They are
    measured against a thousandth of the largest gradient.
    """
    largest = max((float(g.abs().max()) for g in expected if g.numel()), default=0.0)
    for gradients in (expected, got):
        for place, gradient in enumerate(gradients):
            floor = gradient.new_full((1,), 1e-3 * largest)
            gradients[place] = torch.cat((gradient.flatten(), floor))


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def _eval(model: nn.Module, inputs: Any) -> list[Tensor]:
    _seed()
    with torch.no_grad():
        return [t.clone() for t in tensors_in(_call(model.eval(), inputs))]


def _step(model: nn.Module, inputs: Any) -> dict[str, list[Tensor]]:
    """Outputs, gradients and statistics of one training step; empty where it cannot be made."""
    state = copy.deepcopy(model.state_dict())
    _seed()
    model.train()
    try:
        outputs = [t for t in tensors_in(_call(model, inputs)) if t.is_floating_point()]
        score = sum((t * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum() for t in outputs)
        score.backward()  # type: ignore[union-attr]
    except Exception as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return {}
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    found = {
        "train": [t.detach() for t in outputs],
        "gradients": gradients,
        "statistics": [b.clone() for b in model.buffers()],
    }
    model.zero_grad(set_to_none=True)
    model.load_state_dict(state)
    return found
