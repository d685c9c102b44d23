"""Test set-up: the main process interprets kernels on the CPU; compiled and gpu tests run apart."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker: they share the cores

collect_ignore: list[str] = []

if os.environ["TRITON_INTERPRET"] == "1":
    from bench.lab import interpreter

    collect_ignore += ["compiled", "gpu"]
    interpreter.install()
