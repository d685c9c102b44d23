"""The algorithms. These tuples are the only place that enumerates them."""

from __future__ import annotations

from typing import Any

from tritonnorm.problem import Problem

from .affine import Affine
from .base import Algorithm
from .fold_configs import Fold
from .persistent import Persistent
from .resident import Resident
from .split import Split

#: In the order of preference where two are predicted to take the same time.
ALGORITHMS: tuple[Algorithm, ...] = (Resident(), Persistent(), Split(), Affine())
BY_NAME: dict[str, Algorithm] = {a.name: a for a in ALGORITHMS}
#: What folds the batch norms of a model.
FOLDS: tuple[Fold, ...] = (Fold(),)


def algorithms_for(problem: Any) -> tuple[Any, ...]:
    """The algorithms for a problem of its kind, whether or not they support this one."""
    return ALGORITHMS if isinstance(problem, Problem) else FOLDS
