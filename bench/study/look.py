"""How the tables and pictures of the study look."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["COLOURS", "LABELS", "MARKERS", "figure", "legend", "percent", "save", "spread"]

# Okabe and Ito (2008), as in `bench.report.style`.
COLOURS = {"batch": "#0072b2", "group": "#009e73", "layer": "#e69f00", "none": "#666666"}
MARKERS = {"batch": "o", "group": "D", "layer": "^", "none": "s"}
LABELS = {"batch": "batch norm", "group": "group norm", "layer": "layer norm", "none": "no norm"}
DPI = 100


def percent(share: float, places: int = 1) -> str:
    return f"{100 * share:.{places}f} %"


def spread(mean: float, std: float, places: int = 1, factor: float = 1.0) -> str:
    """``97.1 ± 0.4``; without the second part if there is only one repeat."""
    text = f"{factor * mean:.{places}f}"
    return text if math.isnan(std) else f"{text} ± {factor * std:.{places}f}"


def figure(
    title: str, about: str, rows: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure under a title and a line that says what was measured; the axes ``[rows, columns]``.

    ``height`` is that of the axes, in inches; the head comes on top.
    """
    head = 0.92
    whole = height + head
    fig = Figure(figsize=(width, whole), layout="constrained", facecolor="white")
    engine = fig.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0, 0, 1, height / whole))  # type: ignore[call-arg]
    fig.text(0.12 / width, 1 - 0.1 / whole, title, va="top", fontsize=12, weight="bold")
    fig.text(0.12 / width, 1 - 0.36 / whole, about, va="top", fontsize=9, color="0.35")
    panels = fig.subplots(rows, columns, squeeze=False, **options)
    for axes in panels.ravel():
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    return fig, panels


def legend(fig: Figure, axes: Axes, **options: Any) -> None:
    """One legend for the whole figure, in its head."""
    handles, labels = axes.get_legend_handles_labels()
    whole = fig.get_figheight()
    corner = (0.05 / fig.get_figwidth(), 1 - 0.55 / whole)
    fig.legend(
        handles, labels, loc="upper left", bbox_to_anchor=corner,
        ncols=len(labels), fontsize=9.5, frameon=False, **options,
    )  # fmt: skip


def save(fig: Figure, path: Path) -> None:
    """Write a PNG of at most 64 colours: a third of the bytes, and no difference to the eye."""
    from PIL import Image

    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=DPI)
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(file) as image:
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
