"""A training step of a real model in several variants: equal first, then time, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.demo.tiles import interpreted
from bench.e2e.check import Check
from bench.e2e.clocks import EventClock, Laps
from bench.e2e.rows import NO_PARTS, in_words, measured, skipped
from bench.e2e.step import PARTS, Workload, step_of
from bench.models import batch_norms, build
from bench.processes import Progress, silent
from bench.record.rows import ModelRow, SkippedRow
from tritonnorm.timing import Clock, HostClock, Timing, interleaved

__all__ = ["VARIANTS", "Workload", "run"]

MODE = "training step"
VARIANTS = ("eager", "replace", "compile", "compile+replace", "eager+graph", "replace+graph")


@dataclass(frozen=True)
class _Form:
    """A variant, ready to be timed: the step, its parts, the batch norms in it, its error."""

    step: Callable[[], Tensor]
    laps: Laps | None
    batch_norms: int
    error: float


def run(
    progress: Progress = silent,
    work: Workload | None = None,
    variants: Sequence[str] | None = None,
    rounds: int = 15,
    budget: float = 60.0,
    clock: Clock | None = None,
    backend: str = "inductor",
) -> list[ModelRow | SkippedRow]:
    """Check one step of every variant against eager PyTorch in float64, then time all of them.

    Without a GPU, and without Triton's interpreter, `replace` runs PyTorch's batch norm: then
    nothing is measured, and the rows say so.

    Args:
        progress: told after each step.
        work: model, device, size and dtype.
        variants: names made of the parts eager, replace, compile and graph; by default all of
            `VARIANTS`, without CUDA graphs on a CPU.
        rounds: how often each variant runs, in turn and in random order; fewer if that takes
            longer than ``budget`` seconds.
        clock: by default the host's on a CPU and `EventClock` on a GPU.
        backend: of `torch.compile`.

    Raises:
        ValueError: a variant's name is unknown.
        RuntimeError: "eager" or "replace" is wrong, or PyTorch's batch norm ran in place of the
            kernels; nothing is timed then. Where a compiler or a capture fails, or is wrong, its
            variant is skipped, and its row says why.
    """
    work = work or Workload()
    on_cpu = work.device == "cpu"
    if variants is None:
        variants = [name for name in VARIANTS if not (on_cpu and "graph" in name)]
    if unknown := {part for name in variants for part in name.split("+")} - set(PARTS):
        raise ValueError(
            f"variants: expected parts of {', '.join(PARTS)}; got {', '.join(sorted(unknown))}"
        )
    if on_cpu and not interpreted(work.device):
        reason = "needs a GPU: on a CPU the batch norms of `replace` are PyTorch's own"
        return [skipped(work.model, MODE, name, reason) for name in variants]
    torch.compiler.reset()  # beyond a number of compiled forms, more would silently run eagerly
    total = rounds + len(variants) + 1
    progress(0, total, f"building {work.model}")
    original = build(work.model)
    check = Check.of(original, work, backend)
    forms: dict[str, _Form] = {}
    left_out: list[SkippedRow] = []
    for i, name in enumerate(variants):
        progress(i + 1, total, f"checking {name}")
        try:
            error = check(name)
            forms[name] = _form(name, original, work, backend, error)
        except Exception as problem:
            if name in ("eager", "replace"):
                raise
            left_out.append(skipped(work.model, MODE, name, in_words(problem)))
    steps = 1 if on_cpu else 2  # on a GPU the host may run ahead of it, as in a training loop
    timings = interleaved(
        {name: [form.step] * steps for name, form in forms.items()},
        clock or (HostClock() if on_cpu else EventClock()),
        rounds,
        progress=lambda done, of: progress(len(variants) + 1 + done, total, "timing in turn"),
        budget=budget,
    )
    progress(total, total)
    rows = [_row(name, form, timings[name], steps, work) for name, form in forms.items()]
    return [*rows, *left_out]


def _form(name: str, original: nn.Module, work: Workload, backend: str, error: float) -> _Form:
    step = step_of(name, original, work, backend)
    count = len(batch_norms(step.net))
    if "graph" in name:
        return _Form(step.captured(), None, count, error)
    step()  # compiles and allocates: what fails here only skips the variant
    step.laps = Laps(work.device)
    return _Form(step, step.laps, count, error)


def _row(name: str, form: _Form, timing: Timing, steps: int, work: Workload) -> ModelRow:
    parts: Sequence[float | None] = NO_PARTS  # a CUDA graph has nothing to tell them by
    if form.laps is not None:
        parts = form.laps.medians(last=timing.rounds * steps)
    return measured(
        *(work.model, MODE, name, work.device, work.dtype, "NHWC"),
        shape=(work.batch, 3, work.size, work.size),
        timing=timing,
        batch_norms=form.batch_norms,
        error=form.error,
        parts=parts,
    )
