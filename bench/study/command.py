"""``python -m bench study``: the experiments in processes of their own, printed and written."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import torch
from rich.console import Console

import tritonnorm
from bench.processes import Job, Progress, run_jobs
from bench.record.environment import environment
from bench.report.terminal import new_table, show
from bench.screen import Screen
from bench.study import architectures, convergence, generalization, shift
from bench.study.data import Images, digits, folder
from bench.study.look import save
from bench.study.page import page

__all__ = ["DEFAULT_OUT", "EXPERIMENTS", "main", "work"]

EXPERIMENTS: dict[str, ModuleType] = {
    m.NAME: m for m in (convergence, shift, generalization, architectures)
}
RUN = "run.json"
DEFAULT_OUT = Path(__file__).resolve().parents[1] / "out" / "study"
SEEDS, QUICK_SEEDS = 4, 2
AT_ONCE = 2  # the study is made for two cores


def work(
    progress: Progress, name: str, seeds: Sequence[int], data: Path | None, quick: bool, device: str
) -> list[dict[str, Any]]:
    """The rows of one experiment for some seeds; runs in a child process."""
    images, experiment = load(data), EXPERIMENTS[name]
    rows: list[dict[str, Any]] = []
    of, done = len(seeds) * experiment.units(quick), 0

    def tick(what: str) -> None:
        nonlocal done
        progress(done, of, what)
        done += 1

    for seed in seeds:
        rows += experiment.measure(images, seed, quick, device, tick)
    progress(of, of)
    return rows


def load(data: Path | None) -> Images:
    """The user's folder, or the digits."""
    return digits() if data is None else folder(data)


def main(
    console: Console,
    *,
    quick: bool = False,
    data: Path | None = None,
    only: Sequence[str] = (),
    device: str | None = None,
    out: Path = DEFAULT_OUT,
    write_page: Path | None = None,
) -> int:
    """Run the experiments, print a table and the verdicts of each, and save a picture.

    Args:
        console: where it prints.
        quick: few repeats, rates and steps: a check that everything works.
        data: a folder of images, a folder in it per class; None is scikit-learn's digits.
        only: names of experiments; all if empty.
        device: "cpu" or "cuda"; None takes a GPU if there is one.
        out: folder for the pictures and the rows as CSV.
        write_page: a Markdown page to write with all of it.

    Returns:
        The exit code 0: a claim that does not hold is a result.
    """
    unknown = [name for name in only if name not in EXPERIMENTS]
    if unknown:
        raise ValueError(f"--only: expected of {', '.join(EXPERIMENTS)}; got {', '.join(unknown)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    images = load(data)
    begin = time.monotonic()
    seeds = range(QUICK_SEEDS if quick else SEEDS)
    what = f"{len(images.y)} images ({images.name}) of {images.x.shape[3]}x{images.x.shape[2]}"
    by = computed_by(device)
    console.print(f"[bold]The study[/bold]: {what} pixels, {len(seeds)} repeats. {by}")
    wanted = [EXPERIMENTS[name] for name in EXPERIMENTS if not only or name in only]
    # The longest first; each in two jobs, so that two cores have the same to do.
    shares = [[s for s in seeds if s % AT_ONCE == i] for i in range(AT_ONCE)]
    jobs = [
        Job(f"{m.NAME} {i}", work, (m.NAME, share, data, quick, device), threads=1)
        for m in reversed(wanted)
        for i, share in enumerate(shares)
    ]
    with Screen(console, {m.TITLE: (m.NAME,) for m in wanted}) as screen:
        found = dict(
            zip((j.name for j in jobs), run_jobs(jobs, screen.progress, AT_ONCE), strict=True)
        )
    frames = {
        m.NAME: pd.DataFrame([row for i in range(AT_ONCE) for row in found[f"{m.NAME} {i}"]])
        for m in wanted
    }
    facts = {
        **environment(None, arguments=["study", *_flags(quick, only)]),
        "data": what,
        "name": images.name,
        "by": by,
        "repeats": len(seeds),
        "seconds": time.monotonic() - begin,
        "cpu_seconds": sum(os.times()[2:4]),  # of the child processes, which are over
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        frame.to_csv(out / f"{name}.csv", index=False)
    (out / RUN).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    report(console, frames, facts, out, write_page)
    return 0


def again(console: Console, folder: Path, write_page: Path | None = None) -> int:
    """Print, draw and write once more what an earlier run left in its folder.

    Raises:
        ValueError: there is no run in it.
    """
    if not (folder / RUN).is_file():
        raise ValueError(f"--from: expected a folder with {RUN}, got {folder}")
    facts = json.loads((folder / RUN).read_text(encoding="utf-8"))
    files = {name: folder / f"{name}.csv" for name in EXPERIMENTS}
    frames = {name: pd.read_csv(path) for name, path in files.items() if path.is_file()}
    report(console, frames, facts, folder, write_page)
    return 0


def report(
    console: Console,
    frames: dict[str, pd.DataFrame],
    facts: dict[str, Any],
    out: Path,
    write_page: Path | None,
) -> None:
    """Tables and verdicts to the console, pictures to a folder, and a page if one is wanted."""
    sections = []
    for name, frame in frames.items():
        experiment = EXPERIMENTS[name]
        picture = out / f"{name}.png"
        save(experiment.draw(frame, facts["name"]), picture)
        table, verdicts = experiment.table(frame), experiment.verdicts(frame)
        sections.append((experiment, table, verdicts, picture))
        console.print()
        console.rule(f"[bold]{experiment.TITLE}[/bold]", align="left")
        print_table(console, table)
        for verdict in verdicts:
            console.print(f"\n{verdict}")
        console.print(f"Picture: {picture}", soft_wrap=True, style="dim")
    console.print(f"\n{facts['seconds']:.0f} s.")
    if write_page is not None:
        write_page.parent.mkdir(parents=True, exist_ok=True)
        write_page.write_text(page(sections, facts, write_page.parent), encoding="utf-8")
        console.print(f"Written: {write_page}", soft_wrap=True)


def _flags(quick: bool, only: Sequence[str]) -> list[str]:
    return [*(["--quick"] if quick else []), *(["--only", ",".join(only)] if only else [])]


def computed_by(device: str) -> str:
    """What computes this library's modules here, in a sentence."""
    if device == "cuda":
        return f"Batch norms run as tritonnorm's kernels on {torch.cuda.get_device_name()}."
    if os.environ.get("TRITON_INTERPRET") == "1":
        return (
            "Batch norms run as tritonnorm's kernels in Triton's interpreter on this CPU, slowly."
        )
    return (
        f"No GPU ({platform.machine()}): the modules are tritonnorm {tritonnorm.__version__}'s, "
        "and on a CPU they compute with PyTorch's operations; on a GPU they run their kernels."
    )


def print_table(console: Console, table: pd.DataFrame) -> None:
    """Names to the left, figures to the right."""
    left = [c for c in table if c in ("network", "norm", "what")]
    shown = new_table(left, [str(c) for c in table if c not in left])
    for _, row in table[[*left, *(c for c in table if c not in left)]].iterrows():
        shown.add_row(*(str(cell) for cell in row))
    show(console, shown)
