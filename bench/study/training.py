"""The one training loop of the study, and the statistics of its repeats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from bench.study.data import Images

__all__ = [
    "Difference",
    "Experiment",
    "Run",
    "Tick",
    "Verdict",
    "accuracy",
    "chosen",
    "paired",
    "train",
]

Tick = Callable[[str], None]
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether a claim held. `held` is None where the repeats do not tell."""

    claim: str
    held: bool | None
    found: str

    @property
    def word(self) -> str:
        return {True: "Held", False: "Did not hold", None: "Not told apart"}[self.held]

    def __str__(self) -> str:
        return f"{self.word}: {self.found} (The claim: {self.claim}.)"


class Experiment(Protocol):
    """What each experiment is, a module: `bench.study.convergence` and so on."""

    NAME: str
    TITLE: str
    ABOUT: str

    def units(self, quick: bool) -> int:
        """How often `measure` ticks for a seed."""

    def measure(
        self, images: Images, seed: int, quick: bool, device: str, tick: Tick
    ) -> list[dict[str, Any]]:
        """The rows of one repeat."""

    def table(self, frame: pd.DataFrame) -> pd.DataFrame:
        """What is printed: cells of text."""

    def verdicts(self, frame: pd.DataFrame) -> list[Verdict]:
        """Whether the claims held."""

    def draw(self, frame: pd.DataFrame, about: str) -> Figure:
        """The picture; ``about`` says on what data."""


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        steps: steps until the target was reached, infinite if it was not.
        curve: (step, test accuracy), in order.
        validation, test: accuracies at the end.
    """

    steps: float
    curve: tuple[tuple[int, float], ...]
    validation: float
    test: float


def accuracy(net: nn.Module, inputs: Inputs, y: Tensor) -> float:
    """Share of right answers, from 0 to 1, in eval mode; a NaN is a wrong answer."""
    net.eval()
    with torch.no_grad():
        logits = net(*inputs)
    right = (logits.argmax(1) == y) & logits.isfinite().all(1)
    return float(right.double().mean())


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Inputs,
    y: Tensor,
    validation: tuple[Inputs, Tensor],
    test: tuple[Inputs, Tensor],
    *,
    steps: int,
    batch: int,
    seed: int,
    every: int = 10,
    target: float | None = None,
    stop: bool = False,
) -> Run:
    """Minimize the cross-entropy.

    Args:
        net: called with a batch of ``inputs``.
        optimizer: of its parameters.
        inputs, y: training set.
        validation: set that rates are chosen by.
        test: set that is reported.
        steps: the most steps. Each pass goes through the set in a new order, in whole batches.
        batch: samples of a step.
        seed: of the order.
        every: steps between two looks at the test accuracy; 0 looks only at the end.
        target: accuracy whose first reach is noted.
        stop: end there, or when a loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, len(y))
    order: list[Tensor] = []
    curve: list[tuple[int, float]] = []
    reached = math.inf
    for step in range(1, steps + 1):
        if not order:
            shuffled = torch.randperm(len(y), generator=generator).to(y.device)
            order = list(shuffled.split(batch)[: len(y) // batch])
        at = order.pop()
        net.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(net(*(t[at] for t in inputs)), y[at])
        loss.backward()
        optimizer.step()
        if every and step % every == 0:
            curve.append((step, accuracy(net, *test)))
            if target is not None and curve[-1][1] >= target and reached == math.inf:
                reached = step
            if stop and (reached < math.inf or not math.isfinite(float(loss.detach()))):
                break
    return Run(reached, tuple(curve), accuracy(net, *validation), accuracy(net, *test))


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, and the half width of its 95 % interval (Student's t)."""

    mean: float
    half: float

    @property
    def sign(self) -> int:
        """1 or -1 if the interval lies on one side of zero, else 0."""
        return (
            0
            if abs(self.mean) <= self.half or math.isnan(self.half)
            else int(math.copysign(1, self.mean))
        )


def paired(a: pd.Series, b: pd.Series) -> Difference:
    """``a - b`` by index, which is the seed."""
    from scipy.stats import t

    d = (a - b).dropna()
    if len(d) < 2:
        return Difference(float(d.mean()) if len(d) else math.nan, math.nan)
    half = float(t.ppf(0.975, len(d) - 1)) * float(d.std(ddof=1)) / math.sqrt(len(d))
    return Difference(float(d.mean()), half)


def chosen(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Of each group the rows at the rate with the best mean validation accuracy."""
    means = frame.groupby([*by, "rate"], sort=False)["validation"].mean().reset_index()
    best = means.loc[means.groupby(by, sort=False)["validation"].idxmax(), [*by, "rate"]]
    return frame.merge(best, on=[*by, "rate"])
