"""Part 2: handwritten digits, the same network trained with and without batch norm.

The network is the one of Ioffe and Szegedy (2015), section 4.1, smaller: fully connected layers
with sigmoids. The data are the 1797 handwritten digits of 8x8 pixels that scikit-learn ships (UCI
ML, Alpaydin and Kaynak).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonnorm
from bench.demo.tiles import interpreted, wide_tiles
from bench.launches import Launches, observe
from bench.processes import Progress, silent

__all__ = ["Curve", "DigitsResult", "Settings", "draw", "run"]

WITH, TORCH, WITHOUT = "with BN (tritonnorm)", "with BN (PyTorch)", "without BN"


@dataclass(frozen=True)
class Settings:
    """How the networks are trained; all alike.

    Attributes:
        layers, width: hidden layers, and features of each.
        epochs, batch: passes over the training set, images of a step.
        rate: learning rate of plain SGD.
        seed: of the split, the weights and the order of the images.
    """

    layers: int = 2
    width: int = 64
    epochs: int = 10
    batch: int = 128
    rate: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Curve:
    """Accuracy on the test set, from 0 to 1: before training, then after each epoch."""

    name: str
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class DigitsResult:
    """What part 2 found: curves, sizes of the sets, what computed this library's batch norms.

    `wide_tiles`: the kernels ran with tiles wider than the plan's.
    """

    settings: Settings
    training_images: int
    test_images: int
    curves: tuple[Curve, ...]
    launches: Launches
    wide_tiles: bool


@dataclass(frozen=True)
class _Data:
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def run(
    progress: Progress = silent, device: str = "cpu", settings: Settings | None = None
) -> DigitsResult:
    """Train three networks from the same weights on the same batches.

    With this library's batch norms, with PyTorch's, and without. Kernels need the interpreter on
    "cpu".
    """
    settings = settings or Settings()
    total = settings.epochs + 2
    progress(0, total, "reading the digits")
    data = _load(settings, device)
    curves = []
    for i, norm in enumerate((nn.BatchNorm1d, None)):
        name = TORCH if norm else WITHOUT
        progress(i, total, f"training {name}")
        curves.append(Curve(name, _train(_network(norm, settings, device), data, settings)))
    net = _network(tritonnorm.BatchNorm1d, settings, device)

    def begun(epoch: int) -> None:
        progress(2 + epoch, total, f"training {WITH}")

    with wide_tiles(device, settings.width, settings.batch), observe() as launches:
        ours = _train(net, data, settings, begun)
    progress(total, total)
    return DigitsResult(
        settings,
        len(data.y),
        len(data.test_y),
        (Curve(WITH, ours), *curves),
        launches,
        interpreted(device),
    )


def _load(settings: Settings, device: str) -> _Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        images / 16.0, labels, test_size=0.25, stratify=labels, random_state=settings.seed
    )
    x, test_x, y, test_y = (torch.as_tensor(part, device=device) for part in parts)
    return _Data(x.float(), y.long(), test_x.float(), test_y.long())


def _network(norm: type[nn.Module] | None, settings: Settings, device: str) -> nn.Module:
    """Linear, batch norm (or none), sigmoid; ``layers`` times, then the classifier."""
    torch.manual_seed(settings.seed)
    layers: list[nn.Module] = []
    features = 64
    for _ in range(settings.layers):
        layers.append(nn.Linear(features, settings.width))
        features = settings.width
        if norm is tritonnorm.BatchNorm1d:
            layers.append(tritonnorm.BatchNorm1d(features, activation="sigmoid"))
        else:
            layers += [*([norm(features)] if norm else []), nn.Sigmoid()]
    layers.append(nn.Linear(features, 10))
    return nn.Sequential(*layers).to(device)


def _train(
    net: nn.Module,
    data: _Data,
    settings: Settings,
    begun: Callable[[int], None] = lambda epoch: None,
) -> tuple[float, ...]:
    order = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=settings.rate)
    accuracy = [_accuracy(net, data)]
    for epoch in range(settings.epochs):
        begun(epoch)
        net.train()
        shuffled = torch.randperm(len(data.y), generator=order).to(data.y.device)
        # The last, shorter batch is left out of the epoch; the order differs in the next.
        for batch in shuffled.split(settings.batch)[: len(data.y) // settings.batch]:
            optimizer.zero_grad()
            F.cross_entropy(net(data.x[batch]), data.y[batch]).backward()
            optimizer.step()
        accuracy.append(_accuracy(net, data))
    return tuple(accuracy)


def _accuracy(net: nn.Module, data: _Data) -> float:
    net.eval()
    with torch.no_grad():
        return float((net(data.test_x).argmax(1) == data.test_y).double().mean())


def draw(result: DigitsResult, path: Path) -> None:
    """Save the curves as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axes = figure.add_subplot()
    styles = {
        WITH: {"color": "#1f6fb4", "linewidth": 2.4, "marker": "o", "markersize": 5},
        TORCH: {"color": "#f2a33c", "linewidth": 1.6, "linestyle": (0, (4, 3))},
        WITHOUT: {"color": "#7a7a7a", "linewidth": 2.0, "marker": "s", "markersize": 4},
    }
    for curve in result.curves:
        percent = [100 * a for a in curve.accuracy]
        label = f"{curve.name}: {percent[-1]:.1f} %"
        axes.plot(range(len(percent)), percent, label=label, **styles[curve.name])  # type: ignore[arg-type]
    s = result.settings
    axes.set_title(
        f"Handwritten digits, {s.layers} hidden layers of {s.width} sigmoids, SGD, rate {s.rate:g}",
        fontsize=11,
    )
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"accuracy on {result.test_images} test images (%)")
    axes.set_ylim(0, 103)
    axes.set_xticks(range(s.epochs + 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="center right", framealpha=0.95)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
