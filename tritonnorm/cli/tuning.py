"""``tritonnorm tune``."""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tritonnorm.cli.files import inputs_from, model_from
from tritonnorm.device import KNOWN, Device

if TYPE_CHECKING:
    from tritonnorm.tune.problems import Shape
    from tritonnorm.tune.session import Summary

__all__ = ["add_to"]

NORMS = ("batch", "group", "layer", "instance", "rms")
PRESETS = (
    *("resnet50", "efficientnet_b0", "densenet121", "unet3d", "mobilenet_v3"),
    *("diffusion_unet", "transformer"),
)
HELP = "find the fastest configurations on this GPU, and keep them"


def add_to(commands: Any, model_options: Callable[..., None]) -> None:
    """The command and its options."""
    c = commands.add_parser("tune", help=HELP, description=f"{HELP[0].upper()}{HELP[1:]}.")
    c.add_argument("--preset", action="append", default=[], choices=PRESETS, help="again for more")
    c.add_argument("--shapes", type=Path, metavar="FILE", help="lines of TRITONNORM_RECORD or NxC")
    model_options(c, required=False)
    c.add_argument(
        *("--norms",), nargs="+", default=["batch"], choices=NORMS, help="of --model: to replace"
    )
    c.add_argument("--freeze", action="store_true", help="freeze the model: tunes its fold, too")
    c.add_argument("--batch", type=int, metavar="N", help="of a preset, in place of its usual one")
    c.add_argument(
        "--dtype", action="append", choices=("bf16", "fp16", "fp32"), help="again for more"
    )
    c.add_argument("--layout", action="append", choices=("NHWC", "NCHW"), help="again for more")
    c.add_argument("--budget", type=float, metavar="SECONDS", help="for everything")
    c.add_argument("--resume", action="store_true", help="only what has no result yet")
    c.add_argument("--check", action="store_true", help="time what was chosen again, keep nothing")
    c.add_argument("--dry-run", action="store_true", help="compile only; needs no GPU")
    c.add_argument("--target", default="h200", help=f"of --dry-run: {', '.join(KNOWN)}")
    c.add_argument("--export", type=Path, metavar="FILE", help="write all results of this GPU")
    c.add_argument(
        "--merge", type=Path, nargs="+", default=[], metavar="FILE", help="take in tables"
    )
    c.add_argument("--device", type=int, default=0, metavar="N", help="of the GPU (default: 0)")
    cores = min(8, os.cpu_count() or 1)
    c.add_argument("--processes", type=int, default=cores, metavar="N", help="that compile")
    c.set_defaults(call=_tune)


def _tune(options: argparse.Namespace) -> int:
    from tritonnorm.cli import tuning_view as view
    from tritonnorm.tune import standing
    from tritonnorm.tune.session import Session
    from tritonnorm.tune.store import read_table, write_table

    if options.dry_run and options.merge:
        return _validate(options)
    for path in options.merge:
        entries = read_table(path)
        kept = sum(standing.put(entry) for entry in entries)
        print(f"{path}: {len(entries)} results, {kept} kept")
    device = _device(options)
    problems = list(_problems(options, device)) if device else []
    if options.dry_run:
        assert device is not None
        return view.dry_run(problems, device, options.processes)
    named = options.preset or options.shapes or options.model
    if not (named or options.check or options.export):
        if options.merge:
            return 0
        raise ValueError("--preset, --shapes or --model: expected what to tune, got nothing")
    if device is None:
        raise ValueError("tune: PyTorch finds no GPU; --dry-run works without one")
    session = Session(
        device,
        index=options.device,
        budget=options.budget,
        resume=options.resume,
        processes=options.processes,
    )
    summary: Summary | None = None
    if options.check:
        summary = view.watched(session.check, problems)
    elif problems:
        summary = view.watched(session.tune, problems)
    if options.export:
        count = write_table(options.export, device, standing.cache().entries())
        print(f"{options.export}: {count} results of {device.name}")
    if summary is None:
        return 0
    if summary.stopped == "interrupted":
        return 130
    return 1 if options.check and any(t.lost for t in summary.done) else 0


def _validate(options: argparse.Namespace) -> int:
    """Compile every entry of tables for its architecture; 1 if one is at fault."""
    from tritonnorm.tune.store import read_table
    from tritonnorm.tune.validate import faults_of

    found = 0
    for path in options.merge:
        entries = read_table(path)
        faults = list(faults_of(entries, options.processes))
        found += len(faults)
        print(f"{path}: {len(entries)} results, {len(faults)} at fault", *faults, sep="\n  ")
    return int(found > 0)


def _device(options: argparse.Namespace) -> Device | None:
    if options.dry_run:
        if options.target not in KNOWN:
            raise ValueError(f"--target: expected {', '.join(KNOWN)}; got {options.target!r}")
        return KNOWN[options.target]
    if not torch.cuda.is_available():
        return None
    return Device.of(torch.device("cuda", options.device))


def _problems(options: argparse.Namespace, device: Device) -> Iterator[Shape]:
    import tritonnorm
    from tritonnorm.kernels.fold_configs import problem_of
    from tritonnorm.tune import problems

    dtypes, layouts = options.dtype or ["bf16"], options.layout or list(problems.LAYOUTS)
    if options.batch is not None and options.batch < 1:
        raise ValueError(f"--batch: expected at least 1, got {options.batch}")
    for name in options.preset:
        yield from problems.preset(name, dtypes, layouts, options.batch)
    if options.shapes:
        yield from problems.from_file(options.shapes, dtypes, layouts)
    if options.model:
        if not options.input:
            raise ValueError("--input: the shapes of a model depend on it, got none")
        inputs = inputs_from(options.input, options.seed)
        model = model_from(options.model, options.options)
        if options.freeze:
            frozen, _ = tritonnorm.freeze(copy.deepcopy(model).eval(), inputs)
            for sources in _launches(frozen, device):
                yield problem_of(sources)
        model, _ = tritonnorm.replace(model, norms=options.norms, example_inputs=inputs)
        yield from problems.from_model(model, inputs, device, dtypes, layouts)


def _launches(model: torch.nn.Module, device: Device) -> list[Any]:
    from tritonnorm.device import simulated
    from tritonnorm.frozen import launches_of

    with simulated(device):
        return launches_of(model)
