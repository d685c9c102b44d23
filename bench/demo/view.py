"""How the demo prints its results, and what it takes for right."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from bench.audit.compile import CompileRow
from bench.audit.tables import (
    compile_summary,
    compile_table,
    traffic_summary,
    traffic_table,
)
from bench.audit.traffic import TrafficRow
from bench.demo.digits import DigitsResult
from bench.demo.folding import FoldResult
from bench.demo.training import StepErrors, TrainingResult
from bench.launches import Launches
from bench.record.file import Record
from bench.report.table import record_table
from bench.report.terminal import new_table, show, titled
from bench.session import wrong
from tritonnorm.timing import Timing

# Relative errors in float64 below this are rounding: 2.2e-16, times what a ResNet of 50 layers
# amplifies it (measured: 1e-12 for the gradients of such a model, 4e-13 for its folded outputs). A
# wrong formula gives errors many orders larger.
ROUNDING = 1e-9


def heading(console: Console, device: str) -> None:
    """What the numbers below depend on."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    console.print(
        f"[bold]tritonnorm demo[/bold] on {where}; torch {torch.__version__}, triton {version}. "
        "Every number below is computed now."
    )


def section(console: Console, title: str) -> None:
    """The title of a part."""
    console.print()
    console.rule(f"[bold]{title}[/bold]", align="left")


def kernels_ran(launches: Launches) -> bool:
    """Whether kernels computed everything, and PyTorch's batch norm nothing."""
    kernels = sum(launches.interpreted.values()) + sum(launches.compiled.values())
    return kernels > 0 and not launches.torch


def training(console: Console, results: Sequence[TrainingResult]) -> bool:
    """Part 1; whether the replaced model is equal and its kernels ran."""
    section(console, "1  Training step of a real model")
    first = results[0]
    shape = "x".join(map(str, first.pixels))
    console.print(
        f"{first.model} from transformers, random weights, input {shape}, channels_last. "
        f"tritonnorm.replace changed {first.replaced} of {first.batch_norms} batch norms."
    )
    fine = first.replaced == first.batch_norms
    for result in results:
        fine &= kernels_ran(result.launches)
        tiles = ", in tiles wider than a GPU's to fit the time" if result.wide_tiles else ""
        console.print(f"{result.dtype}: {result.launches}{tiles}.")
    title = "Largest difference from the original in float64, relative to the largest value"
    table = new_table(
        ("model", "dtype"),
        ("outputs", "gradients", "worst parameter's gradient", "running statistics"),
    )
    for result in results:
        table.add_row("replaced", result.dtype, *_errors(result.ours))
        if result.torchs is not None:
            table.add_row("original", result.dtype, *_errors(result.torchs))
    show(console, titled(title, table))
    for result in results:
        fine &= result.counters
        if result.dtype == "float64":
            e = result.ours
            equal = max(e.outputs, e.gradients, e.statistics, e.parameters) < ROUNDING
            fine &= equal and result.counters
            console.print(
                "In float64 outputs, gradients, running statistics and the parameters after the "
                f"step are {'equal up to rounding' if equal else '[red]NOT equal[/red]'}."
            )
        elif result.torchs is not None:
            # Of the same size as PyTorch's own rounding; see ROUNDING for why it is amplified.
            ok = result.ours.all_gradients <= 4 * result.torchs.all_gradients
            ok &= result.ours.outputs <= 4 * result.torchs.outputs
            fine &= ok
            console.print(
                f"In {result.dtype} both are {'' if ok else '[red]NOT[/red] '}about equally far "
                "from float64; a value that crosses a ReLU moves the gradients of small parameters "
                "most."
            )
    return fine


def _errors(e: StepErrors) -> list[str]:
    return [f"{v:.1e}" for v in (e.outputs, e.all_gradients, e.gradients, e.statistics)]


def digits(console: Console, result: DigitsResult, picture: Path) -> None:
    """Part 2."""
    section(console, "2  Handwritten digits, with and without batch norm")
    s = result.settings
    console.print(
        f"{result.training_images} training and {result.test_images} test images of scikit-learn; "
        f"{s.layers} hidden layer{'s' * (s.layers > 1)} of {s.width} sigmoids, SGD at rate "
        f"{s.rate:g}, batches of {s.batch}; the same weights and batches for all. "
        f"The batch norms: {result.launches}."
        + (" Tiles as wide as the layers." if result.wide_tiles else "")
    )
    epochs = [str(i) for i in range(s.epochs + 1)]
    title = "Accuracy on the test images in %, by epoch"
    table = new_table(("network",), epochs)
    for curve in result.curves:
        table.add_row(curve.name, *(f"{100 * a:.1f}" for a in curve.accuracy))
    show(console, titled(title, table))
    ours, torchs = (curve.accuracy for curve in result.curves[:2])
    apart = max(abs(a - b) for a, b in zip(ours, torchs, strict=True))
    console.print(f"Largest gap between the two with batch norm: {100 * apart:.1f} points.")
    console.print(f"Curves: {picture}", soft_wrap=True, highlight=False)


def folding(console: Console, r: FoldResult) -> bool:
    """Part 3; whether the folded model is equal."""
    section(console, "3  The same model folded for inference")
    gone = r.before - r.after
    where = f"{r.threads} thread{'s' * (r.threads > 1)}" if r.threads else "CUDA graphs"
    shape = "x".join(map(str, r.pixels))
    console.print(
        f"{r.model} in eval mode: {gone} of {r.before} batch norms are gone, {r.after} left. "
        f"Largest error of the outputs {r.error:.1e} in float64, {r.error32:.1e} in float32."
    )
    title = f"Latency of input {shape}, float32, {where}: {r.original.rounds} runs in turn"
    table = new_table(("model",), ("median ms", "20 %", "80 %"))
    for name, t in (("original, PyTorch's batch norm", r.original), ("folded", r.folded)):
        table.add_row(name, *_milliseconds(t))
    show(console, titled(title, table))
    console.print(
        f"Folded is {r.speedup:.2f} times as fast"
        + (". " if r.apart else ", but the spans overlap: this run does not tell them apart. ")
        + "Plain PyTorch ran on both sides "
        f"({sum(r.launches.torch.values())} calls of its batch norm for one image of the original, "
        f"{sum(r.launches.interpreted.values())} interpreted kernels)."
    )
    fine = r.error < ROUNDING and gone > 0
    if not fine:
        console.print("[red]The folded model is NOT equal to the original.[/red]")
    return fine


def _milliseconds(t: Timing) -> list[str]:
    return [f"{1e3 * v:.2f}" for v in (t.median, t.p20, t.p80)]


def audits(console: Console, traffic: Sequence[TrafficRow], compiled: Sequence[CompileRow]) -> bool:
    """Part 4 without a GPU; whether both audits pass."""
    section(console, "4  The kernels: audits, since there is no GPU to time them on")
    show(console, traffic_table(traffic))
    console.print(traffic_summary(traffic))
    console.print()
    show(console, compile_table(compiled))
    console.print(compile_summary(compiled))
    return all(row.exact for row in traffic) and not any(row.faults for row in compiled)


def bandwidth(console: Console, record: Record) -> bool:
    """Part 4 on a GPU."""
    section(console, "4  The kernels: bandwidth")
    show(console, record_table(record))
    return bool(record.ops) and not wrong(record)


def closing(console: Console, seconds: float, fine: bool) -> None:
    """The last line."""
    verdict = "" if fine else " [red]Something above is not as it must be.[/red]"
    console.print(f"\nDone in {seconds:.0f} s.{verdict}")
