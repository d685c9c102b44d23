"""The tensors that a problem is tried on, by its kind."""

from __future__ import annotations

from typing import Any

import torch

from tritonnorm.device import Device
from tritonnorm.norms.problem import GroupProblem
from tritonnorm.problem import FoldProblem
from tritonnorm.tune.key import Shape
from tritonnorm.tune.scratch import NormTrial
from tritonnorm.tune.scratch_fold import FoldTrial
from tritonnorm.tune.scratch_group import GroupTrial

__all__ = ["trial_of"]


def trial_of(problem: Shape, where: torch.device, device: Device, seed: int = 0) -> Any:
    """A `search.Trial` of a problem."""
    if isinstance(problem, FoldProblem):
        return FoldTrial(problem, where, device, seed)
    kind = GroupTrial if isinstance(problem, GroupProblem) else NormTrial
    return kind(problem, where, device, seed)
