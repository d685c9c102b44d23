"""Tensors to tune on: made up, in many sets, and with outputs that are checked.

Nothing of a user's model is ever written. The values are normal and random: zeros would be easier
on the power supply of a GPU, and so faster. The sets take turns and together exceed the last-level
cache, so that each run finds its data in DRAM, as a layer in a network does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from tritonnorm import reference
from tritonnorm.device import Device
from tritonnorm.kernels import BY_NAME
from tritonnorm.kernels.base import BackwardArguments, EpilogueArguments, ForwardArguments
from tritonnorm.kernels.masked_launches import MaskedBackward, MaskedForward
from tritonnorm.problem import Problem
from tritonnorm.tune.search import Candidate, Wrong

__all__ = ["ACTIVATIONS", "EPS", "NormTrial", "compare", "poison", "portions", "sets_for"]

#: The activation that stands for its kind: the one that networks use most.
ACTIVATIONS = {"none": "", "two_valued": "relu", "smooth": "silu"}
TIMES_CACHE, LEAST_SETS, MOST_SETS = 4, 2, 64
# The largest error of an element that passes, relative to 1 + its size: some ten roundings of the
# result. What the search must find is a wrong tile, not a rounding.
TOLERANCE = {
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
    torch.float32: 1e-3,
    torch.float64: 1e-9,
}
# Of the elements: where a gate's argument is 0 but for rounding, its side is anyone's guess.
MAY_DIFFER = 1e-4
EPS = 1e-5
CHUNK = 1 << 25  # elements that the reference computes at once, in float64


def sets_for(problem_bytes: int, device: Device, free: int | None = None) -> int:
    """How many sets of tensors: four times the last-level cache, in the memory that there is."""
    wanted = math.ceil(TIMES_CACHE * device.l2_bytes / max(1, problem_bytes))
    most = MOST_SETS if free is None else max(1, int(0.6 * free / max(1, problem_bytes)))
    return max(1, min(max(wanted, LEAST_SETS), most, MOST_SETS))


class NormTrial:
    """A problem of a norm with its tensors: a `search.Trial`. This one is of a batch norm.

    Args:
        problem: what is computed.
        where: the device of the tensors; on the meta device there is one set, without values.
        device: what a plan knows of it.
        seed: of the values.
    """

    def __init__(self, problem: Any, where: torch.device, device: Device, seed: int = 0) -> None:
        self.problem, self.where, self.device = problem, where, device
        self.activation = ACTIVATIONS[problem.activity]
        meta = where.type == "meta"
        self.generator = None if meta else torch.Generator(where).manual_seed(seed)
        tensors = 3 + problem.residual + problem.needs_dresidual
        free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else None
        count = 1 if meta else sets_for(problem.bytes * tensors, device, free)
        self.sets = [self._arguments() for _ in range(count)]

    def _tensor(self) -> Tensor:
        """``[N, C, P]`` in the problem's memory order."""
        view = self.problem.view
        order = (view.n, view.p, view.c) if view.channels_last else (view.n, view.c, view.p)
        made = torch.empty(order, device=self.where, dtype=self.problem.dtype)
        made.normal_(generator=self.generator)
        return made.transpose(1, 2) if view.channels_last else made

    def _output(self, wanted: bool = True) -> Tensor | None:
        """The same to write to."""
        return torch.empty_like(self._tensor()) if wanted else None

    def _input(self) -> Tensor:
        """The same, with the input's own strides, in memory of its own."""
        view, dense = self.problem.view, self._tensor()
        if view.strides is None:
            return dense
        room = 1 + sum(
            (n - 1) * s for n, s in zip((view.n, view.c, view.p), view.strides, strict=True)
        )
        own = torch.empty(room, device=self.where, dtype=dense.dtype)
        return own.as_strided((view.n, view.c, view.p), view.strides).copy_(dense)

    def _vector(self, low: float, high: float) -> Tensor:
        made = torch.empty(self.problem.view.c, device=self.where, dtype=self.problem.accumulator)
        return made.uniform_(low, high, generator=self.generator)

    def _run(self, candidate: Candidate) -> Callable[[Any], None]:
        name, config = candidate
        algorithm = BY_NAME[name]
        epilogue = EpilogueArguments.named(self.activation, ())
        make: Any = algorithm.forward if self.problem.direction == "forward" else algorithm.backward
        run: Callable[[Any], None] = make(self.problem, config, epilogue)
        return run

    def calls(self, candidate: Candidate) -> Sequence[Callable[[], Any]]:
        """The candidate on each set."""
        run = self._run(candidate)
        return [lambda a=a: run(a) for a in self.sets]  # type: ignore[misc]

    def _mask(self) -> Tensor | None:
        if not self.problem.mask:
            return None
        shape = (self.problem.mask_room,)
        options: Any = {"device": self.where, "generator": self.generator}
        return torch.randint(0, 256, shape, dtype=torch.uint8, **options)

    def _arguments(self) -> Any:
        p, x, keep = self.problem, self._input(), self._keep()
        weight, bias = self._vector(0.5, 1.5), self._vector(-1.0, 1.0)
        mean, var = self._vector(-0.2, 0.2), self._vector(0.5, 1.5)
        if p.direction == "forward":
            saved = (torch.empty_like(mean), torch.empty_like(mean))
            made = ForwardArguments(
                *(x, torch.empty_like(self._tensor()), *saved),
                *(self._tensor() if p.residual else None, self._mask(), weight, bias, mean, var),
                counter=torch.zeros((), dtype=torch.int64, device=self.where),
                momentum=0.1 if p.batch_statistics else 0.0,
                eps=EPS,
            )
            count = torch.empty_like(mean[:1]) if p.batch_statistics else None
            return made if keep is None else MaskedForward(**_values(made), keep=keep, count=count)
        if p.batch_statistics:
            mean, var = (t.to(mean.dtype) for t in _statistics(x, keep))
        parameters = p.needs_dparams
        found = BackwardArguments(
            *(self._tensor(), x, mean, torch.rsqrt(var + EPS)),
            *(self._tensor() if p.reads_residual else None, self._mask(), weight, bias),
            self._output(p.needs_dx),
            self._output(p.needs_dresidual),
            torch.empty_like(weight) if parameters else None,
            torch.empty_like(bias) if parameters else None,
        )
        if keep is None:
            return found
        count = keep.sum().to(mean.dtype).reshape(1) if p.batch_statistics else None
        return MaskedBackward(**_values(found), keep=keep, count=count)

    def _keep(self) -> Tensor | None:
        """Of sequences one position in eight is padding, at the end."""
        view = self.problem.view
        if self.problem.form != "masked":
            return None
        kept = torch.arange(view.p, device=self.where) < view.p - view.p // 8
        return kept.to(torch.uint8).expand(view.n, view.p).contiguous()

    def check(self, candidate: Candidate) -> None:
        """Compute the first set into outputs full of NaN and compare with the reference."""
        a = self.sets[0]
        run = self._run(candidate)
        if isinstance(a, ForwardArguments):
            kept = (a.running_mean, a.running_var)
            a.running_mean, a.running_var = (None if t is None else t.clone() for t in kept)
            poison(a.y, a.mean, a.rstd)
            if a.mask is not None:
                a.mask.fill_(0)
            run(a)
            own = (a.running_mean, a.running_var)
            a.running_mean, a.running_var = kept
            _check_forward(a, own, self.problem, self.activation)
        else:
            poison(a.dx, a.dresidual, a.dweight, a.dbias)
            run(a)
            _check_backward(a, self.problem, self.activation)


