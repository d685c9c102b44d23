"""The benchmark harness: ``python -m bench``, and `load` for its results files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.record.file import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # pandas is imported when it is needed
        from bench.record.file import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
