"""Convergence: steps to a given accuracy with and without batch norm, over learning rates."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from bench.study import models
from bench.study.data import Images
from bench.study.look import COLOURS, MARKERS, figure, legend, percent, spread
from bench.study.training import Tick, Verdict, paired, train

NAME = "convergence"
TITLE = "Convergence: steps to a given accuracy"
ABOUT = (
    "Plain SGD in batches of 64, over learning rates. The MLP is that of Ioffe and Szegedy (2015), "
    "section 4.1: three layers of 100 sigmoids. The weights start as PyTorch makes them; a start "
    "made for sigmoids would help the MLP without batch norm. Steps count until the target is "
    "reached on the test images, looked at every 10 steps."
)
RATES: dict[str, tuple[float, ...]] = {
    "MLP": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    "CNN": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
}
QUICK_RATES: dict[str, tuple[float, ...]] = {"MLP": (0.1, 1.0, 3.0), "CNN": (0.1, 0.3)}
STEPS, QUICK_STEPS = 1500, 200
BATCH = 64


def _rates(quick: bool) -> dict[str, tuple[float, ...]]:
    return QUICK_RATES if quick else RATES


def units(quick: bool) -> int:
    return 2 * sum(map(len, _rates(quick).values()))


def measure(
    images: Images, seed: int, quick: bool, device: str, tick: Tick
) -> list[dict[str, Any]]:
    """Train both networks with and without at every rate, with plain SGD, until the target."""
    parts = images.split(seed)
    x, v, t = (p.to(device) for p in (parts.x, parts.validation_x, parts.test_x))
    y, vy, ty = (p.to(device) for p in (parts.y, parts.validation_y, parts.test_y))
    classes = len(images.classes)
    rows = []
    for network, rates in _rates(quick).items():
        for norm in ("batch", "none"):
            for rate in rates:
                tick(f"{network}, {norm}, rate {rate:g}")
                torch.manual_seed(seed)
                if network == "MLP":
                    net = models.mlp(x[0].numel(), classes, norm).to(device)
                else:
                    net = models.cnn(x.shape[1], classes, norm).to(device)
                optimizer = torch.optim.SGD(net.parameters(), lr=rate)
                run = train(
                    net, optimizer, (x,), y, ((v,), vy), ((t,), ty),
                    steps=QUICK_STEPS if quick else STEPS, batch=BATCH, seed=seed,
                    target=images.target, stop=True,
                )  # fmt: skip
                best = max(a for _, a in run.curve)
                rows.append(
                    {
                        "network": network,
                        "norm": norm,
                        "rate": rate,
                        "seed": seed,
                        "steps": run.steps,
                        "best": best,
                        "target": images.target,
                        "limit": QUICK_STEPS if quick else STEPS,
                    }
                )
    return rows


def _cells(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per network, norm and rate: share of the repeats that got there, and their steps."""
    grouped = frame.groupby(["network", "norm", "rate"], sort=False)
    return grouped.agg(
        reached=("steps", lambda s: float((s < math.inf).mean())),
        mean=("steps", lambda s: float(s.mean())),  # infinite if one did not get there
        std=("steps", lambda s: float(s[s < math.inf].std(ddof=1))),
        best=("best", "mean"),
    ).reset_index()


def table(frame: pd.DataFrame) -> pd.DataFrame:
    cells = _cells(frame)
    repeats = frame["seed"].nunique()
    out = []
    for (network, rate), group in cells.groupby(["network", "rate"], sort=False):
        row = {"network": network, "rate": f"{rate:g}"}
        for norm, title in (("batch", "with BN"), ("none", "without")):
            cell = group[group["norm"] == norm].iloc[0]
            row[f"steps {title}"] = (
                spread(cell["mean"], cell["std"], 0)
                if cell["reached"] == 1.0
                else f"{round(cell['reached'] * repeats)} of {repeats} runs got there"
                if cell["reached"]
                else f"never (best {percent(cell['best'])})"
            )
        out.append(row)
    return pd.DataFrame(out)


