"""Revisions of the kernels: a tuned result of another revision is not used.

Raise the number when a change to the kernels of an algorithm can change which of its configurations
is the fastest. `tests/test_revisions.py` notices when a kernel's source changes, and asks.
"""

from __future__ import annotations

__all__ = ["REVISIONS"]

REVISIONS: dict[str, int] = {
    "resident": 5,
    "persistent": 5,
    "split": 4,
    "affine": 3,
    "masked": 2,
    "group_resident": 2,
    "group_split": 2,
    "fold": 1,
}
