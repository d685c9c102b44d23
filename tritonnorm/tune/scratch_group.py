"""Tensors to tune group, layer, instance and RMS norm on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tritonnorm.kernels.group_base import GroupBackward, GroupForward
from tritonnorm.norms import reference
from tritonnorm.tune.scratch import EPS, NormTrial, compare, poison, portions
from tritonnorm.tune.search import Candidate

__all__ = ["GroupTrial"]


class GroupTrial(NormTrial):
    """The same for a `GroupProblem`."""

    def _arguments(self) -> Any:
        p, x = self.problem, self._input()
        weight = self._vector(0.5, 1.5)
        bias = self._vector(-1.0, 1.0) if p.centred else None  # an RMS norm has none
        options: dict[str, Any] = {"dtype": p.accumulator, "device": self.where}
        mean = torch.empty(p.statistics, **options)
        rstd = torch.empty_like(mean)
        residual = self._tensor() if p.reads_residual else None
        if p.direction == "forward":
            y = torch.empty_like(self._tensor())
            return GroupForward(
                *(x, y, mean if p.centred else None, rstd, residual, weight, bias, EPS)
            )
        for s, part in self._portions(x):
            mean[s], rstd[s] = self._statistics(part)
        return GroupBackward(
            *(self._tensor(), x, mean if p.centred else None, rstd, residual, weight, bias),
            *(self._output(p.needs_dx), self._output(p.needs_dresidual)),
            torch.empty_like(weight) if p.needs_dparams else None,
            torch.empty_like(bias) if p.needs_dparams and bias is not None else None,
        )

    def _samples(self, t: Tensor | None) -> Tensor | None:
        """``[N, C, P]`` as the reference takes it: rows are samples ``[P, C]``."""
        return t[0].mT if self.problem.rows and t is not None else t

    def _portions(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Which statistics, and the samples that they are of."""
        samples, p = self._samples(x), self.problem
        assert samples is not None
        of_sample = 1 if p.rows else p.groups
        for s in portions(samples, 0):
            yield slice(s.start * of_sample, s.stop * of_sample), samples[s]

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal deviation of the groups of some samples."""
        grouped = x.double().reshape(x.shape[0] * (x.shape[1] // self.problem.channels), -1)
        mean = grouped.mean(1)
        centred = grouped - mean[:, None] if self.problem.centred else grouped
        return mean, torch.rsqrt(centred.square().mean(1) + EPS)

    def check(self, candidate: Candidate) -> None:
        """Compute the first set into outputs full of NaN and compare with the reference."""
        a, p = self.sets[0], self.problem
        run = self._run(candidate)
        if isinstance(a, GroupForward):
            poison(a.y, a.mean, a.rstd)
        else:
            poison(a.dx, a.dresidual, a.dweight, a.dbias)
        run(a)
        of_sample = 1 if p.rows else p.groups
        options: dict[str, Any] = {"eps": EPS, "centred": p.centred}
        options["activation"] = self.activation or None
        sums = [torch.zeros_like(a.weight, dtype=torch.float64) for _ in range(2)]

        def part(t: Tensor | None, s: slice) -> Tensor | None:
            found = self._samples(t)
            return None if found is None else found[s.start // of_sample : s.stop // of_sample]

        for s, x in self._portions(a.x):
            options["residual"] = part(a.residual, s)
            if isinstance(a, GroupForward):
                y = reference.forward(x, p.groups, a.weight, a.bias, **options)
                mean, rstd = self._statistics(x)
                wanted = {"y": (part(a.y, s), y), "rstd": (a.rstd[s], rstd)}
                if a.mean is not None:
                    wanted["mean"] = (a.mean[s], mean)
            else:
                dy = part(a.dy, s)
                assert dy is not None
                found = reference.backward(dy, x, p.groups, a.weight, a.bias, **options)
                wanted = {
                    "dx": (part(a.dx, s), found.dx),
                    "dresidual": (part(a.dresidual, s), found.dresidual),
                }
                sums = [sums[0] + found.dweight, sums[1] + found.dbias]
            for name, (own, expected) in wanted.items():
                if own is not None:
                    compare(name, own, expected)
        if isinstance(a, GroupBackward):
            size = math.sqrt(a.x.numel() / p.view.c)  # sums of so many terms of either sign
            for name, own, expected in zip(
                ("dweight", "dbias"), (a.dweight, a.dbias), sums, strict=True
            ):
                if own is not None:
                    compare(name, own / size, expected / size)
