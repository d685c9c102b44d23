"""``tritonnorm fold``, ``replace``, ``tune`` and ``info``; also ``python -m tritonnorm``."""

from __future__ import annotations

import argparse
import html
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import tritonnorm
from tritonnorm.cli import tuning
from tritonnorm.cli.files import inputs_from, load_into, model_from, writer
from tritonnorm.device import KNOWN, Device
from tritonnorm.fusing.saving import predicted
from tritonnorm.report import Report

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    whole = argparse.ArgumentParser(
        prog="tritonnorm", description="Batch norms of a model: fold them, replace them, tune them."
    )
    whole.add_argument("--version", action="version", version=tritonnorm.__version__)
    commands = whole.add_subparsers(dest="command", metavar="command", required=True)

    fold = commands.add_parser("fold", help="fold a model's batch norms and write the result")
    _model_options(fold)
    fold.add_argument("--weights", type=Path, metavar="FILE", help=".safetensors or .pt")
    fold.add_argument("--out", type=Path, metavar="FILE", help=".safetensors, .pt or .pt2")
    fold.add_argument("--force", action="store_true", help="overwrite the output")
    fold.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    fold.add_argument("--rules", default="exact", help="which rules (default: exact)")
    fold.add_argument("--strict", action="store_true", help="exit code 1 if a batch norm is left")
    fold.add_argument("--dry-run", action="store_true", help="only report")
    fold.set_defaults(call=_fold)

    replace = commands.add_parser("replace", help="say what `tritonnorm.replace` would do")
    _model_options(replace)
    replace.add_argument(
        "--gpu", choices=KNOWN, default="h100", help="for the prediction (default: h100)"
    )
    replace.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    replace.set_defaults(call=_replace)

    tuning.add_to(commands, _model_options)

    info = commands.add_parser("info", help="versions, and the GPU as the planner sees it")
    info.set_defaults(call=_info)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 1 for ``--strict`` with a batch norm left, or 2 for an error."""
    options = parser().parse_args(arguments)
    try:
        return int(options.call(options))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"tritonnorm: error: {text}", file=sys.stderr)
        return 2


def _model_options(command: argparse.ArgumentParser, required: bool = True) -> None:
    command.add_argument("--model", required=required, metavar="MODULE:FACTORY")
    command.add_argument("--options", default="{}", metavar="JSON", help="arguments of the factory")
    command.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="1x3x224x224",
        help="shape of an input, with :DTYPE if not float32; again for every argument",
    )
    command.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")


def _fold(options: argparse.Namespace) -> int:
    write = writer(options.out, options.force) if options.out else None
    if options.out and options.out.suffix == ".pt2" and not options.input:
        raise ValueError("--input: a .pt2 file is exported with inputs, got none")
    inputs = inputs_from(options.input, options.seed)
    torch.manual_seed(options.seed)
    model = model_from(options.model, options.options).eval()
    if options.weights:
        load_into(model, options.weights)
    folded, report = tritonnorm.fold(
        model,
        inputs or None,
        inplace=options.rules == "exact",  # a copy less; rules of more have no undo
        rules=options.rules,
        dry_run=options.dry_run,
    )
    print(report)
    left = bool(report.remaining)
    if options.strict and left:
        print("tritonnorm: --strict: a batch norm is left; nothing is written", file=sys.stderr)
    elif write is not None and not options.dry_run:
        write(folded, inputs)
        print(f"written: {options.out}")
    _page(report, options)
    return 1 if options.strict and left else 0


def _replace(options: argparse.Namespace) -> int:
    model = model_from(options.model, options.options)
    inputs = inputs_from(options.input, options.seed)
    _, report = tritonnorm.replace(model, example_inputs=inputs or None, dry_run=True)
    if inputs:
        saving, gpu = predicted(model, report, inputs), KNOWN[options.gpu]
        less = saving.before - saving.after
        share = f" ({100 * less / saving.before:.0f} %)" if saving.before else ""
        report.notes.append(
            f"fusing saves {less * 1e-6:,.1f} of {saving.before * 1e-6:,.1f} MB{share} in the "
            f"batch norms, additions and activations of a training step on these inputs: "
            f"{less / gpu.bandwidth * 1e3:.3f} ms at the bandwidth of {gpu.name}; a prediction"
        )
    print(report)
    _page(report, options)
    return 0


def _info(options: argparse.Namespace) -> int:
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "not installed"
    print(f"tritonnorm {tritonnorm.__version__}, torch {torch.__version__}, triton {version}")
    if version != "not installed":
        from tritonnorm.tune import standing

        mine = standing.cache()
        tables = len(list(standing.SHIPPED.glob("*.json")))
        print(f"tuned results: {len(mine.entries())} in {mine.root}, {tables} shipped tables")
    if not torch.cuda.is_available():
        print("no GPU that PyTorch can use: batch norms run in PyTorch")
        return 0
    for index in range(torch.cuda.device_count()):
        d = Device.of(torch.device("cuda", index))
        bandwidth = f"{d.bandwidth * 1e-9:,.0f} GB/s" if d.bandwidth else "bandwidth unknown"
        cache = f"{d.l2_bytes >> 20} MiB last-level cache"
        print(f"cuda:{index}: {d.name}, {d.arch}, {d.sms} multiprocessors, {cache}, {bandwidth}")
    return 0


def _page(report: Report, options: argparse.Namespace) -> None:
    """Write the report as a page that refers to nothing outside itself."""
    if options.html is None:
        return
    table = report.to_pandas().to_html(index=False, na_rep="", float_format="{:.2g}".format)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
    title = html.escape(f"{options.model}: {report.summary}")
    style = (
        "body{font:15px sans-serif;margin:2em}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left}"
    )
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<style>{style}</style><h1>{title}</h1>{table}<ul>{notes}</ul></html>\n"
    )
    options.html.write_text(page, encoding="utf-8")
    print(f"written: {options.html}")
