"""Internal covariate shift: mean and std of each layer's inputs over training."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from bench.study import models
from bench.study.data import Images
from bench.study.look import COLOURS, LABELS, figure, legend, percent, spread
from bench.study.training import Tick, Verdict, paired, train

NAME = "shift"
TITLE = "Internal covariate shift: the inputs of each layer over training"
ABOUT = (
    "The inputs of the layers of the sigmoid MLP, measured every 20 steps on the same 256 training "
    "images: mean and standard deviation of each unit, then averaged over units. The way of the "
    "means adds up how far they moved between two looks, in standard deviations at the earlier "
    "one. With batch norm the network normalizes what enters a sigmoid, so part of this holds by "
    "construction; and a unit that hardly varies travels far by a small step."
)
LAYERS = 3
# With batch norm any of the rates of `convergence` would do; without it the network only learns
# at this one.
RATE = 3.0
STEPS, QUICK_STEPS, EVERY = 1500, 200, 20
BATCH, PROBE = 64, 256


def units(quick: bool) -> int:
    return 2


def measure(
    images: Images, seed: int, quick: bool, device: str, tick: Tick
) -> list[dict[str, Any]]:
    """Train the sigmoid network with and without, and look at the inputs of its layers.

    They are measured on the same training images each time, as training sees them: batch norm with
    the statistics of the batch. Layer 1 reads pixels, which do not change, and is left out.
    """
    parts = images.split(seed)
    x, v, t = (p.to(device) for p in (parts.x, parts.validation_x, parts.test_x))
    y, vy, ty = (p.to(device) for p in (parts.y, parts.validation_y, parts.test_y))
    steps = QUICK_STEPS if quick else STEPS
    rows = []
    for norm in ("batch", "none"):
        tick(norm)
        torch.manual_seed(seed)
        net = models.mlp(x[0].numel(), len(images.classes), norm).to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
        before = _moments(net, x[:PROBE])
        path = [0.0] * len(before)
        for done in range(0, steps + 1, EVERY):
            if done:
                run = train(
                    net, optimizer, (x,), y, ((v,), vy), ((t,), ty), steps=EVERY, batch=BATCH,
                    seed=1000 * seed + done, every=0,
                )  # fmt: skip
            now = _moments(net, x[:PROBE])
            for i, ((mean, std), (old, old_std)) in enumerate(zip(now, before, strict=True)):
                moved = (mean - old).abs() / old_std.clamp(min=1e-6)
                path[i] += float(moved.mean()) if done else 0.0
                rows.append(
                    {
                        "norm": norm,
                        "seed": seed,
                        "layer": i + 2,
                        "step": done,
                        "mean": float(mean.mean()),
                        "std": float(std.mean()),
                        "path": path[i],
                        "test": run.test if done else math.nan,
                    }
                )
            before = now
    return rows


def _moments(net: nn.Sequential, probe: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and standard deviation of each unit that enters a linear layer, but for the first."""
    found = []
    x = probe
    with torch.no_grad():
        for part in copy.deepcopy(net).train():  # a copy, whose running statistics may move
            if isinstance(part, nn.Linear):
                found.append((x.mean(0), x.std(0)))
            x = part(x)
    return found[1:]


def _ends(frame: pd.DataFrame) -> pd.DataFrame:
    """Per norm, layer and seed: first and last mean and std, and how far the means travelled."""
    first = frame[frame["step"] == 0].set_index(["norm", "layer", "seed"])
    last = frame[frame["step"] == frame["step"].max()].set_index(["norm", "layer", "seed"])
    columns = {f"{c} {n}": f[c] for c in ("mean", "std") for n, f in (("0", first), ("1", last))}
    return pd.DataFrame({**columns, "path": last["path"], "test": last["test"]})


def table(frame: pd.DataFrame) -> pd.DataFrame:
    ends = _ends(frame)
    out = []
    for (norm, layer), group in ends.groupby(level=["norm", "layer"]):
        cells = {c: spread(group[c].mean(), group[c].std(ddof=1), 3) for c in list(ends)[:4]}
        out.append(
            {
                "norm": LABELS[norm],
                "layer": layer,
                "mean: first": cells["mean 0"],
                "last": cells["mean 1"],
                "std: first": cells["std 0"],
                "last ": cells["std 1"],
                "way of the means (stds)": spread(
                    group["path"].mean(), group["path"].std(ddof=1), 1
                ),
            }
        )
    return pd.DataFrame(out)


def verdicts(frame: pd.DataFrame) -> list[Verdict]:
    ends = _ends(frame)
    path = ends["path"].groupby(level=["norm", "seed"]).mean()
    std = ends["std 0"].groupby(level=["norm", "seed"]).mean()
    test = ends["test"].groupby(level="norm").mean()
    steps, layers = int(frame["step"].max()), len(frame["layer"].unique())
    less = paired(path["none"], path["batch"])
    wide = paired(std["batch"], std["none"])
    reached = " and ".join(
        f"{percent(test[n])} {word}" for n, word in (("batch", "with"), ("none", "without"))
    )
    held = {1: True, -1: False, 0: None}
    return [
        Verdict(
            "batch norm keeps the distribution of each layer's inputs from moving while the "
            "network trains (Ioffe and Szegedy, 2015; Santurkar et al., 2018, doubt that this is "
            "why it helps)",
            held[less.sign],
            f"over {steps} steps the means of the inputs of layers 2 to {layers + 1} travelled "
            f"{spread(path['batch'].mean(), path['batch'].std(ddof=1))} of their own standard "
            f"deviations with batch norm and "
            f"{spread(path['none'].mean(), path['none'].std(ddof=1))} without (test accuracy "
            f"{reached}).",
        ),
        Verdict(
            "batch norm keeps signals from fading in a deep network",
            held[wide.sign],
            f"before training, the inputs of a layer have a standard deviation of "
            f"{spread(std['batch'].mean(), std['batch'].std(ddof=1), 3)} with batch norm and "
            f"{spread(std['none'].mean(), std['none'].std(ddof=1), 3)} without.",
        ),
    ]


def draw(frame: pd.DataFrame, about: str) -> Figure:
    layers = sorted(frame["layer"].unique())
    repeats = frame["seed"].nunique()
    fig, panels = figure(
        "What enters each layer while a sigmoid network trains, with and without batch norm",
        f"{about}; SGD, rate {RATE:g}; mean over units and {repeats} runs; band: std over runs",
        2,
        len(layers),
        width=9.6,
        height=4.6,
        sharex=True,
        sharey="row",
    )
    for row, what in enumerate(("mean", "std")):
        for axes, layer in zip(panels[row], layers, strict=True):
            for norm, label in (("batch", "with batch norm"), ("none", "without")):
                own = frame[(frame["layer"] == layer) & (frame["norm"] == norm)]
                by = own.groupby("step")[what]
                mean, std = by.mean(), by.std(ddof=1).fillna(0.0)
                axes.plot(mean.index, mean, color=COLOURS[norm], label=label, linewidth=1.8)
                axes.fill_between(
                    np.asarray(mean.index, float), mean - std, mean + std, color=COLOURS[norm],
                    alpha=0.25, linewidth=0,
                )  # fmt: skip
            if row == 0:
                name = "the classifier" if layer == layers[-1] else f"hidden layer {layer}"
                axes.set_title(f"inputs of {name}", fontsize=10)
            else:
                axes.set_xlabel("step")
    panels[0][0].set_ylabel("mean of a unit")
    panels[1][0].set_ylabel("std of a unit")
    legend(fig, panels[0][0])
    return fig
