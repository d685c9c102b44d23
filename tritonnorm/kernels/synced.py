"""`split`, cut where its programs meet: a batch that lies on several GPUs needs a collective there.

Forward: moments of this part of the batch ``[3, C]`` -> gathered from all ranks ``[R, 3, C]`` ->
merged, applied. Backward: sums over this part ``[2, C]`` -> added over all ranks -> gradients. The
kernels are those of `split`; one small combine more merges the ranks.
"""

from collections.abc import Callable

from torch import Tensor

from tritonnorm.problem import Problem

from .base import BackwardArguments, Config, EpilogueArguments, ForwardArguments, advance_counter
from .split import combine_launches, moments_launch
from .streaming import (
    apply_launch,
    combine_sums_launch,
    gradient_launch,
    partial_sums,
)
from .tiling import splits_for


def moments(problem: Problem, config: Config) -> Callable[[Tensor], Tensor]:
    """What comes back takes x and gives ``[3, C]``: count, mean, centred second moment."""
    c, splits = problem.view.c, splits_for(config, problem)[0]
    of_splits = moments_launch(problem, config)
    combine = combine_launches(problem, splits)[False]

    def run(x: Tensor) -> Tensor:
        partial = x.new_empty((4, splits, c), dtype=problem.accumulator)
        of_splits(x, partial)
        merged = partial.new_empty((3, c))
        combine(partial, merged, None, None, None, None, None, 0.0, 0.0)
        return merged

    return run


def apply_moments(
    problem: Problem, config: Config, epilogue: EpilogueArguments, ranks: int
) -> Callable[[ForwardArguments, Tensor], Tensor]:
    """What comes back takes moments ``[R, 3, C]``; it gives the merged ones ``[3, C]``."""
    combine = combine_launches(problem, ranks, merged=True)
    apply = apply_launch(problem, config, epilogue, given=False)

    def run(a: ForwardArguments, gathered: Tensor) -> Tensor:
        assert a.mean is not None and a.rstd is not None
        merged = gathered.new_empty((3, problem.view.c))
        combine[advance_counter(a)](
            *(gathered, merged, a.mean, a.rstd, a.running_mean, a.running_var, a.counter),
            *(a.eps, 0.0 if a.momentum is None else a.momentum),
        )
        apply(a, a.mean, a.rstd)
        return merged

    return run


def gradient_sums(
    problem: Problem, config: Config, epilogue: EpilogueArguments
) -> Callable[[BackwardArguments], Tensor]:
    """What comes back gives the sums ``[2, C]`` of g and of g (x - mean), and writes dweight and
    dbias."""
    first = gradient_launch(problem, config, epilogue, sums=True, corrects=False, writes=False)
    combine = combine_sums_launch(problem, config)

    def run(a: BackwardArguments) -> Tensor:
        partial = partial_sums(problem, config, a)
        first(a, partial, None, None)
        whole = a.rstd.new_empty((2, problem.view.c))
        combine(a, partial, whole)
        return whole

    return run


def apply_gradient_sums(
    problem: Problem, config: Config, epilogue: EpilogueArguments
) -> Callable[[BackwardArguments, Tensor | None, Tensor], None]:
    """What comes back takes the sums of all ranks, if it needs dx, and the counts behind them
    ``[C]``; it writes dx and dresidual."""
    corrects = problem.needs_dx
    second = gradient_launch(problem, config, epilogue, sums=False, corrects=corrects, writes=True)

    def run(a: BackwardArguments, whole: Tensor | None, count: Tensor) -> None:
        if corrects:
            second(a, None, whole, count)
        else:
            second(a, None, None, None)

    return run
