"""The algorithms. These tuples are the only place that enumerates them."""

from __future__ import annotations

from typing import Any

from tritonnorm.norms.problem import GroupProblem
from tritonnorm.problem import Problem

from .affine import Affine
from .base import Algorithm
from .fold_configs import Fold
from .group_resident import GroupResident
from .group_split import GroupSplit
from .masked_launches import Masked
from .persistent import Persistent
from .resident import Resident
from .split import Split

#: In the order of preference where two are predicted to take the same time.
ALGORITHMS: tuple[Algorithm, ...] = (Resident(), Persistent(), Split(), Affine())
#: Those of a batch over several ranks, which are cut where a collective comes (`synced`), and of
#: padded sequences.
OTHER_FORMS: dict[str, tuple[Any, ...]] = {"synced": (Split(),), "masked": (Masked(),)}
#: Those for group, layer, instance and RMS norm. They have the methods of `Algorithm` for a
#: `GroupProblem`.
GROUP_ALGORITHMS: tuple[Any, ...] = (GroupResident(), GroupSplit())
#: What folds the batch norms of a model.
FOLDS: tuple[Fold, ...] = (Fold(),)
BY_NAME: dict[str, Any] = {a.name: a for a in (*ALGORITHMS, *GROUP_ALGORITHMS, Masked())}


def algorithms_for(problem: Any) -> tuple[Any, ...]:
    """The algorithms for a problem of its kind, whether or not they support this one."""
    if isinstance(problem, GroupProblem):
        return GROUP_ALGORITHMS
    if isinstance(problem, Problem):
        return OTHER_FORMS.get(problem.form, ALGORITHMS)
    return FOLDS
