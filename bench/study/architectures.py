"""Architectures: batch norm in a recurrent network and a transformer, on masked sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from bench.study import models
from bench.study.data import Images, sequences
from bench.study.look import COLOURS, LABELS, figure, legend, percent, spread
from bench.study.training import Tick, Verdict, chosen, paired, train

NAME = "architectures"
TITLE = "Architectures: a recurrent network and a transformer"
ABOUT = (
    "Images are read as sequences of 16 patches without the blank ones, so their lengths differ "
    "(7 to 16 for digits) and the rest is padding. The LSTM has batch norm by time step (Cooijmans "
    "et al., 2016), the transformer masked batch norm; neither sees the padding. Adam, at the "
    "better of two learning rates by validation accuracy."
)
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "LSTM": models.lstm,
    "transformer": models.transformer,
}
NORMS = ("batch", "layer", "none")
RATES, QUICK_RATES = (3e-3, 1e-2), (1e-2,)
STEPS, QUICK_STEPS = 300, 40
BATCH, EVERY = 64, 20
#: Below that of the images themselves: patches in reading order are harder.
TARGET = 0.9


def units(quick: bool) -> int:
    return len(NETWORKS) * len(NORMS) * len(QUICK_RATES if quick else RATES)


def measure(
    images: Images, seed: int, quick: bool, device: str, tick: Tick
) -> list[dict[str, Any]]:
    """Train both networks with each norm at each rate, with Adam."""
    parts = images.split(seed)
    x, v, t = (sequences(p.to(device)) for p in (parts.x, parts.validation_x, parts.test_x))
    y, vy, ty = (p.to(device) for p in (parts.y, parts.validation_y, parts.test_y))
    target = min(TARGET, images.target)
    rows = []
    for network, build in NETWORKS.items():
        for norm in NORMS:
            for rate in QUICK_RATES if quick else RATES:
                tick(f"{network}, {norm}, rate {rate:g}")
                torch.manual_seed(seed)
                net = build(x.x.shape[2], len(images.classes), norm).to(device)
                run = train(
                    net, torch.optim.Adam(net.parameters(), lr=rate), (x.x, x.lengths), y,
                    ((v.x, v.lengths), vy), ((t.x, t.lengths), ty),
                    steps=QUICK_STEPS if quick else STEPS, batch=BATCH, seed=seed, every=EVERY,
                    target=target,
                )  # fmt: skip
                rows += [
                    {
                        "network": network,
                        "norm": norm,
                        "rate": rate,
                        "seed": seed,
                        "step": step,
                        "accuracy": right,
                        "steps": run.steps,
                        "target": target,
                        "validation": run.validation,
                        "test": run.test,
                    }
                    for step, right in run.curve
                ]
    return rows


def _best(frame: pd.DataFrame) -> pd.DataFrame:
    return chosen(frame, ["network", "norm"])


def _ends(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per network, norm and seed at the chosen rate."""
    best = _best(frame)
    return best[best["step"] == best["step"].max()]


def table(frame: pd.DataFrame) -> pd.DataFrame:
    ends, target = _ends(frame), percent(frame["target"].iloc[0], 0)
    repeats = frame["seed"].nunique()
    out = []
    for (network, norm), group in ends.groupby(["network", "norm"], sort=False):
        reached = group["steps"][group["steps"] < math.inf]
        steps = spread(reached.mean(), reached.std(ddof=1), 0) if len(reached) else "never"
        if 0 < len(reached) < repeats:
            steps += f" ({len(reached)} of {repeats} runs)"
        out.append(
            {
                "network": network,
                "norm": LABELS[norm],
                "rate": f"{group['rate'].iloc[0]:g}",
                f"steps to {target}": steps,
                "test accuracy (%)": spread(
                    group["test"].mean(), group["test"].std(ddof=1), 1, 100
                ),
            }
        )
    return pd.DataFrame(out)


