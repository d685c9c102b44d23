"""The results as a page of the documentation."""

from __future__ import annotations

from collections.abc import Sequence

from bench.zoo.measure import Result

__all__ = ["page"]


def page(results: Sequence[Result]) -> str:
    """The page in Markdown."""
    return str(len(results))
