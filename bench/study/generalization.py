"""Generalization: small training sets and small batches, batch norm against other norms."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from bench.study import models
from bench.study.data import Images, Parts
from bench.study.look import COLOURS, LABELS, MARKERS, figure, legend, percent, spread
from bench.study.training import Run, Tick, Verdict, chosen, paired, train

NAME = "generalization"
TITLE = "Generalization: small training sets and small batches"
ABOUT = (
    "A CNN of three convolutions, SGD with momentum 0.9, at the better of two learning rates by "
    "validation accuracy. Left, few training images; right, few images for a step, with as many "
    "passes over the images for each (100 steps at least)."
)
SIZES, QUICK_SIZES = (50, 100, 200, 500), (50, 200)
BATCHES, QUICK_BATCHES = (2, 4, 8, 16, 32, 64), (2, 32)
RATES, QUICK_RATES = (0.01, 0.05), (0.05,)
MOMENTUM = 0.9
SET_BATCH, SET_STEPS, QUICK_SET_STEPS = 16, 200, 60
# As many passes for every batch, but no fewer steps than it takes to learn anything.
BATCH_IMAGES, BATCH_EPOCHS, LEAST = 300, 4, 100
QUICK_BATCH_IMAGES, QUICK_BATCH_EPOCHS, QUICK_LEAST = 100, 2, 30


def units(quick: bool) -> int:
    sizes, batches, rates = (
        (QUICK_SIZES, QUICK_BATCHES, QUICK_RATES) if quick else (SIZES, BATCHES, RATES)
    )
    return len(models.NORMS) * len(rates) * (len(sizes) + len(batches))


def measure(
    images: Images, seed: int, quick: bool, device: str, tick: Tick
) -> list[dict[str, Any]]:
    """Train the CNN with each norm on few images, then in small batches, at three rates."""
    parts = images.split(seed)
    rows = []
    sizes, batches = (QUICK_SIZES, QUICK_BATCHES) if quick else (SIZES, BATCHES)
    epochs = QUICK_BATCH_EPOCHS if quick else BATCH_EPOCHS
    few = min(QUICK_BATCH_IMAGES if quick else BATCH_IMAGES, len(parts.y))
    for norm in models.NORMS:
        for rate in QUICK_RATES if quick else RATES:
            about = {"norm": norm, "rate": rate, "seed": seed}
            for size in (s for s in sizes if s <= len(parts.y)):
                tick(f"{norm}, {size} images")
                steps = QUICK_SET_STEPS if quick else SET_STEPS
                run = _run(images, parts.first(size), norm, rate, SET_BATCH, steps, seed, device)
                rows.append({**about, "part": "images", "at": size, **_found(run)})
            for batch in batches:
                tick(f"{norm}, batches of {batch}")
                steps = max(epochs * (few // batch), QUICK_LEAST if quick else LEAST)
                run = _run(images, parts.first(few), norm, rate, batch, steps, seed, device)
                rows.append({**about, "part": "batch", "at": batch, **_found(run)})
    return rows


def _found(run: Run) -> dict[str, float]:
    return {"validation": run.validation, "test": run.test}


def _run(
    images: Images,
    parts: Parts,
    norm: str,
    rate: float,
    batch: int,
    steps: int,
    seed: int,
    device: str,
) -> Run:
    torch.manual_seed(seed)
    net = models.cnn(parts.x.shape[1], len(images.classes), norm).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=MOMENTUM)
    x, v, t = (p.to(device) for p in (parts.x, parts.validation_x, parts.test_x))
    y, vy, ty = (p.to(device) for p in (parts.y, parts.validation_y, parts.test_y))
    return train(
        net, optimizer, (x,), y, ((v,), vy), ((t,), ty), steps=steps, batch=batch, seed=seed,
        every=0,
    )  # fmt: skip


WORDS = {"images": "training images", "batch": "images of a step"}


def table(frame: pd.DataFrame) -> pd.DataFrame:
    best = chosen(frame, ["part", "at", "norm"])
    best = best.sort_values(["part", "at"], ascending=[False, True])  # images, then batch
    out = []
    for (part, at), group in best.groupby(["part", "at"], sort=False):
        row: dict[str, Any] = {"what": WORDS[part], "": at}
        for norm in models.NORMS:
            own = group[group["norm"] == norm]["test"]
            row[LABELS[norm]] = spread(own.mean(), own.std(ddof=1), 1, 100)
        out.append(row)
    return pd.DataFrame(out)


def _compare(best: pd.DataFrame, part: str, at: int, norm: str, other: str) -> tuple[int, str]:
    """Sign of a difference in test accuracy that is outside of chance, and the difference."""
    here = best[(best["part"] == part) & (best["at"] == at)]
    one, two = (here[here["norm"] == n].set_index("seed")["test"] for n in (norm, other))
    d = paired(one, two)
    text = f"{percent(one.mean())} and {percent(two.mean())} at {at}"
    return d.sign, text


def verdicts(frame: pd.DataFrame) -> list[Verdict]:
    best = chosen(frame, ["part", "at", "norm"])
    sizes = sorted(best[best["part"] == "images"]["at"].unique())
    batches = sorted(best[best["part"] == "batch"]["at"].unique())

    def claim(text: str, part: str, ats: list[int], norm: str, other: str) -> Verdict:
        found = [_compare(best, part, at, norm, other) for at in ats]
        signs = [sign for sign, _ in found]
        held = True if min(signs) > 0 else False if max(signs) <= 0 and min(signs) < 0 else None
        if len(ats) > 1 and max(signs) > 0 and min(signs) >= 0:
            held = True
        clear = sum(s > 0 for s in signs)
        cells = "; ".join(text for _, text in found)
        where = WORDS[part]
        several = f", outside of chance in {clear} of {len(ats)} sizes" if len(ats) > 1 else ""
        pair = f"{LABELS[norm]} and {LABELS[other]} have"
        return Verdict(text, held, f"{pair} {cells} {where}{several}.")

    return [
        claim(
            "batch norm generalizes better than no normalization (Ioffe and Szegedy, 2015), here "
            "with small training sets",
            *("images", sizes, "batch", "none"),
        ),
        claim(
            "with few images for a step batch norm falls behind group norm (Wu and He, 2018)",
            *("batch", batches[:1], "group", "batch"),
        ),
        claim(
            "with many images for a step batch norm is ahead of group norm (Wu and He, 2018)",
            *("batch", batches[-1:], "batch", "group"),
        ),
    ]


def draw(frame: pd.DataFrame, about: str) -> Figure:
    best = chosen(frame, ["part", "at", "norm"])
    repeats = frame["seed"].nunique()
    fig, panels = figure(
        "Test accuracy of a CNN by normalization",
        f"{about}; mean and standard deviation of {repeats} runs; rate chosen on validation images",
        *(1, 2),
        width=9.0,
        height=3.6,
    )
    for axes, part in zip(panels[0], ("images", "batch"), strict=True):
        ats = sorted(best[best["part"] == part]["at"].unique())
        for i, norm in enumerate(models.NORMS):
            own = best[(best["part"] == part) & (best["norm"] == norm)].groupby("at")["test"]
            mean, std = 100 * own.mean(), 100 * own.std(ddof=1).fillna(0.0)
            beside = [j + 0.07 * (i - 1.5) for j in range(len(mean))]  # error bars side by side
            axes.errorbar(
                beside, mean, yerr=std, label=LABELS[norm], color=COLOURS[norm], capsize=2.5,
                marker=MARKERS[norm], linewidth=1.6, markersize=5.5,
            )  # fmt: skip
        axes.set_xticks(range(len(ats)), [str(a) for a in ats])
    few = best[best["part"] == "images"]["at"].max()
    panels[0][0].set_xlabel("training images")
    panels[0][0].set_title(f"small training sets (batches of {SET_BATCH})", fontsize=10)
    panels[0][1].set_xlabel("images of a step")
    images = QUICK_BATCH_IMAGES if few == QUICK_SIZES[-1] else BATCH_IMAGES
    panels[0][1].set_title(f"small batches ({images} training images)", fontsize=10)
    panels[0][0].set_ylabel("right answers on the test images (%)")
    legend(fig, panels[0][0])
    return fig
