"""How pictures look: colours that the colour-blind can tell apart, sizes, titles."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from bench.record.file import Record
from bench.report.sentences import OURS, gpu_line

__all__ = [
    "PARTS",
    "SMALL",
    "Markers",
    "byte_axis",
    "distinct",
    "engineering",
    "line",
    "marks",
    "new_figure",
]

T = TypeVar("T")
Markers = dict[str, dict[str, Any]]

SMALL, NORMAL = 8.0, 10.0  # points
LINE = 0.15  # inches from one line of SMALL to the next
# Okabe and Ito (2008), https://jfly.uni-koeln.de/color/; grey for what the others are measured by.
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#e69f00", "#009e73", "#999999"
FIXED = {OURS: BLUE, "eager": GREY, "compile": ORANGE}
OTHERS = ("#d55e00", GREEN, "#cc79a7", "#56b4e9", "#f0e442", "#000000")
SHAPES = "osD^vP*X<>"
#: Parts of a training step and their colours.
PARTS = {"forward": BLUE, "backward": ORANGE, "optimizer": GREEN, "not split": GREY}


def marks(providers: Iterable[str]) -> Markers:
    """Provider -> its colour and marker; `OURS` first, then as they come."""
    ordered = sorted(
        distinct(providers),
        key=lambda name: list(FIXED).index(name) if name in FIXED else len(FIXED),
    )
    free = [name for name in ordered if name not in FIXED]
    colours = FIXED | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(free)}
    return {
        name: {"color": colours[name], "marker": SHAPES[i % len(SHAPES)]}
        for i, name in enumerate(ordered)
    }


def distinct(values: Iterable[T]) -> list[T]:
    """Each once, in the order in which they come."""
    return list(dict.fromkeys(values))


def new_figure(
    record: Record, title: str, handles: Sequence[Artist], width: float, height: float
) -> Figure:
    """An empty figure under a head of its own: title, GPU and commit, and one legend for all axes.

    Args:
        handles: what the legend explains; as many columns as fit.
        width, height: inches; the head comes on top of the height.
    """
    e = record.environment
    where = f"{gpu_line(record)}, {e['date']}, commit {(e['commit'] or 'unknown')[:12]}"
    lines = textwrap.wrap(where, int(width / 0.07))
    longest = max((len(str(handle.get_label())) for handle in handles), default=0)
    columns = max(1, int((width - 0.2) / (0.5 + 0.075 * longest)))
    rows = math.ceil(len(handles) / columns)
    legend_top = 0.38 + LINE * len(lines)
    head = legend_top + 0.19 * rows + 0.08
    whole = head + height
    figure = Figure(figsize=(width, whole), layout="constrained", facecolor="white")
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0, 0, 1, height / whole))  # type: ignore[call-arg]
    figure.text(0.1 / width, 1 - 0.1 / whole, title, va="top", fontsize=NORMAL, weight="bold")
    below = "\n".join(lines)
    figure.text(0.1 / width, 1 - 0.34 / whole, below, va="top", fontsize=SMALL, color="0.35")
    if handles:
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.02 / width, 1 - legend_top / whole),
            ncols=columns,
            fontsize=SMALL,
            frameon=False,
        )
    return figure


def line(label: str, style: Any) -> Line2D:
    """A black line for a legend."""
    return Line2D([], [], color="black", linestyle=style, linewidth=1.2, label=label)


def engineering(x: float, unit: str = "") -> str:
    """Three digits and k, M or G: ``401k``, ``1.57k``, ``49``; ``10 MB`` with a unit."""
    prefixes = {1e9: "G", 1e6: "M", 1e3: "k"}
    factor = next((f for f in prefixes if x >= 0.9995 * f), 1.0)
    return f"{x / factor:.3g}{' ' if unit else ''}{prefixes.get(factor, '')}{unit}"


def byte_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic x axis that holds a range of bytes, with few labels in kB, MB and GB."""
    low, high = low / 1.5, high * 1.5
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 2.5 else (1,)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    axes.xaxis.set_major_locator(
        FixedLocator([m * 10.0**k for k in range(first, last + 1) for m in steps])
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: engineering(x, "B"))
