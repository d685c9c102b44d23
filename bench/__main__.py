"""``python -m bench``: the harness on the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.processes import one_line

if TYPE_CHECKING:
    from rich.console import Console

    from bench.commands.files import Outputs

__all__ = ["main", "parser"]

Command = Callable[["Console", argparse.Namespace], int]


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    whole = argparse.ArgumentParser(
        prog="python -m bench",
        description=(
            "What tritonnorm does, measured and audited. Without a command: on a GPU the quick "
            "suite with its report, in under 90 seconds; without one what a CPU can tell."
        ),
    )
    whole.set_defaults(call=_default)
    commands = whole.add_subparsers(dest="command", metavar="command")

    def command(name: str, call: Command, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        made.set_defaults(call=call)
        return made

    demo = command(
        *("demo", _demo, "a real model, handwritten digits, folding, the kernels: two minutes")
    )
    demo.add_argument("--quick", action="store_true", help="small and short: half a minute")
    demo.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: a GPU if there is one, else the CPU"
    )
    demo.add_argument("--out", type=Path, help="folder for the picture; default: bench/out")

    run = command("run", _run, "time operations on a GPU beside eager PyTorch, torch.compile, ...")
    _selection(run, suite="quick")
    run.add_argument("--limit", type=float, help="seconds after which no case begins")
    _outputs(run)

    submit = command(
        *("submit", _submit, "write bench/results/<gpu>/<date>.json, ready for a pull request")
    )
    _selection(submit, suite="quick")
    submit.add_argument("--from", dest="source", type=Path, metavar="FILE", help="take this run")

    compare = command(
        *("compare", _compare, "two results files; exit code 1 if anything got slower"),
    )
    compare.add_argument("base", type=Path)
    compare.add_argument("new", type=Path)
    compare.add_argument("--force", action="store_true", help="even if the GPUs differ")

    show = command("show", _show, "print a results file, or write it in another form")
    show.add_argument("file", type=Path)
    _outputs(show)

    roofline = command("roofline", _roofline, "bandwidth of a copy and of a sum over sizes")
    _outputs(roofline)

    e2e = command("e2e", _e2e, "whole models: a training step, and inference folded and not")
    e2e.add_argument("--model", default="resnet-50")
    e2e.add_argument("--batch", type=int)
    e2e.add_argument("--size", type=int, default=224, help="of the images (default: 224)")
    e2e.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    e2e.add_argument("--budget", type=float, default=60.0, help="seconds of timing for each")
    _outputs(e2e)

    folds = command(
        *("folds", _folds, "folding the weights of whole models on a GPU, forward and backward")
    )
    folds.add_argument("--model", type=_list, metavar="A,B,...", help="default: three networks")
    folds.add_argument("--dtype", type=_list, default=["fp32"], metavar="A,B,...")
    folds.add_argument("--layout", type=_list, default=["NHWC"], metavar="A,B,...")
    _how(folds)
    _outputs(folds)

    counters = command(
        *("counters", _counters, "DRAM bytes of calls in every regime by the GPU's counters (ncu)")
    )
    counters.add_argument("--regime", type=_list, metavar="A,B,...", help="default: all")
    _outputs(counters)

    audit = command(
        *("audit", _audit, "bytes moved and machine code of every algorithm; needs no GPU")
    )
    audit.add_argument("--quick", action="store_true", help="a small representative set")
    audit.add_argument(
        "--processes", type=int, default=2, help="processes beside each other (default: 2)"
    )

    study = command("study", _study, "what is claimed for batch norm, tried on real data")
    study.add_argument("--quick", action="store_true", help="a check: under 90 seconds")
    study.add_argument("--data", type=Path, metavar="FOLDER", help="images, a folder per class")
    study.add_argument("--only", type=_list, default=[], metavar="A,B,...", help="experiments")
    study.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    study.add_argument("--out", type=Path, help="folder for pictures; default: bench/out/study")
    study.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="an earlier run")
    study.add_argument("--page", type=Path, metavar="FILE", help="write it all as Markdown")

    host = command("host", _host, "what the CPU side costs: imports, calls, folded models")
    host.add_argument("--quick", action="store_true", help="one model in place of three")
    _outputs(host)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 for a result that is not right, 2 for an error."""
    options = parser().parse_args(arguments)
    try:
        from rich.console import Console

        # Wide enough for the tables where the output is a file.
        console = Console() if sys.stdout.isatty() else Console(width=140)
        return int(options.call(console, options))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        print(f"python -m bench: error: {one_line(error)}", file=sys.stderr)
        if trace := getattr(error, "trace", ""):
            print(f"(in the child process:)\n{trace}", file=sys.stderr)
        return 2


