"""Statistics given: one pass over the data. Inference and its gradient.

Forward: ``y = act((x - mean) * rstd * weight + bias + residual)``, one read, one write, one launch.
Backward: one read of dy (and of x, where the gradient depends on it), one write of each gradient;
sums over a channel are kept per split and combined in a fixed order. Tiny planes are read as rows
of all channels (`Problem.flat`), which is what makes their accesses wide.
"""

from collections.abc import Callable

from tritonnorm.device import Device
from tritonnorm.problem import Problem, minimum_bytes

from .base import (
    BackwardArguments,
    Config,
    EpilogueArguments,
    ForwardArguments,
    predicted_seconds,
)
from .streaming import (
    apply_launch,
    combine_sums_launch,
    gradient_launch,
    partial_sums,
)
from .tiling import splits_for, streaming_candidates, streaming_config


class Affine:
    """Given statistics: one launch forward; backward one pass, and a small launch for dweight and
    dbias."""

    name = "affine"

    def supports(self, problem: Problem, device: Device) -> str | None:
        return "the statistics are those of the batch" if problem.batch_statistics else None

    def heuristic(self, problem: Problem, device: Device) -> Config:
        return streaming_config(problem.flat, device)

    def configs(self, problem: Problem, device: Device) -> list[Config]:
        return streaming_candidates(problem.flat, device, self.heuristic(problem, device))

    def model_bytes(self, problem: Problem, config: Config) -> int:
        return minimum_bytes(problem)

    def dram_bytes(self, problem: Problem, config: Config, device: Device) -> float:
        return minimum_bytes(problem)

    def predict(self, problem: Problem, config: Config, device: Device) -> float:
        flat = problem.flat
        programs = config.channel_blocks(flat) * splits_for(config, flat)[0]
        launches = 2 if problem.direction == "backward" and problem.needs_dparams else 1
        return predicted_seconds(device, minimum_bytes(problem), programs, launches)

    def forward(
        self, problem: Problem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[ForwardArguments], None]:
        apply = apply_launch(problem.flat, config, epilogue, given=True, plane=problem.plane)

        def run(a: ForwardArguments) -> None:
            assert a.running_mean is not None and a.running_var is not None
            apply(a, a.running_mean, a.running_var)

        return run

    def backward(
        self, problem: Problem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[BackwardArguments], None]:
        sums = problem.needs_dparams
        flat, plane = problem.flat, problem.plane
        gradient = gradient_launch(
            flat, config, epilogue, sums=sums, corrects=False, writes=True, plane=plane
        )
        combine = combine_sums_launch(flat, config, plane)

        def run(a: BackwardArguments) -> None:
            partial = partial_sums(flat, config, a) if sums else None
            gradient(a, partial, None, None)
            if partial is not None:
                combine(a, partial, None)

        return run