def verdicts(frame: pd.DataFrame) -> list[Verdict]:
    cells, target = _cells(frame), percent(frame["target"].iloc[0], 0)
    limit, repeats = int(frame["limit"].iloc[0]), frame["seed"].nunique()
    found = []
    for network in cells["network"].unique():
        own = cells[cells["network"] == network]
        best: dict[str, pd.Series] = {}
        reach = {}
        for norm in ("batch", "none"):
            of = own[own["norm"] == norm]
            reach[norm] = int((of["reached"] == 1.0).sum())
            if reach[norm]:
                best[norm] = of.loc[of["mean"].idxmin()]
        rates = len(own["rate"].unique())
        wide = (
            f"{target} were reached at {reach['batch']} of {rates} rates with batch norm and at "
            f"{reach['none']} without"
        )
        claim = (
            f"batch norm makes {'an' if network == 'MLP' else 'a'} {network} learn in fewer steps, "
            "over more learning rates (Ioffe and Szegedy, 2015)"
        )
        if len(best) < 2:
            held = "batch" in best if best else None
            text = ", ".join(
                f"{word} {_most(own, norm, repeats, limit)}"
                for norm, word in (("batch", "with batch norm"), ("none", "without"))
            )
            found.append(Verdict(claim, held, f"{network}: {text}; in all runs {wide}."))
            continue
        steps = {
            norm: frame[
                (frame["network"] == network)
                & (frame["norm"] == norm)
                & (frame["rate"] == cell["rate"])
            ].set_index("seed")["steps"]
            for norm, cell in best.items()
        }
        difference = paired(steps["none"], steps["batch"])
        sooner, wider = difference.sign > 0, reach["batch"] >= reach["none"]
        held = True if sooner and wider else None if difference.sign == 0 else False
        text = " and ".join(
            f"{spread(cell['mean'], cell['std'], 0)} steps {word} (rate {cell['rate']:g})"
            for (_, cell), word in zip(best.items(), ("with", "without"), strict=True)
        )
        ratio = best["none"]["mean"] / best["batch"]["mean"]
        found.append(
            Verdict(
                claim,
                held,
                f"{network}: at the best rate of each {text}, {ratio:.1f} times as many without; "
                f"{wide}.",
            )
        )
    return found


def _most(own: pd.DataFrame, norm: str, repeats: int, limit: int) -> str:
    """How many runs got there at the best rate, and in how many steps if all did."""
    of = own[own["norm"] == norm]
    if of["reached"].max() == 1.0:
        cell = of.loc[of["mean"].idxmin()]
        return f"{spread(cell['mean'], cell['std'], 0)} steps at the best rate ({cell['rate']:g})"
    cell = of.loc[of["reached"].idxmax()]
    runs = f"{round(cell['reached'] * repeats)} of {repeats} runs"
    return f"no rate brought all runs there in {limit} steps (at best {runs})"


def draw(frame: pd.DataFrame, about: str) -> Figure:
    cells = _cells(frame)
    networks = list(cells["network"].unique())
    target, limit = percent(frame["target"].iloc[0], 0), int(frame["limit"].iloc[0])
    repeats = frame["seed"].nunique()
    fig, panels = figure(
        f"Steps of SGD until {target} of the test images are right",
        f"{about}; mean and standard deviation of {repeats} runs; lower is better",
        1,
        len(networks),
        width=9.0,
        height=3.4,
    )
    for axes, network in zip(panels[0], networks, strict=True):
        rates = sorted(cells[cells["network"] == network]["rate"].unique())
        for norm, label in (("batch", "with batch norm"), ("none", "without")):
            of = cells[(cells["network"] == network) & (cells["norm"] == norm)].sort_values("rate")
            there = of[of["reached"] == 1.0]
            axes.errorbar(
                there["rate"], there["mean"], yerr=there["std"].fillna(0.0), label=label, capsize=3,
                color=COLOURS[norm], marker=MARKERS[norm], linewidth=1.8, markersize=6,
            )  # fmt: skip
            missed = of[of["reached"] < 1.0]
            shift = 1.06 if norm == "batch" else 0.94
            axes.plot(
                missed["rate"] * shift, [limit * 1.35] * len(missed), marker="x", linestyle="",
                color=COLOURS[norm], markersize=8, markeredgewidth=2,
            )  # fmt: skip
        axes.axhline(limit, color="0.5", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(
            f"x: not all runs got there in {limit} steps", (0.02, limit * 1.9), fontsize=8,
            xycoords=("axes fraction", "data"), color="0.3", va="bottom",
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(top=limit * 3)
        axes.set_xticks(rates, [f"{r:g}" for r in rates])
        axes.minorticks_off()
        ticks = [s for s in (5, 10, 20, 50, 100, 200, 500, 1000, 2000) if s <= limit]
        axes.set_yticks(ticks, [f"{s:,}" for s in ticks])
        axes.set_xlabel("learning rate")
        kind = "three layers of 100 sigmoids" if network == "MLP" else "three convolutions, ReLU"
        axes.set_title(f"{network}: {kind}", fontsize=10)
    panels[0][0].set_ylabel("steps")
    legend(fig, panels[0][0])
    return fig
