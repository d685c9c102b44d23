"""Launches that are not made, and arguments for them: dtypes without data.

What a launch is compiled for depends on nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tritonnorm.kernels.base import BackwardArguments, ForwardArguments, Launch
from tritonnorm.problem import Problem

__all__ = ["arguments", "launches_to"]

Vectors = Sequence["torch.dtype | None"]


def arguments(
    problem: Problem,
    vectors: Vectors,
    *,
    saves: bool = True,
    cumulative: bool = False,
    residual: bool | None = None,
    needs: Sequence[bool] | None = None,
    slope: torch.dtype | None = None,
) -> ForwardArguments | BackwardArguments:
    """The arguments of a launch for a problem, as empty tensors on the meta device.

    Args:
        problem: what is computed.
        vectors: dtypes, or None, of weight, bias, running mean, running variance and counter.
        saves: forward: whether mean and rstd are written for a backward.
        cumulative: forward: whether the momentum is None.
        residual: whether the residual itself is an argument; by default if it is read.
        needs: backward: which of dx, dresidual, dweight and dbias (and dslope, with a slope); by
            default the problem's.
        slope: dtype of the slope of a prelu, or None.
    """

    def of(dtype: torch.dtype | None, there: bool = True) -> Tensor | None:
        return torch.empty(0, dtype=dtype, device="meta") if dtype and there else None

    def must(dtype: torch.dtype) -> Tensor:
        return torch.empty(0, dtype=dtype, device="meta")

    weight, bias, mean, var, counter = vectors
    x, statistics = problem.dtype, problem.accumulator
    mask = of(torch.uint8, problem.mask)
    z = of(x, problem.reads_residual if residual is None else residual)
    if problem.direction == "forward":
        return ForwardArguments(
            *(must(x), must(x), of(statistics, saves), of(statistics, saves), z, mask),
            *(of(weight), of(bias), of(mean), of(var), of(counter)),
            momentum=None if cumulative else 0.1,
            eps=1e-5,
            slope=of(slope),
        )
    if needs is None:
        parameters = problem.needs_dparams
        needs = (problem.needs_dx, problem.needs_dresidual, parameters, parameters)
    outputs = (of(x, needs[0]), of(x, needs[1]), of(weight, needs[2]), of(bias, needs[3]))
    return BackwardArguments(
        *(must(x), must(x), must(statistics), must(statistics), z, mask, of(weight), of(bias)),
        *outputs,
        *(of(slope), of(statistics, len(needs) > 4 and needs[4])),
    )


@contextlib.contextmanager
def launches_to(sink: Callable[[Launch, tuple[Any, ...]], None]) -> Iterator[None]:
    """Within the context launches, with their tensors, go to ``sink`` and are not made."""
    before, Launch.sink = Launch.sink, sink
    try:
        yield
    finally:
        Launch.sink = before
