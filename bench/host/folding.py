"""Latency on the CPU of real models before and after `fold`, and after PyTorch's own folding."""

from __future__ import annotations

from collections.abc import Sequence

from bench.e2e.inference import compare
from bench.processes import Progress, silent
from bench.record.rows import ModelRow, SkippedRow
from tritonnorm.timing import Clock

__all__ = ["MODELS", "QUICK", "VARIANTS", "run"]

MODELS = ("resnet-50", "mobilenet-v2", "densenet-121")
QUICK = ("mobilenet-v2",)  # the one that is checked fastest: eight seconds in all
VARIANTS = ("eager", "folded", "torch.fx")


def run(
    progress: Progress = silent,
    models: Sequence[str] = MODELS,
    budget: float = 24.0,
    size: int = 224,
    clock: Clock | None = None,
) -> list[ModelRow | SkippedRow]:
    """Check, then time one image in float32, variants in turn.

    Run it in a process with one thread and without Triton's interpreter: two threads that wait for
    each other measure what else the machine does.

    Args:
        progress: told after each step.
        models: names of `bench.models.MODELS`.
        budget: seconds for the timing of all models together; building and checking them takes
            about twenty more.
        size: of the image ``[1, 3, size, size]``.
        clock: by default the host's.

    Raises:
        RuntimeError: a folded model is not equal to its original.
    """
    rows: list[ModelRow | SkippedRow] = []
    for i, model in enumerate(models):

        def within(done: float, of: float, what: str = "", i: int = i, model: str = model) -> None:
            progress(i + done / of, len(models), f"{model}: {what}" if what else "")

        share = budget / len(models)
        found = compare(within, model, VARIANTS, size=size, budget=share, rounds=51, clock=clock)
        rows += found.rows()
    return rows