def poison(*outputs: Tensor | None) -> None:
    for t in outputs:
        if t is not None:
            t.fill_(math.nan)


def _values(arguments: Any) -> dict[str, Any]:
    return {f.name: getattr(arguments, f.name) for f in fields(arguments)}


def _statistics(x: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    valid = x if keep is None or x.is_meta else x.movedim(1, 2)[keep != 0]
    parts = [reference.statistics(valid[:, s].to(torch.float64)) for s in _slices(x)]
    return torch.cat([m for m, _ in parts]), torch.cat([v for _, v in parts])


def _slices(x: Tensor) -> list[slice]:
    """Channels in portions."""
    return portions(x, 1)


def portions(x: Tensor, dim: int) -> list[slice]:
    """A dimension in portions that the reference can compute at once."""
    step = max(1, CHUNK // max(1, x.numel() // x.shape[dim]))
    return [slice(i, i + step) for i in range(0, x.shape[dim], step)]


def _part(t: Tensor | None, s: slice) -> Tensor | None:
    return None if t is None else t[s]


def _specified(direction: str, a: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """The specification, and which positions are valid where not all are."""
    if isinstance(a, MaskedForward | MaskedBackward):
        return getattr(reference, f"masked_{direction}"), (a.keep != 0,)
    return getattr(reference, direction), ()


def _check_forward(
    a: ForwardArguments, running: Sequence[Tensor | None], p: Problem, activation: str
) -> None:
    spec, where = _specified("forward", a)
    for s in _slices(a.x):
        weight, bias, *old = (
            _part(t, s) for t in (a.weight, a.bias, a.running_mean, a.running_var)
        )
        expected = spec(
            a.x[:, s], *where, *old, weight, bias, p.batch_statistics, EPS, activation or None,
            residual=None if a.residual is None else a.residual[:, s],
        )  # fmt: skip
        compare("y", a.y[:, s], expected.y)
        if a.mean is not None and a.rstd is not None:
            compare("mean", a.mean[s], expected.mean)
            compare("rstd", a.rstd[s], torch.rsqrt(expected.var + EPS))
        if p.batch_statistics and old[0] is not None and old[1] is not None:
            count = int(where[0].sum()) if where else a.x.numel() // a.x.shape[1]
            new = reference.updated_running(
                (old[0], old[1]), expected.mean, expected.var, count, a.momentum, 1
            )
            for found, wanted in zip(running, new, strict=True):
                assert found is not None
                compare("running statistics", found[s], wanted)
    if a.mask is not None and a.residual is not None:
        differ = int((p.mask_bits(a.mask) != (a.y > 0)).sum())
        if differ > MAY_DIFFER * a.y.numel():
            raise Wrong("the mask is wrong")


def _check_backward(a: BackwardArguments, p: Problem, activation: str) -> None:
    spec, where = _specified("backward", a)
    for s in _slices(a.x):
        var = a.rstd[s].double().square().reciprocal() - EPS
        dy, given = a.dy[:, s], activation or None
        if a.mask is not None:  # the gate is what the mask says
            dy, given = torch.where(p.mask_bits(a.mask)[:, s], dy, torch.zeros_like(dy)), None
        expected = spec(
            dy, a.x[:, s], *where, a.mean[s], var, _part(a.weight, s), _part(a.bias, s),
            p.batch_statistics, EPS, given,
            residual=None if a.residual is None else a.residual[:, s],
        )  # fmt: skip
        outputs = {"dx": a.dx, "dresidual": a.dresidual}
        for name, found in outputs.items():
            if found is not None:
                compare(name, found[:, s], getattr(expected, name))
        size = math.sqrt(a.x.numel() / a.x.shape[1])  # sums of so many terms of either sign
        for name, found in {"dweight": a.dweight, "dbias": a.dbias}.items():
            if found is not None:
                compare(name, found[s] / size, getattr(expected, name) / size)


def compare(name: str, found: Tensor, expected: Tensor) -> None:
    if bool(found.isnan().any()):
        raise Wrong(f"{name} is not written everywhere")
    error = (found.to(expected.dtype) - expected).abs() / (1 + expected.abs())
    most = MAY_DIFFER * error.numel()
    if int((error > TOLERANCE[found.dtype]).sum()) > most:
        raise Wrong(f"{name} is wrong")
