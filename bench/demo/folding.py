"""Part 3: a real model folded: batch norms gone, error, latency before and after.

Plain PyTorch runs on both sides: the model before is the original with PyTorch's batch norms, and a
folded model has none. So it is run in a process that does not interpret kernels.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tritonnorm
from bench.demo.model import batch_norms, build
from bench.demo.training import relative
from bench.launches import Launches, observe
from bench.processes import Progress, silent
from tritonnorm.timing import Clock, GpuClock, HostClock, Timing, interleaved

__all__ = ["FoldResult", "run"]

BUDGET = 15.0  # seconds for the timing: the demo has less than two minutes


@dataclass(frozen=True)
class FoldResult:
    """What part 3 found.

    Attributes:
        model, pixels: name of the model, and the shape of the input that was timed.
        before, after: batch norms in the original and in the folded model.
        report: the report of `fold` as text.
        error: largest difference of the logits in float64, relative to the largest logit.
        error32: the same in float32, the folded model against the original.
        original, folded: seconds of a forward in float32.
        threads: threads of PyTorch on a CPU, 0 on a GPU.
        launches: what computed the batch norms while the original was checked.
    """

    model: str
    pixels: tuple[int, ...]
    before: int
    after: int
    report: str
    error: float
    error32: float
    original: Timing
    folded: Timing
    threads: int
    launches: Launches

    @property
    def speedup(self) -> float:
        """Latency before over latency after."""
        return self.original.median / self.folded.median

    @property
    def apart(self) -> bool:
        """Whether the spans from the 20th to the 80th percentile do not overlap."""
        return self.original.p20 > self.folded.p80 or self.folded.p20 > self.original.p80


def run(
    progress: Progress = silent,
    model: str = "resnet-50",
    device: str = "cpu",
    size: int = 224,
    rounds: int = 21,
    clock: Clock | None = None,
) -> FoldResult:
    """Fold, check in float64, then time one image in float32.

    Args:
        progress: told after each step.
        model: a name of `bench.demo.model.RESNETS`.
        device: "cpu" or "cuda".
        size: of the image ``[1, 3, size, size]`` that is timed.
        rounds: how often each model runs, in turn and in random order; fewer if that takes too
            long.
        clock: by default the host's on a CPU and CUDA graphs on a GPU.
    """
    total = rounds + 3
    progress(0, total, f"building {model}")
    original = build(model).to(device)
    generator = torch.Generator().manual_seed(2)
    _settle(original, torch.randn(16, 3, 64, 64, generator=generator).to(device))
    image = torch.randn(1, 3, size, size, generator=generator).to(device)
    progress(1, total, "folding in float64")
    exact = copy.deepcopy(original).double()
    exact_folded, _ = tritonnorm.fold(exact, image.double())
    with torch.no_grad(), observe() as launches:
        error = relative(exact_folded(image.double()), exact(image.double()))
    del exact, exact_folded
    progress(2, total, "folding in float32")
    folded, report = tritonnorm.fold(original, image)
    with torch.no_grad():
        error32 = relative(folded(image), original(image))

    def forward(net: nn.Module) -> Tensor:
        with torch.inference_mode():
            out: Tensor = net(image)
            return out

    timings = interleaved(
        {"original": [lambda: forward(original)], "folded": [lambda: forward(folded)]},
        clock or (HostClock() if device == "cpu" else GpuClock()),
        rounds,
        progress=lambda done, of: progress(2 + done, total, "timing in turn"),
        budget=BUDGET,
    )
    progress(total, total)
    return FoldResult(
        *(model, tuple(image.shape), len(batch_norms(original)), len(batch_norms(folded))),
        report=str(report),
        error=error,
        error32=error32,
        original=timings["original"],
        folded=timings["folded"],
        threads=torch.get_num_threads() if device == "cpu" else 0,
        launches=launches,
    )


def _settle(net: nn.Module, pixels: Tensor) -> None:
    """Give the batch norms statistics and parameters unlike a new module's, then eval mode."""
    generator = torch.Generator().manual_seed(3)
    for bn in batch_norms(net):
        with torch.no_grad():
            for parameter, low, high in ((bn.weight, 0.5, 1.5), (bn.bias, -0.5, 0.5)):
                parameter.copy_(
                    torch.empty(parameter.shape).uniform_(low, high, generator=generator)
                )
        bn.momentum = None  # the plain average of what comes
    net.train()
    with torch.no_grad():
        for part in pixels.split(8):
            net(part)
    net.eval()
