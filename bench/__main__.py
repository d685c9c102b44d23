"""``python -m bench``: the harness on the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    whole = argparse.ArgumentParser(
        prog="python -m bench",
        description="What tritonnorm does, shown and audited. Start with: python -m bench demo",
    )
    commands = whole.add_subparsers(dest="command", metavar="command")
    demo = commands.add_parser(
        "demo", help="a real model, handwritten digits, folding, and the kernels: under two minutes"
    )
    demo.add_argument("--quick", action="store_true", help="small and short: half a minute")
    demo.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: a GPU if there is one, else the CPU"
    )
    demo.add_argument("--out", type=Path, help="folder for the picture; default: bench/out")
    audit = commands.add_parser(
        "audit", help="bytes moved and machine code of every algorithm; needs no GPU"
    )
    audit.add_argument("--quick", action="store_true", help="a small representative set")
    audit.add_argument(
        "--processes", type=int, default=2, help="processes beside each other (default: 2)"
    )
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 for a result that is not right, 2 for an error."""
    whole = parser()
    options = whole.parse_args(arguments)
    if options.command is None:
        whole.print_help()
        return 0
    try:
        return _run(options)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        print(f"python -m bench: error: {_one_line(error)}", file=sys.stderr)
        if trace := getattr(error, "trace", ""):
            print(f"(in the child process:)\n{trace}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from rich.console import Console

    # Wide enough for the tables where the output is a file.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    if options.command == "audit":
        from bench.audit.command import main as audit

        if options.processes < 1:
            raise ValueError(f"--processes: expected at least 1, got {options.processes}")
        return audit(console, options.quick, options.processes)
    from bench.demo.command import DEFAULT_OUT
    from bench.demo.command import main as demo

    return demo(console, options.quick, options.device, options.out or DEFAULT_OUT)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
