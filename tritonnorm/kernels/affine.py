"""Statistics given: one pass over the data. Inference and its gradient.

Forward: ``y = act((x - mean) * rstd * weight + bias + residual)``, one read, one write, one launch.
Backward: one read of dy (and of x, where the gradient depends on it), one write of each gradient;
sums over a channel are kept per split and combined in a fixed order.
"""

from tritonnorm.device import Device
from tritonnorm.problem import Problem, minimum_bytes

from .base import BackwardArguments, Config, ForwardArguments, predicted_seconds
from .streaming import (
    launch_apply,
    launch_combine_sums,
    launch_gradient,
    partial_sums,
    splits_for,
    streaming_candidates,
    streaming_config,
)


class Affine:
    """Given statistics: one launch forward; backward one pass, and a small launch for dweight and
    dbias."""

    name = "affine"

    def supports(self, problem: Problem, device: Device) -> str | None:
        return "the statistics are those of the batch" if problem.batch_statistics else None

    def heuristic(self, problem: Problem, device: Device) -> Config:
        return streaming_config(problem, device)

    def configs(self, problem: Problem, device: Device) -> list[Config]:
        return streaming_candidates(problem, device, self.heuristic(problem, device))

    def model_bytes(self, problem: Problem, config: Config) -> int:
        return minimum_bytes(problem)

    def predict(self, problem: Problem, config: Config, device: Device) -> float:
        programs = config.channel_blocks(problem) * splits_for(config, problem)[0]
        launches = 2 if problem.direction == "backward" and problem.needs_dparams else 1
        return predicted_seconds(device, minimum_bytes(problem), programs, launches)

    def forward(self, problem: Problem, config: Config, a: ForwardArguments) -> None:
        assert a.running_mean is not None and a.running_var is not None
        launch_apply(problem, config, a, a.running_mean, a.running_var, from_variance=True)

    def backward(self, problem: Problem, config: Config, a: BackwardArguments) -> None:
        partial = partial_sums(problem, config, a.rstd) if problem.needs_dparams else None
        launch_gradient(problem, config, a, partial, None, write=True)
        if partial is not None:
            launch_combine_sums(problem, a, partial, None)
