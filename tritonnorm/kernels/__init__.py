"""The algorithms. These tuples are the only place that enumerates them."""

from __future__ import annotations

from typing import Any

from tritonnorm.group_problem import GroupProblem
from tritonnorm.problem import Problem

from .affine import Affine
from .base import Algorithm
from .group_resident import GroupResident
from .group_split import GroupSplit
from .resident import Resident
from .split import Split

#: In the order of preference where two are predicted to take the same time.
ALGORITHMS: tuple[Algorithm, ...] = (Resident(), Split(), Affine())
#: Those for group, layer, instance and RMS norm. They have the methods of `Algorithm` for a
#: `GroupProblem`.
GROUP_ALGORITHMS: tuple[Any, ...] = (GroupResident(), GroupSplit())
BY_NAME: dict[str, Any] = {a.name: a for a in (*ALGORITHMS, *GROUP_ALGORITHMS)}


def algorithms_for(problem: Problem | GroupProblem) -> tuple[Any, ...]:
    """The algorithms for a kind of problem."""
    return GROUP_ALGORITHMS if isinstance(problem, GroupProblem) else ALGORITHMS
