"""Rows of a results file from what was found of a whole model."""

from __future__ import annotations

from collections.abc import Sequence

from bench.record.rows import NOISY, ModelRow, SkippedRow
from tritonnorm.timing import Timing

__all__ = ["NO_PARTS", "in_words", "measured", "skipped"]

NO_PARTS = (None, None, None)


def measured(
    model: str,
    mode: str,
    variant: str,
    device: str,
    dtype: str,
    layout: str,
    shape: Sequence[int],
    timing: Timing,
    batch_norms: int,
    error: float,
    parts: Sequence[float | None] = NO_PARTS,
) -> ModelRow:
    """The row of a variant; arguments as its fields, times in seconds.

    ``parts`` are the medians of forward, backward and optimizer.
    """
    forward, backward, optimizer = (None if s is None else 1e3 * s for s in parts)
    return ModelRow(
        *(model, mode, variant, device, dtype, layout),
        shape="x".join(map(str, shape)),
        p50_ms=1e3 * timing.median,
        p20_ms=1e3 * timing.p20,
        p80_ms=1e3 * timing.p80,
        noise=timing.noise,
        samples=timing.rounds,
        forward_ms=forward,
        backward_ms=backward,
        optimizer_ms=optimizer,
        batch_norms=batch_norms,
        error=error,
        flags="N" if timing.noise > NOISY else "",
    )


def skipped(model: str, mode: str, variant: str, reason: str) -> SkippedRow:
    """The row of a variant that was not measured."""
    return SkippedRow(variant, f"{model} {mode}", reason)


def in_words(error: Exception) -> str:
    """The beginning of an exception in one line, as a reason. Keeps nothing of it alive."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
