"""Whole models: ``e2e``, a training step and folded inference; ``folds``, folding their weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console

from bench import folds as bench_folds
from bench.commands.files import NO_OUTPUTS, Outputs, write
from bench.e2e import inference, training
from bench.folds import FoldCase
from bench.machine import Gpu, Machine
from bench.processes import Job, run_jobs
from bench.record.environment import environment
from bench.record.file import Record
from bench.report.table import record_table
from bench.report.terminal import show
from bench.roofs import measured_roofs, theoretical_roof
from bench.runner import DEFAULTS, Options
from bench.screen import Screen
from bench.session import wrong
from bench.suites import DTYPES, LAYOUTS

__all__ = ["e2e", "folds"]


def e2e(
    console: Console,
    model: str = "resnet-50",
    batch: int | None = None,
    size: int = 224,
    dtype: str = "bfloat16",
    budget: float = 60.0,
    outputs: Outputs = NO_OUTPUTS,
) -> int:
    """Measure a training step and folded inference of a model; each is checked first.

    Args:
        model: a name of `bench.models.MODELS`.
        batch: by default 256 for training and 32 for inference on a GPU; 1 on a CPU, where only
            inference is measured.
        size: of the images.
        dtype: of autocast and of inference on a GPU; on a CPU it is float32.
        budget: seconds of timing for each of the two.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        work = training.Workload(model, "cuda", batch or 256, size, dtype)
        infer = (model, "cuda", batch or 32, size, dtype, None, budget)
    else:
        work = training.Workload(model, "cpu", batch or 1, size, "float32")
        infer = (model, "cpu", batch or 1, size, "float32", None, budget)
    jobs = [
        Job("training", training.run, (work, None, 15, budget)),
        Job("inference", inference.run, infer, threads=None if on_gpu else 1),
    ]
    with Screen(console, {"Training step": ("training",), "Inference": ("inference",)}) as screen:
        found = run_jobs(jobs, screen.progress, at_once=1)
    record = Record(environment(Gpu() if on_gpu else None))
    record.add(row for rows in found for row in rows)
    show(console, record_table(record))
    write(console, record, outputs)
    return 0


def folds(
    console: Console,
    models: Sequence[str] = bench_folds.MODELS,
    dtypes: Sequence[str] = ("fp32",),
    layouts: Sequence[str] = ("NHWC",),
    options: Options = DEFAULTS,
    outputs: Outputs = NO_OUTPUTS,
    machine: Machine | None = None,
) -> int:
    """Measure folding the weights of models: this library, eager PyTorch, torch.compile.

    Args:
        models: names of `bench.models.MODELS`, or densenet-121.
        dtypes: of the weights, keys of `bench.suites.DTYPES`.
        layouts: of the weights, of `bench.suites.LAYOUTS`.
        options: how to measure.

    Returns:
        0, or 1 if this library gave a wrong result or failed.

    Raises:
        ValueError: a name is unknown; nothing has run then.
        NoGpu: there is none.
    """
    for what, names, known in (("dtype", dtypes, DTYPES), ("layout", layouts, LAYOUTS)):
        for name in names:
            if name not in known:
                raise ValueError(f"{what}: expected one of {', '.join(known)}; got {name!r}")
    cases = [
        FoldCase.of(model, mode, DTYPES[dtype], layout == "NHWC")
        for model in models
        for dtype in dtypes
        for layout in layouts
        for mode in bench_folds.MODES
    ]
    machine = machine or Gpu()
    record = Record(environment(machine, options.seed))
    theoretical = theoretical_roof(machine)
    record.roofs = [*([theoretical] if theoretical else []), *measured_roofs(machine)]
    roofs = (record.roof("theoretical"), record.roof("copy"))
    for case in cases:
        with console.status(str(case)):
            rows, skipped = bench_folds.measure(case, machine, roofs, options)
        record.folds += rows
        record.skipped += skipped
    show(console, record_table(record))
    write(console, record, outputs)
    return int(bool(wrong(record)))
