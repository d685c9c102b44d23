"""Part 1: one training step of a real model, as it is and after `tritonnorm.replace`."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonnorm
from bench.demo.tiles import interpreted, wide_tiles
from bench.launches import Launches, observe
from bench.models import batch_norms, build
from bench.processes import Progress, silent

__all__ = ["StepErrors", "TrainingResult", "run"]


@dataclass(frozen=True)
class StepErrors:
    """Largest differences after one step, each relative to the largest value of what it compares.

    Attributes:
        outputs: of the logits.
        gradients: of all parameters, each parameter by itself; the worst.
        all_gradients: of the gradients as one vector: norm of the difference over the norm.
        statistics: of running means and variances, each by itself; the worst.
        parameters: of the parameters after the optimizer's step.
    """

    outputs: float
    gradients: float
    all_gradients: float
    statistics: float
    parameters: float


@dataclass(frozen=True)
class TrainingResult:
    """What part 1 found in one dtype.

    Attributes:
        model, pixels, dtype: what ran: name of the model, shape of the input.
        batch_norms, replaced: how many there were, and how many `replace` changed.
        report: the report of `replace` as text.
        launches: what computed the batch norms of the replaced model's step.
        ours: the replaced model against the original in float64.
        torchs: the original in ``dtype`` against the original in float64; None where that is the
            same.
        counters: all ``num_batches_tracked`` equal those of the original.
        wide_tiles: the kernels ran with tiles wider than the plan's.
    """

    model: str
    pixels: tuple[int, ...]
    dtype: str
    batch_norms: int
    replaced: int
    report: str
    launches: Launches
    ours: StepErrors
    torchs: StepErrors | None
    counters: bool
    wide_tiles: bool


@dataclass
class _Step:
    """State of a model after one training step."""

    logits: Tensor
    gradients: dict[str, Tensor]
    statistics: dict[str, Tensor]
    parameters: dict[str, Tensor]
    counters: dict[str, Tensor]


def run(
    progress: Progress = silent,
    model: str = "resnet-50",
    device: str = "cpu",
    dtype: str = "float64",
    batch: int = 4,
    size: int = 32,
) -> TrainingResult:
    """Take the step with the original in float64, then with both models in ``dtype``.

    Args:
        progress: told after each step.
        model: a name of `bench.models.RESNETS`.
        device: "cpu" or "cuda"; kernels need the interpreter on "cpu".
        dtype: "float64" or "float32".
        batch, size: of the input ``[batch, 3, size, size]``.
    """
    progress(0, 3, f"building {model}")
    original = build(model)
    pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    kind = getattr(torch, dtype)

    def step(net: nn.Module, kind: torch.dtype) -> _Step:
        x = pixels.to(device, kind).contiguous(memory_format=torch.channels_last)
        return _step(net, x, torch.arange(batch, device=device) % 10)

    def copy_in(kind: torch.dtype) -> nn.Module:
        net = copy.deepcopy(original).to(device, kind)
        for parameter in net.parameters():  # convolutions in the layout of the input
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return net

    exact = step(copy_in(torch.float64), torch.float64)
    progress(1, 3, f"training step of the replaced model in {dtype}")
    net, report = tritonnorm.replace(copy_in(kind))
    with wide_tiles(device, 512, 64), observe() as launches:
        ours = step(net, kind)
    progress(2, 3, f"training step of the original model in {dtype}")
    torchs = None if kind == torch.float64 else _errors(step(copy_in(kind), kind), exact)
    progress(3, 3)
    return TrainingResult(
        model=model,
        pixels=tuple(pixels.shape),
        dtype=dtype,
        batch_norms=len(batch_norms(original)),
        replaced=sum(report.counts.get(what, 0) for what in ("replaced", "fused")),
        report=str(report),
        launches=launches,
        ours=_errors(ours, exact),
        torchs=torchs,
        counters=all(torch.equal(ours.counters[n], c) for n, c in exact.counters.items()),
        wide_tiles=interpreted(device),
    )


def _step(net: nn.Module, pixels: Tensor, labels: Tensor) -> _Step:
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    logits = net(pixels)
    F.cross_entropy(logits, labels).backward()
    gradients = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    optimizer.step()
    buffers = dict(net.named_buffers())
    return _Step(
        logits=logits.detach().cpu(),
        gradients={n: g.cpu() for n, g in gradients.items()},
        statistics={n: b.detach().cpu() for n, b in buffers.items() if "running" in n},
        parameters={n: p.detach().cpu() for n, p in net.named_parameters()},
        counters={n: b.cpu() for n, b in buffers.items() if n.endswith("num_batches_tracked")},
    )


def _errors(found: _Step, exact: _Step) -> StepErrors:
    return StepErrors(
        outputs=relative(found.logits, exact.logits),
        gradients=_worst(found.gradients, exact.gradients),
        all_gradients=_of_norms(found.gradients, exact.gradients),
        statistics=_worst(found.statistics, exact.statistics),
        parameters=_worst(found.parameters, exact.parameters),
    )


def relative(found: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest value of ``exact``, in float64; infinite for a NaN."""
    found, exact = found.double(), exact.double()
    error = float((found - exact).abs().max() / exact.abs().max().clamp_min(1e-300))
    return error if error == error else float("inf")


def _worst(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    if found.keys() != exact.keys():
        return float("inf")
    return max(relative(found[name], exact[name]) for name in exact)


def _of_norms(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    if found.keys() != exact.keys():
        return float("inf")
    off = sum(float((found[n].double() - exact[n].double()).square().sum()) for n in exact)
    size = sum(float(exact[n].double().square().sum()) for n in exact)
    return (off / size) ** 0.5
