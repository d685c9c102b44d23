"""``python -m bench demo``: the four parts, in processes of their own, printed in order."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.audit.compile import cases, compile_jobs, in_order
from bench.audit.traffic import count_all, layer_calls
from bench.demo import bandwidth, digits, folding, training, view
from bench.processes import Job, run_jobs
from bench.record.file import Record
from bench.screen import Screen

__all__ = ["DEFAULT_OUT", "main"]

DEFAULT_OUT = Path(__file__).resolve().parents[1] / "out"
AT_ONCE = 2  # processes beside each other: the demo is made for two cores


def main(
    console: Console, quick: bool = False, device: str | None = None, out: Path = DEFAULT_OUT
) -> int:
    """Run and print the demo.

    Args:
        console: where it prints.
        quick: a small model, few epochs, small audits: half a minute.
        device: "cpu" or "cuda"; None takes a GPU if there is one.
        out: folder for the picture; it is made if need be.

    Returns:
        The exit code: 0, or 1 if a result is not what it must be.
    """
    begin = time.monotonic()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: expected a GPU that PyTorch can use, found none; try --device cpu"
        )
    view.heading(console, device)
    titles = {
        "1 Training step of a real model": ("training",),
        "2 Handwritten digits": ("digits",),
        "3 The model folded": ("fold",),
        "4 The kernels": ("traffic", "compile", "bandwidth"),
    }
    fine = True
    with Screen(console, titles) as screen:
        for group, show in zip(
            (_training_jobs, _fold_jobs, _kernel_jobs),
            (_show_training, _show_fold, _show_kernels),
            strict=True,
        ):
            # A GPU is not shared between timings and other work; nor are the cores while latency is
            # timed.
            results = run_jobs(
                group(quick, device), screen.progress, 1 if device == "cuda" else AT_ONCE
            )
            fine &= show(console, results, out)
    view.closing(console, time.monotonic() - begin, fine)
    return 0 if fine else 1


def _training_jobs(quick: bool, device: str) -> list[Job]:
    interpret = device == "cpu"
    threads = 1 if interpret else None
    model, batch = ("tiny", 4) if quick else ("resnet-50", 8)
    settings = digits.Settings()
    if quick:
        settings = replace(settings, layers=1, width=32, epochs=2)
    return [
        *(
            Job(
                f"training {dtype}", training.run, (model, device, dtype, batch), interpret, threads
            )
            for dtype in ("float64", "float32")
        ),
        Job("digits", digits.run, (device, settings), interpret, threads),
    ]


def _show_training(console: Console, results: list[Any], out: Path) -> bool:
    *steps, learned = results
    fine = view.training(console, steps)
    picture = out / "digits.png"
    digits.draw(learned, picture)
    view.digits(console, learned, picture)
    return fine


def _fold_jobs(quick: bool, device: str) -> list[Job]:
    model, size, rounds = ("tiny", 64, 5) if quick else ("resnet-50", 224, 21)
    # One thread: two that wait for each other measure what else the machine does.
    return [Job("fold", folding.run, (model, device, size, rounds), threads=1)]


def _show_fold(console: Console, results: list[Any], out: Path) -> bool:
    return view.folding(console, results[0])


def _kernel_jobs(quick: bool, device: str) -> list[Job]:
    if device == "cuda":
        return [Job("bandwidth", bandwidth.run, (quick,))]
    todo = cases(quick=True)
    if quick:
        todo = [case for case in todo if case.target in ("sm_90", "gfx942")]
    calls = layer_calls(quick=True)
    return [
        Job("traffic", count_all, (calls[:1] if quick else calls,), interpret=True, threads=1),
        *compile_jobs(todo, AT_ONCE),
    ]


def _show_kernels(console: Console, results: list[Any], out: Path) -> bool:
    if isinstance(results[0], Record):
        return view.bandwidth(console, results[0])
    return view.audits(console, results[0], in_order(results[1:]))
