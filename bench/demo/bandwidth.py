"""Part 4 on a GPU: time and bandwidth of a few ResNet-50 layers, beside eager PyTorch."""

from __future__ import annotations

from bench.machine import Gpu, Machine
from bench.processes import Progress, silent
from bench.providers import select
from bench.record.file import Record
from bench.runner import Options
from bench.session import session
from bench.suites import cases

__all__ = ["run"]


def run(progress: Progress = silent, quick: bool = False, machine: Machine | None = None) -> Record:
    """Forward and backward of the quick suite in both layouts; ``quick`` takes one layer of it.

    The same harness as ``python -m bench run``: a result is checked before it is timed.
    """
    found = cases("quick", modes=("forward+backward",), layouts=("NHWC", "NCHW"))
    return session(
        *(found[:2] if quick else found, select(("tritonnorm", "eager")), machine or Gpu()),
        *(Options(host=False), progress),
    )