def _selection(command: argparse.ArgumentParser, suite: str) -> None:
    """Options that say what is measured."""

    def add(name: str, many: bool = True, **options: Any) -> None:
        if many:
            options |= {"type": _list, "metavar": "A,B,..."}
        command.add_argument(name, **options)

    command.add_argument("--suite", default=suite, help="quick, resnet50, norms, ...")
    add("--ops", default=["own"], help="own (the layer's), BN, BN+relu, BN+add+relu, ...")
    add("--dtype", default=["bf16"], help="bf16, fp16, fp32, fp64")
    add("--layout", help="NHWC, NCHW; default: those of the suite")
    add("--mode", help="forward, backward, forward+backward, inference")
    add("--batch", help="batch sizes; default: those of the suite")
    add("--providers", help="all, or of tritonnorm, eager, compile, compile-max, cudnn, ...")
    _how(command)


def _how(command: argparse.ArgumentParser) -> None:
    """Options that say how it is measured."""
    command.add_argument("--warm", action="store_true", help="one buffer, as if just written")
    command.add_argument("--rounds", type=int, default=200, help="the most samples (default: 200)")
    command.add_argument(
        "--seconds", type=float, default=0.5, help="of timing per case and provider (default: 0.5)"
    )
    command.add_argument("--seed", type=int, default=0, help="of data and order (default: 0)")


def _outputs(command: argparse.ArgumentParser) -> None:
    """Options that say what is written."""
    for kind in ("json", "csv", "html", "md"):
        command.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"write {kind.upper()}")
    command.add_argument("--pictures", type=Path, metavar="FOLDER", help="write PNG files")


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _files(options: argparse.Namespace) -> Outputs:
    from bench.commands.files import Outputs

    return Outputs(options.json, options.csv, options.html, options.md, options.pictures)


def _request(options: argparse.Namespace) -> Any:
    from bench.commands.measure import Request
    from bench.providers import DEFAULT

    how = _timing(options)
    try:
        batches = [int(size) for size in options.batch] if options.batch else None
    except ValueError:
        raise ValueError(f"--batch: expected numbers, got {','.join(options.batch)}") from None
    return Request(
        *(options.suite, options.ops, options.dtype, options.layout, options.mode, batches),
        *(options.providers or DEFAULT, how, getattr(options, "limit", None)),
    )


def _timing(options: argparse.Namespace) -> Any:
    from bench.runner import Options

    for name in ("rounds", "seconds"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name}: expected more than 0, got {getattr(options, name)}")
    return Options(options.warm, options.rounds, options.seconds, options.seed)


def _default(console: Console, options: argparse.Namespace) -> int:
    import torch

    if torch.cuda.is_available():
        from bench.commands.measure import quick

        return quick(console)
    from bench.commands.cpu import without_gpu

    return without_gpu(console)


def _demo(console: Console, options: argparse.Namespace) -> int:
    from bench.demo.command import DEFAULT_OUT
    from bench.demo.command import main as demo

    return demo(console, options.quick, options.device, options.out or DEFAULT_OUT)


def _run(console: Console, options: argparse.Namespace) -> int:
    from bench.commands.measure import run

    return run(console, _request(options), _files(options))


def _submit(console: Console, options: argparse.Namespace) -> int:
    from bench.commands.measure import submit

    return submit(console, _request(options), options.source)


def _roofline(console: Console, options: argparse.Namespace) -> int:
    from bench.commands.measure import roofline

    return roofline(console, _files(options))


def _compare(console: Console, options: argparse.Namespace) -> int:
    from bench.commands.files import compare

    return compare(console, options.base, options.new, options.force)


def _show(console: Console, options: argparse.Namespace) -> int:
    from bench.commands.files import show

    return show(console, options.file, _files(options))


def _e2e(console: Console, options: argparse.Namespace) -> int:
    from bench.commands.models import e2e

    o = options
    return e2e(console, o.model, o.batch, o.size, o.dtype, o.budget, _files(options))


def _folds(console: Console, options: argparse.Namespace) -> int:
    from bench.commands.models import folds
    from bench.folds import MODELS

    o = options
    how, models = _timing(o), o.model or MODELS
    return folds(console, models, o.dtype, o.layout, how, _files(o))


def _counters(console: Console, options: argparse.Namespace) -> int:
    from bench.commands.measure import counters
    from bench.counters import REGIMES

    return counters(console, options.regime or tuple(REGIMES), _files(options))


def _audit(console: Console, options: argparse.Namespace) -> int:
    from bench.audit.command import main as audit

    if options.processes < 1:
        raise ValueError(f"--processes: expected at least 1, got {options.processes}")
    return audit(console, options.quick, options.processes)


def _study(console: Console, options: argparse.Namespace) -> int:
    from bench.study.command import DEFAULT_OUT, again
    from bench.study.command import main as study

    o = options
    if o.source is not None:
        return again(console, o.source, o.page)
    return study(
        console, quick=o.quick, data=o.data, only=o.only, device=o.device,
        out=o.out or DEFAULT_OUT, write_page=o.page,
    )  # fmt: skip


def _host(console: Console, options: argparse.Namespace) -> int:
    from bench.commands.cpu import host

    return host(console, _files(options), options.quick)


if __name__ == "__main__":
    sys.exit(main())
