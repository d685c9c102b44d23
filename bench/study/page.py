"""The study as a Markdown page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd

from bench.study.training import Verdict

__all__ = ["page"]

Section = tuple[ModuleType, pd.DataFrame, Sequence[Verdict], Path]

INTRODUCTION = """\
# The study

What is claimed for batch norm, tried with this library's modules on real data. A claim that does
not hold here is reported as such. The page is written by the command:

```bash
python -m bench study --out docs/study --page docs/study.md
```

`--quick` is a check that everything works, `--only convergence,shift` runs some of it, and
`--data FOLDER` takes images of your own: a folder with a folder per class, such as `cats` and
`dogs`, scaled to 16x16 pixels. `--from docs/study` draws and writes again what a run left there.
The whole takes some ten minutes of CPU time, so five minutes on two cores that are free; the wall
time below is that of a machine with other work.
"""

METHOD = """\
Each repeat has a seed of its own for the split (55 % of the images train, 15 % choose learning
rates, 30 % test), the weights and the order of the images; the networks that are compared share
them. Weights start as PyTorch's modules make them, those of the LSTM orthogonal. "±" is the
standard deviation over the repeats. A claim "held" or "did not hold" only where the 95 % interval
of the paired differences (Student's t) lies on one side of zero; with few repeats small differences
are not told apart.
"""


def page(sections: Sequence[Section], facts: dict[str, Any], folder: Path) -> str:
    """The text.

    Args:
        sections: experiment, table, verdicts and picture of each.
        facts: of the run: those of `bench.record.environment`, and data, by, repeats, seconds.
        folder: where the page will lie; pictures are linked from there.
    """
    cpu = f", {facts['cpu_seconds']:.0f} s of CPU time" if "cpu_seconds" in facts else ""
    versions = facts["versions"]
    state = " with changes" if facts["dirty"] else ""
    lines = [
        INTRODUCTION,
        "## This run",
        "",
        f"{facts['data']} pixels, {facts['repeats']} repeats. {facts['by']}",
        "",
        METHOD,
        f"`{facts['command']}`, {facts['date']}, commit "
        f"{(facts['commit'] or 'unknown')[:12]}{state}, "
        f"torch {versions['torch']}, Python {versions['python']}, {facts['host']['cpu']}, "
        f"{facts['seconds']:.0f} s{cpu}.",
        "",
    ]
    for experiment, table, verdicts, picture in sections:
        lines += [f"## {experiment.TITLE}", "", experiment.ABOUT, ""]
        for verdict in verdicts:
            lines += [f"**{verdict.word}:** {verdict.found} *The claim: {verdict.claim}.*", ""]
        link = os.path.relpath(picture, folder)
        lines += [f"![{experiment.TITLE}]({link})", "", _markdown(table), ""]
    return "\n".join(lines).rstrip() + "\n"


def _markdown(table: pd.DataFrame) -> str:
    names = [str(c).strip() for c in table]
    rows = [names, ["---"] * len(names), *(map(str, row) for row in table.to_numpy())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
