"""The algorithms. This tuple is the only place that enumerates them."""

from __future__ import annotations

from .affine import Affine
from .base import Algorithm
from .persistent import Persistent
from .resident import Resident
from .split import Split

#: In the order of preference where two are predicted to take the same time.
ALGORITHMS: tuple[Algorithm, ...] = (Resident(), Persistent(), Split(), Affine())
BY_NAME: dict[str, Algorithm] = {a.name: a for a in ALGORITHMS}
