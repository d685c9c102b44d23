"""`explain`: which algorithm computes a norm, who decided, and what the others would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .device import Device
from .kernels import algorithms_for
from .kernels.base import Config
from .norms.problem import GroupProblem
from .observe import observe
from .plan import Forced, Plan, choose, fewest_bytes, forced, in_company, tuned
from .problem import Problem

__all__ = ["Alternative", "Explanation", "Explanations", "explain"]


@dataclass(frozen=True)
class Alternative:
    """One algorithm's answer to a problem: why not, or how and at what cost.

    Attributes:
        algorithm: its name.
        reason: why it cannot compute the problem, or None.
        config: the plan's, or what the formula would take.
        bytes: what it moves, of activations.
        microseconds: predicted.
    """

    algorithm: str
    reason: str | None
    config: Config | None = None
    bytes: int | None = None
    microseconds: float | None = None

    @property
    def bandwidth(self) -> float | None:
        """Predicted bytes per second."""
        return self.bytes / self.microseconds * 1e6 if self.bytes and self.microseconds else None


@dataclass(frozen=True)
class Explanation:
    """A plan and its alternatives; ``str()`` of it is a table.

    Attributes:
        problem, device: what for.
        plan: what computes it, and who decided (`Plan.source`).
        minimum: fewest bytes of the problem (`minimum_bytes`, `minimum_group_bytes`).
        alternatives: one row per algorithm, with the bytes it moves and the time predicted for it.
    """

    problem: Problem | GroupProblem
    device: Device
    plan: Plan
    minimum: int
    alternatives: tuple[Alternative, ...]

    def __str__(self) -> str:
        config = self.plan.config
        lines = [
            f"{self.problem.direction} of {self.problem}, "
            f"{str(self.problem.dtype).removeprefix('torch.')}, on {self.device.name}",
            f"-> {self.plan.algorithm} ({self.plan.source}), {config}",
            f"   fewest bytes {self.minimum:,}",
        ]
        for a in self.alternatives:
            if a.bytes is None:
                lines.append(f"   {a.algorithm:<10} no: {a.reason}")
            else:
                ratio = a.bytes / self.minimum
                lines.append(
                    f"   {a.algorithm:<10} {a.bytes:,} bytes, {ratio:.2f}x the fewest, "
                    f"{a.microseconds:.1f} us and {(a.bandwidth or 0) * 1e-9:,.0f} GB/s predicted"
                )
        return "\n".join(lines)


class Explanations(tuple[Explanation, ...]):
    """Those of all norms of a model; ``str()`` of it is one table after the other."""

    def __str__(self) -> str:
        return "\n\n".join(map(str, self))


def explain(what: Any, x: Any = None, forced_by: Forced | None = None) -> Any:
    """Say which algorithm computes a norm, who decided, and what the others would cost.

    Nothing is computed: a module is run with tensors that have shapes and no values.

    Args:
        what: a `Problem` or `GroupProblem`, or a module with norms of this library.
        x: for a problem, the device that it is for (a `Device` or `torch.device`; the current GPU
            if None). For a module, its input, or a tuple of them.
        forced_by: a decision to explain in place of what `force_plan` forces at the moment.

    Returns:
        An `Explanation` of a problem. Of a module `Explanations`, one for each distinct call,
        forward and backward, in its present mode.

    Raises:
        TypeError: ``what`` is neither.
        ValueError: the module calls no kernel for such an input.
    """
    if isinstance(what, nn.Module):
        inputs = tuple(x) if isinstance(x, Sequence) else (x,)
        calls = observe(what, *inputs, modes=("present",))
        if not calls:
            raise ValueError("what: expected a module whose norms run as kernels, got none")
        problems = dict.fromkeys(each for call in calls for each in call.problems)
        return Explanations(_explain(p, device, forced_by) for p, device in problems)
    if not isinstance(what, Problem | GroupProblem):
        raise TypeError(f"what: expected a Problem or a module, got {type(what).__name__}")
    if x is None:
        x = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _explain(what, x if isinstance(x, Device) else Device.of(torch.device(x)), forced_by)


def _explain(problem: Any, device: Device, forced_by: Forced | None) -> Explanation:
    tables, device = tuned(device), in_company(device)
    chosen = choose(problem, device, tables, forced_by or forced())
    rows = []
    for algorithm in algorithms_for(problem):
        reason = algorithm.supports(problem, device)
        if reason is not None:
            rows.append(Alternative(algorithm.name, reason))
            continue
        mine = algorithm.name == chosen.algorithm
        config = chosen.config if mine else algorithm.heuristic(problem, device)
        moved = algorithm.model_bytes(problem, config)
        seconds = algorithm.predict(problem, config, device)
        rows.append(Alternative(algorithm.name, None, config, moved, seconds * 1e6))
    return Explanation(problem, device, chosen, fewest_bytes(problem), tuple(rows))
