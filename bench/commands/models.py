"""``e2e``: whole models, a training step and folded inference."""

from __future__ import annotations

import torch
from rich.console import Console

from bench.commands.files import NO_OUTPUTS, Outputs, write
from bench.e2e import inference, training
from bench.machine import Gpu
from bench.processes import Job, run_jobs
from bench.record.environment import environment
from bench.record.file import Record
from bench.report.table import record_table
from bench.report.terminal import show
from bench.screen import Screen

__all__ = ["e2e"]


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
