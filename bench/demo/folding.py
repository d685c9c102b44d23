"""Part 3: a real model folded: batch norms gone, error, latency before and after.

Plain PyTorch runs on both sides: the model before is the original with PyTorch's batch norms, and a
folded model has none. So it is run in a process that does not interpret kernels.
"""

from __future__ import annotations

from bench.e2e.inference import FoldResult, compare
from bench.processes import Progress, silent
from tritonnorm.timing import Clock, GpuClock, HostClock

__all__ = ["FoldResult", "run"]

BUDGET = 15.0  # seconds for the timing: the demo has less than two minutes


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
        model: a name of `bench.models.MODELS`.
        device: "cpu" or "cuda".
        size: of the image ``[1, 3, size, size]`` that is timed.
        rounds: how often each model runs, in turn and in random order; fewer if that takes too
            long.
        clock: by default the host's on a CPU and CUDA graphs on a GPU.

    Raises:
        RuntimeError: the folded model is not equal to the original; nothing is timed then.
    """
    clock = clock or (HostClock() if device == "cpu" else GpuClock())
    return compare(
        progress, model, device=device, size=size, rounds=rounds, budget=BUDGET, clock=clock
    )
