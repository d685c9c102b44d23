"""The pictures of a record: each function draws one, or returns None where its figures are missing.

A picture shows all rows it is given. `pictures` first splits a record, so that a picture has one
dtype, one layout, and either cold or warm caches.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.record.file import Record
from bench.record.rows import ModelRow, OpRow
from bench.report.cells import number
from bench.report.sentences import OURS, geometric_mean
from bench.report.style import (
    PARTS,
    SMALL,
    byte_axis,
    distinct,
    engineering,
    line,
    marks,
    new_figure,
)

__all__ = ["bandwidth", "pictures", "png", "roof_bars", "save_pngs", "speedups", "training_steps"]

DPI = 110
ROOFS: dict[str, Any] = {"theoretical": "solid", "copy": (0, (4, 2)), "read": (0, (1, 1.5))}
WIDEST = 150.0  # percent; bars beyond it, from the cache, are cut off so that the others stay long


def pictures(record: Record) -> dict[str, Figure]:
    """Name -> picture, of all that the record has the figures for."""
    found = {
        f"{name}{suffix}": draw(part)
        for suffix, part in _parts(record)
        for name, draw in (("roof", roof_bars), ("bandwidth", bandwidth), ("speedup", speedups))
    }
    found["training"] = training_steps(record)
    return {name: figure for name, figure in found.items() if figure is not None}


def png(figure: Figure) -> bytes:
    """A picture as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def save_pngs(record: Record, folder: Path) -> list[Path]:
    """Write all pictures into a folder, which is made if need be; the files' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in pictures(record).items():
        path = folder / f"{name}.png"
        path.write_bytes(png(figure))
        paths.append(path)
    return paths


def roof_bars(record: Record) -> Figure | None:
    """Percent of the theoretical bandwidth (of the copy roof if that is unknown) per layer.

    A panel per mode, a group of bars per layer, a bar per provider, the copy roof as a line.
    """
    peak, copy = record.roof("theoretical"), record.roof("copy")
    of_peak = any(row.peak_percent is not None for row in record.ops)
    percents = {
        row: percent
        for row in record.ops
        if (percent := row.peak_percent if of_peak else row.copy_percent) is not None
    }
    if not percents:
        return None
    modes, layers = distinct(row.mode for row in percents), distinct(map(_layer, percents))
    styles = marks(row.provider for row in percents)
    handles: list[Artist] = [Patch(color=s["color"], label=name) for name, s in styles.items()]
    roof = 100.0 if not of_peak else 100 * copy / peak if copy and peak else None
    if roof is not None:
        handles.append(line(f"copy roof ({roof:.0f} %)", ROOFS["copy"]))
    highest = max(percents.values())
    if highest > WIDEST:
        label = f"over {WIDEST:.0f} %"
        handles.append(Line2D([], [], color="k", marker=">", linestyle="", label=label))
    of = "theoretical bandwidth" if of_peak else "copy roof"
    figure = new_figure(
        record,
        f"Percent of the {of}: {_common(percents)}",
        handles,
        width=2.6 + _panels(len(modes), 3.0),
        height=0.8 + max(0.26, 0.14 + 0.07 * len(styles)) * len(layers),
    )
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    thickness = 0.8 / len(styles)
    for axes, mode in zip(panels, modes, strict=True):
        for i, (provider, style) in enumerate(styles.items()):
            shift = (i - (len(styles) - 1) / 2) * thickness
            bars = {
                layers.index(_layer(row)) + shift: percent
                for row, percent in percents.items()
                if (row.mode, row.provider) == (mode, provider)
            }
            axes.barh([*bars], [*bars.values()], thickness, color=style["color"], zorder=2)
            beyond = [y for y, percent in bars.items() if percent > WIDEST]
            axes.plot([0.985 * WIDEST] * len(beyond), beyond, "k>", markersize=3, zorder=4)
        if roof is not None:
            axes.axvline(roof, color="black", linestyle=ROOFS["copy"], linewidth=1.2, zorder=3)
        axes.set_xlim(0, min(WIDEST, max(105.0, 1.03 * highest)))
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_title(mode, fontsize=SMALL + 1)
        axes.set_xlabel("%", fontsize=SMALL)
        axes.set_yticks(range(len(layers)), layers, fontsize=SMALL)
        axes.tick_params(axis="x", labelsize=SMALL, labeltop=len(layers) > 25)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="0.85", zorder=0)
        for y in range(1, len(layers)):
            axes.axhline(y - 0.5, color="0.92", linewidth=0.6, zorder=1)
    return figure


def bandwidth(record: Record) -> Figure | None:
    """GB/s against bytes, a panel per mode, with the roofs and the size of the L2 cache."""
    rows = record.ops
    if not rows:
        return None
    modes, styles = distinct(row.mode for row in rows), marks(row.provider for row in rows)
    roofs = {kind: rate for kind in ROOFS if (rate := record.roof(kind)) is not None}
    handles: list[Artist] = [
        *(Line2D([], [], linestyle="", label=name, **style) for name, style in styles.items()),
        *(line(f"{kind} {number(rate)} GB/s", ROOFS[kind]) for kind, rate in roofs.items()),
    ]
    l2 = record.environment["gpu"]["l2_bytes"]
    if l2:
        handles.append(Line2D([], [], color="0.8", linewidth=4, label=f"L2 {l2 / 2**20:g} MiB"))
    sizes = [row.bytes for row in rows] + ([l2] if l2 else [])
    figure = new_figure(
        record,
        f"Bandwidth against the fewest bytes: {_common(rows)}",
        handles,
        width=1.0 + _panels(len(modes), 3.4),
        height=3.9,
    )
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        for provider, style in reversed(styles.items()):  # the first on top
            points = [(r.bytes, r.gb_s) for r in rows if (r.mode, r.provider) == (mode, provider)]
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.scatter(x, y, s=20, alpha=0.85, linewidths=0, zorder=3, **style)
        for kind, rate in roofs.items():
            axes.axhline(rate, color="black", linestyle=ROOFS[kind], linewidth=1.1, zorder=2)
        if l2:
            axes.axvline(l2, color="0.8", linewidth=4, zorder=1)
        byte_axis(axes, min(sizes), max(sizes))
        axes.set_title(mode, fontsize=SMALL + 1)
        axes.set_xlabel("bytes", fontsize=SMALL)
        axes.tick_params(labelsize=SMALL)
        axes.grid(color="0.9", zorder=0)
    panels[0].set_ylim(0, 1.06 * max([*(row.gb_s for row in rows), *roofs.values()]))
    panels[0].set_ylabel("GB/s", fontsize=SMALL)
    return figure


def speedups(record: Record) -> Figure | None:
    """How many times `OURS` is as fast as eager: channels against N*H*W, a panel per mode.

    A cell that several rows fall into shows their geometric mean.
    """
    rows = [row for row in record.ops if row.provider == OURS and row.x_eager]
    if not rows:
        return None
    modes = distinct(row.mode for row in rows)
    across = sorted({_positions(row) for row in rows})
    up = sorted({_channels(row) for row in rows})
    grids = {mode: np.full((len(up), len(across)), np.nan) for mode in modes}
    for mode, grid in grids.items():
        for y, x in np.ndindex(grid.shape):
            mean = geometric_mean(
                row.x_eager
                for row in rows
                if (row.mode, _channels(row), _positions(row)) == (mode, up[y], across[x])
            )
            grid[y, x] = math.log2(mean) if mean else np.nan
    limit = max(math.log2(1.25), *(float(np.nanmax(np.abs(grid))) for grid in grids.values()))
    panel = max(1.6, 0.55 * len(across))
    beside = max(1, min(len(modes), int(12 / panel)))
    above = math.ceil(len(modes) / beside)
    figure = new_figure(
        record,
        f"Speed-up of {OURS} over eager: {_common(rows)}",
        handles=(),
        width=max(7.0, 1.6 + panel * beside),
        height=max(2.4, 1.0 + 0.26 * len(up)) * above,
    )
    panels = figure.subplots(above, beside, sharey=True, squeeze=False).ravel()
    for axes in panels[len(modes) :]:
        axes.set_axis_off()
    for axes, (mode, grid) in zip(panels, grids.items(), strict=False):
        # Purple is faster, orange slower.
        image = axes.imshow(
            grid, cmap="PuOr", vmin=-limit, vmax=limit, origin="lower", aspect="auto"
        )
        for (y, x), value in np.ndenumerate(grid):
            if not np.isnan(value):
                colour = "white" if abs(value) > 0.6 * limit else "black"
                style = {"ha": "center", "va": "center", "fontsize": SMALL - 1, "color": colour}
                axes.text(x, y, f"{2**value:.2f}", **style)
        axes.set_facecolor("0.93")
        axes.set_title(mode, fontsize=SMALL + 1)
        axes.set_xticks(range(len(across)), [engineering(x) for x in across], fontsize=SMALL)
        axes.set_yticks(range(len(up)), [str(c) for c in up], fontsize=SMALL)
        axes.set_xlabel("N*H*W", fontsize=SMALL)
    for axes in panels[::beside]:
        axes.set_ylabel("channels", fontsize=SMALL)
    bar = figure.colorbar(image, ax=list(panels), pad=0.02, format=lambda v, _: f"{2**v:.2g}x")
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def training_steps(record: Record) -> Figure | None:
    """Forward, backward and optimizer of a training step, a bar per variant, a panel per model."""
    models: dict[str, list[ModelRow]] = {}
    for row in record.models:
        if row.mode == "training step":
            name = f"{row.model} ({row.device}, {row.dtype}, {row.layout}, {row.shape})"
            models.setdefault(name, []).append(row)
    if not models:
        return None
    used = {part for rows in models.values() for row in rows for part in _split(row)}
    handles: list[Artist] = [
        Patch(color=colour, label=part) for part, colour in PARTS.items() if part in used
    ]
    handles.append(Line2D([], [], color="k", marker="|", linestyle="", label="whole, p20 to p80"))
    heights = [0.7 + 0.3 * len(rows) for rows in models.values()]
    figure = new_figure(record, "Training step", handles, width=8.5, height=0.3 + sum(heights))
    panels = figure.subplots(len(models), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, rows) in zip(panels, models.items(), strict=True):
        eager = next((row.p50_ms for row in rows if row.variant == "eager"), None)
        for y, row in enumerate(rows):
            start = 0.0
            for part, length in _split(row).items():
                axes.barh(y, length, left=start, height=0.66, color=PARTS[part])
                start += length
            around = [[row.p50_ms - row.p20_ms], [row.p80_ms - row.p50_ms]]
            axes.errorbar(row.p50_ms, y, xerr=around, fmt="k|", markersize=9, linewidth=1)
            times = f", {eager / row.p50_ms:.2f}x" if eager and row.variant != "eager" else ""
            axes.annotate(
                f"{number(row.p50_ms)} ms{times}",
                (max(start, row.p80_ms), y),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=SMALL,
            )
        axes.set_xlim(0, 1.22 * max(max(sum(_split(row).values()), row.p80_ms) for row in rows))
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_yticks(range(len(rows)), [row.variant for row in rows], fontsize=SMALL)
        axes.tick_params(axis="x", labelsize=SMALL)
        axes.set_title(name, fontsize=SMALL + 1, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("ms", fontsize=SMALL)
    return figure


def _parts(record: Record) -> Iterator[tuple[str, Record]]:
    """The record by cache, dtype and layout, and what to append to the name of a picture."""
    keys = distinct((row.cache, row.dtype, row.layout) for row in record.ops)
    for key in keys:
        ops = [row for row in record.ops if (row.cache, row.dtype, row.layout) == key]
        several = [len({k[i] for k in keys}) > 1 for i in range(3)]
        words = [word for word, wanted in zip(key, several, strict=True) if wanted]
        yield "".join(f"-{word}" for word in words), replace(record, ops=ops)


def _panels(count: int, width: float) -> float:
    """Inches for some panels beside each other; a single one is wider."""
    return width * count if count > 1 else 5.5


def _layer(row: OpRow) -> str:
    return f"{row.op} {row.shape}"


def _common(rows: Iterable[OpRow]) -> str:
    """What the rows have in common: ``bfloat16, NHWC``."""
    values = (
        distinct(row.dtype for row in rows),
        distinct(row.layout for row in rows),
        ["warm"] if any(row.cache == "warm" for row in rows) else [],
    )
    return ", ".join("/".join(v) for v in values if v)


def _extents(row: OpRow) -> list[int]:
    """Of the shape, without the groups that follow it: ``32x320x64x64/32``."""
    return [int(extent) for extent in row.shape.split("/")[0].split("x")]


def _channels(row: OpRow) -> int:
    return _extents(row)[-1 if row.layout == "rows" else 1]  # of layer norm the last extent


def _positions(row: OpRow) -> int:
    """Elements of a channel: N*H*W."""
    return math.prod(_extents(row)) // _channels(row)


def _split(row: ModelRow) -> dict[str, float]:
    """Milliseconds of the parts of a step that are known."""
    parts = {"forward": row.forward_ms, "backward": row.backward_ms, "optimizer": row.optimizer_ms}
    known = {name: ms for name, ms in parts.items() if ms is not None}
    return known or {"not split": row.p50_ms}
