"""Pictures show the figures of the rows, and their labels can be read."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from bench.record.file import Record
from bench.report.pictures import (
    bandwidth,
    pictures,
    roof_bars,
    save_pngs,
    speedups,
    training_steps,
)
from bench.report.style import engineering, marks
from tests.bench.samples import (
    COPY,
    ENVIRONMENT,
    L2,
    PEAK,
    PROVIDERS,
    READ,
    TENSORS,
    sample,
    without_gpu,
)


def drawn(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that can be seen, and where."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [*figure.texts, *(t for legend in figure.legends for t in legend.get_texts())]
    for axes in figure.axes:
        texts += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        texts += [*labels(axes.xaxis), *labels(axes.yaxis)]
    shown = [t for t in texts if t.get_visible() and t.get_text()]
    return [(t.get_text(), t.get_window_extent(canvas.get_renderer())) for t in shown]


def labels(axis: Axis) -> list[Text]:
    low, high = sorted(axis.get_view_interval())
    inside = [t for t in axis.get_major_ticks() if low - 1e-9 <= t.get_loc() <= high + 1e-9]
    return [label for tick in inside for label in (tick.label1, tick.label2)]


def assert_readable(figure: Figure) -> None:
    texts = drawn(figure)
    whole = figure.bbox.padded(1)
    outside = [
        text for text, box in texts if not whole.containsx(box.x0) or not whole.containsx(box.x1)
    ]
    outside += [
        text for text, box in texts if not whole.containsy(box.y0) or not whole.containsy(box.y1)
    ]
    assert outside == []
    boxes = np.array([box.extents for _, box in texts]) + np.array([0.5, 0.5, -0.5, -0.5])
    apart = (boxes[:, None, 2:] <= boxes[None, :, :2]).any(-1)
    overlap = ~(apart | apart.T)
    np.fill_diagonal(overlap, False)
    assert [(texts[i][0], texts[j][0]) for i, j in np.argwhere(overlap) if i < j] == []


RECORDS = {
    "one row": lambda: sample(1, ("tritonnorm",), ("inference",), models=1),
    "three layers": lambda: sample(3, ("tritonnorm", "eager"), ("forward",)),
    "twelve layers": lambda: sample(12, list(PROVIDERS), list(TENSORS)),
    "sixty layers": lambda: sample(60, modes=("forward", "backward"), models=4),
    "warm, no peak": lambda: sample(12, peak=False, caches=("warm",)),
    "without a GPU": without_gpu,
}


@pytest.mark.parametrize("name", RECORDS)
def test_labels_can_be_read(name: str) -> None:
    found = pictures(RECORDS[name]())
    expected = {"training"} if name == "without a GPU" else {"roof", "bandwidth", "training"}
    assert expected <= set(found)
    for figure in found.values():
        assert_readable(figure)


def test_a_long_name_of_a_gpu_wraps() -> None:
    record = sample(3, modes=("forward",))
    record.environment["gpu"] = {**record.environment["gpu"], "name": "Simulated " * 12}
    for figure in pictures(record).values():
        assert_readable(figure)


def test_wide_panels_stand_below_each_other() -> None:
    record = sample(1, ("tritonnorm", "eager"), ("forward",), models=0)
    rows = [
        replace(record.ops[0], shape=f"{i}x8x9x9", mode=m) for i in range(1, 9) for m in TENSORS
    ]
    figure = speedups(replace(record, ops=rows))
    assert figure is not None and figure.get_figwidth() < 15
    assert_readable(figure)


def test_overlap_is_noticed() -> None:
    figure = Figure(figsize=(4, 3))
    figure.text(0.5, 0.5, "one label")
    figure.text(0.5, 0.51, "another label")
    with pytest.raises(AssertionError, match="another label"):
        assert_readable(figure)


def test_bars_are_the_percents() -> None:
    record = sample(6, modes=("forward", "backward"))
    figure = roof_bars(record)
    assert figure is not None
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    for axes, mode in zip(figure.axes, ("forward", "backward"), strict=True):
        bars = {
            (names[round(bar.get_y() + bar.get_height() / 2)], bar.get_facecolor()): bar.get_width()
            for bar in axes.patches
        }
        rows = [row for row in record.ops if row.mode == mode]
        colours = {
            name: matplotlib.colors.to_rgba(style["color"])
            for name, style in marks(row.provider for row in rows).items()
        }
        assert bars == {
            (f"{row.op} {row.shape}", colours[row.provider]): row.peak_percent for row in rows
        }
        dashed = [line for line in axes.lines if list(line.get_xdata()) == [100 * COPY / PEAK] * 2]
        assert len(dashed) == 1


def test_bars_without_a_peak_are_of_the_copy_roof() -> None:
    figure = roof_bars(sample(2, modes=("forward",), peak=False))
    assert figure is not None and "copy roof" in figure.texts[0].get_text()
    assert any(list(line.get_xdata()) == [100.0, 100.0] for line in figure.axes[0].lines)


def test_points_are_the_rows_and_lines_the_roofs() -> None:
    record = sample(6, modes=("forward",))
    figure = bandwidth(record)
    assert figure is not None
    (axes,) = figure.axes
    points = {tuple(point) for group in axes.collections for point in group.get_offsets()}
    assert points == {(row.bytes, row.gb_s) for row in record.ops}
    horizontal = {line.get_ydata()[0] for line in axes.lines if len({*line.get_ydata()}) == 1}
    vertical = {line.get_xdata()[0] for line in axes.lines if len({*line.get_xdata()}) == 1}
    assert horizontal == {PEAK, COPY, READ} and vertical == {L2}


def test_cells_are_speedups() -> None:
    record = sample(4, modes=("forward",))
    row = record.ops[0]
    twin = replace(row, op="BN+silu", x_eager=4 * (row.x_eager or 0))  # falls into the same cell
    figure = speedups(replace(record, ops=[*record.ops, twin]))
    assert figure is not None
    grid = 2.0 ** figure.axes[0].images[0].get_array().filled(np.nan)
    ours = [r for r in record.ops if r.provider == "tritonnorm"]
    expected = sorted([2 * (row.x_eager or 0), *(r.x_eager for r in ours if r is not row)])
    assert sorted(grid[~np.isnan(grid)]) == pytest.approx(expected)
    assert {text.get_text() for text in figure.axes[0].texts} == {f"{x:.2f}" for x in expected}


def test_cells_of_the_other_norms() -> None:
    """A shape with groups, and rows: what is across and up."""
    record = sample(1, ("tritonnorm", "eager"), modes=("forward",), models=0)
    ours, eager = record.ops
    for shape, layout, up in (("32x320x16x16/32", "NHWC", "320"), ("64x197x768", "rows", "768")):
        rows = [replace(row, shape=shape, layout=layout) for row in (ours, eager)]
        figure = speedups(replace(record, ops=rows))
        assert figure is not None
        figure.canvas.draw()
        axes = figure.axes[0]
        assert [t.get_text() for t in axes.get_yticklabels()] == [up]


def test_steps_add_up() -> None:
    record = sample(0, models=1)
    figure = training_steps(record)
    assert figure is not None
    (axes,) = figure.axes
    rows = [row for row in record.models if row.mode == "training step"]
    ends = [0.0] * len(rows)
    for bar in axes.patches:
        place = round(bar.get_y() + bar.get_height() / 2)
        assert bar.get_x() == pytest.approx(ends[place])
        ends[place] += bar.get_width()
    parts = [(r.forward_ms or r.p50_ms, r.backward_ms or 0, r.optimizer_ms or 0) for r in rows]
    assert ends == pytest.approx([sum(part) for part in parts])
    assert axes.texts[1].get_text().endswith(f" ms, {rows[0].p50_ms / rows[1].p50_ms:.2f}x")


def test_pictures_that_have_nothing_to_show_are_not_there() -> None:
    empty = Record(ENVIRONMENT)
    assert [roof_bars(empty), bandwidth(empty), speedups(empty), training_steps(empty)] == [
        None
    ] * 4
    assert pictures(empty) == {}
    assert set(pictures(sample(2, ("eager",), models=0))) == {"roof", "bandwidth"}


def test_a_picture_per_dtype_layout_and_cache(tmp_path: Path) -> None:
    record = sample(
        2, modes=("forward",), dtypes=("bfloat16", "float32"), caches=("cold", "warm"), models=1
    )
    before = dict(matplotlib.rcParams)
    paths = save_pngs(record, tmp_path / "new")
    assert dict(matplotlib.rcParams) == before
    suffixes = [
        f"{cache}-{dtype}" for cache in ("cold", "warm") for dtype in ("bfloat16", "float32")
    ]
    names = {f"{kind}-{s}.png" for kind in ("roof", "bandwidth", "speedup") for s in suffixes}
    assert {path.name for path in paths} == names | {"training.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_providers_can_be_told_apart() -> None:
    styles = marks(["compile", *PROVIDERS])
    assert list(styles)[:3] == ["tritonnorm", "eager", "compile"] and len(styles) == len(PROVIDERS)
    for one, other in combinations(styles.values(), 2):
        assert one["color"] != other["color"] and one["marker"] != other["marker"]


@pytest.mark.parametrize(
    ("x", "text"), [(49, "49"), (401408, "401k"), (1568, "1.57k"), (4194304, "4.19M"), (1e9, "1G")]
)
def test_engineering(x: float, text: str) -> None:
    assert engineering(x) == text