def verdicts(frame: pd.DataFrame) -> list[Verdict]:
    ends, target = _ends(frame), percent(frame["target"].iloc[0], 0)

    def of(network: str, norm: str, what: str) -> pd.Series:
        own = ends[(ends["network"] == network) & (ends["norm"] == norm)]
        return own.set_index("seed")[what]

    found = []
    fast, slow = (of("LSTM", norm, "steps") for norm in ("batch", "none"))
    text = f"{target} took {_steps(fast)} with recurrent batch norm and {_steps(slow)} without"
    accuracies = " and ".join(
        f"{percent(of('LSTM', norm, 'test').mean())} {word}"
        for norm, word in (("batch", "with"), ("none", "without"))
    )
    sooner = paired(_finite(slow), _finite(fast)).sign
    if fast.max() < math.inf == slow.max():
        sooner = 1
    if slow.max() < math.inf == fast.max():
        sooner = -1
    held = {1: True, 0: None, -1: False}
    found.append(
        Verdict(
            "batch norm with statistics for each time step makes an LSTM learn faster (Cooijmans "
            "et al., 2016)",
            held[sooner],
            f"LSTM: {text}; test accuracy {accuracies}.",
        )
    )
    one, two = (of("transformer", norm, "test") for norm in ("layer", "batch"))
    difference = paired(one, two)
    found.append(
        Verdict(
            "in a transformer layer norm is better than batch norm (Shen et al., 2020)",
            held[difference.sign],
            f"transformer: test accuracy {percent(one.mean())} with layer norm and "
            f"{percent(two.mean())} with masked batch norm, a difference of "
            f"{100 * difference.mean:+.1f} ± {100 * difference.half:.1f} points (95 % interval).",
        )
    )
    one, two = (of("transformer", norm, "test") for norm in ("batch", "none"))
    difference = paired(one, two)
    found.append(
        Verdict(
            "a transformer needs normalization",
            held[difference.sign],
            f"transformer: test accuracy {percent(one.mean())} with masked batch norm and "
            f"{percent(two.mean())} without any, a difference of {100 * difference.mean:+.1f} ± "
            f"{100 * difference.half:.1f} points (95 % interval).",
        )
    )
    return found


def _finite(steps: pd.Series) -> pd.Series:
    return steps.where(steps < math.inf)


def _steps(steps: pd.Series) -> str:
    there = steps[steps < math.inf]
    if not len(there):
        return "more steps than there were"
    some = f" in {len(there)} of {len(steps)} runs" if len(there) < len(steps) else ""
    return f"{spread(there.mean(), there.std(ddof=1), 0)} steps{some}"


def draw(frame: pd.DataFrame, about: str) -> Figure:
    best = _best(frame)
    repeats = frame["seed"].nunique()
    fig, panels = figure(
        "Images read as sequences of patches: test accuracy while training",
        f"{about}; Adam, rate chosen on validation images; line: mean of {repeats} runs; band: std",
        *(1, len(NETWORKS)),
        width=9.0,
        height=3.5,
        sharey=True,
    )
    titles = {
        "LSTM": "LSTM (batch norm by time step)",
        "transformer": "transformer (masked batch norm)",
    }
    for axes, network in zip(panels[0], NETWORKS, strict=True):
        for norm in NORMS:
            own = best[(best["network"] == network) & (best["norm"] == norm)]
            by = own.groupby("step")["accuracy"]
            mean, std = 100 * by.mean(), 100 * by.std(ddof=1).fillna(0.0)
            axes.plot(mean.index, mean, color=COLOURS[norm], label=LABELS[norm], linewidth=1.8)
            axes.fill_between(
                np.asarray(mean.index, float), mean - std, mean + std, color=COLOURS[norm],
                alpha=0.2, linewidth=0,
            )  # fmt: skip
        axes.set_title(titles[network], fontsize=10)
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
    panels[0][0].set_ylabel("right answers on the test images (%)")
    legend(fig, panels[0][0])
    return fig
