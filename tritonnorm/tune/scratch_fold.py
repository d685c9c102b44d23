"""Layers to tune the fold of a frozen model on: as many as it has, all of their mean size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tritonnorm import folding
from tritonnorm.device import Device
from tritonnorm.folding import Source
from tritonnorm.kernels.folding import Batch
from tritonnorm.problem import FoldProblem
from tritonnorm.tune.scratch import compare, sets_for
from tritonnorm.tune.search import Candidate

__all__ = ["FoldTrial"]

ROW_UNITS = 16  # elements: rows of so many are aligned in every dtype


class FoldTrial:
    """The fold of made-up layers and its gradient, one after the other: a `search.Trial`."""

    def __init__(
        self, problem: FoldProblem, where: torch.device, device: Device, seed: int = 0
    ) -> None:
        self.problem, self.where = problem, where
        self.generator = torch.Generator(where).manual_seed(seed)
        free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else None
        self.sets = [self._sources() for _ in range(sets_for(problem.bytes, device, free))]
        self.grads = [self._grads(sources) for sources in self.sets]

    def _sources(self) -> list[Source]:
        p = self.problem
        channels = max(1, p.channels // p.pairs)
        row = max(1, p.elements // (channels * p.pairs))
        row = math.ceil(row / ROW_UNITS) * ROW_UNITS + (0 if p.rows else 1)

        def of(dtype: torch.dtype, *shape: int) -> Tensor:
            made = torch.empty(shape, dtype=dtype, device=self.where)
            return made.uniform_(0.5, 1.5, generator=self.generator)

        def source() -> Source:
            weight = of(p.dtype, channels, row)
            statistics = (of(p.statistics, channels), of(p.statistics, channels))
            affine = (of(p.affine, channels), of(p.affine, channels))
            return Source(weight, of(p.dtype, channels), *statistics, *affine, 1e-5)

        return [source() for _ in range(p.pairs)]

    def _grads(self, sources: Sequence[Source]) -> tuple[list[Tensor], Tensor]:
        """Gradients of all w' and b', and the table that says where they are."""
        grads = [torch.empty_like(s.weight) for s in sources]
        grads += [torch.empty_like(s.mean, dtype=s.weight.dtype) for s in sources]
        for grad in grads:
            grad.normal_(generator=self.generator)
        n = len(sources)
        places = [[grads[i].data_ptr(), grads[n + i].data_ptr()] for i in range(n)]
        return grads, torch.tensor(places, dtype=torch.int64).to(self.where)

    def _made(self, i: int, candidate: Candidate) -> tuple[Any, ...]:
        batch = Batch.of(self.sets[i], candidate[1])
        weight, affine, _ = batch.dtypes
        folded = torch.full((batch.weights,), math.nan, dtype=weight, device=self.where)
        vectors = torch.full((2 * batch.channels,), math.nan, dtype=affine, device=self.where)
        return batch, folded, torch.full_like(folded, math.nan), vectors

    def calls(self, candidate: Candidate) -> Sequence[Callable[[], Any]]:
        """Fold and gradient on each set."""
        made = [self._made(i, candidate) for i in range(len(self.sets))]

        def run(i: int) -> None:
            batch, folded, dw, vectors = made[i]
            batch.launch(False)(batch.table, batch.work, folded)
            batch.launch(True)(batch.table, batch.work, self.grads[i][1], dw, vectors)

        return [lambda i=i: run(i) for i in range(len(made))]  # type: ignore[misc]

    def check(self, candidate: Candidate) -> None:
        """Fold the first set into outputs full of NaN and compare with the expressions."""
        batch, folded, dw, vectors = self._made(0, candidate)
        grads, table = self.grads[0]
        batch.launch(False)(batch.table, batch.work, folded)
        batch.launch(True)(batch.table, batch.work, table, dw, vectors)
        n, wide = len(self.sets[0]), torch.float64
        for i, (source, place) in enumerate(zip(self.sets[0], batch.places, strict=True)):
            inputs = [None if t is None else t.to(wide).requires_grad_() for t in source.tensors]
            exact = Source(*inputs, eps=source.eps)  # type: ignore[arg-type, misc]
            with torch.enable_grad():
                (result,) = folding.differentiable([exact])
            w, b, c = result.weight, result.bias, source.mean.numel()
            at, b_at, c_at = place
            compare("w'", folded[at : at + w.numel()].view_as(w), w.detach())
            compare("b'", folded[b_at : b_at + c], b.detach())
            wanted = [t for t in (inputs[0], inputs[1], inputs[4], inputs[5]) if t is not None]
            expected = torch.autograd.grad(
                [w, b], wanted, [grads[i].double(), grads[n + i].double()]
            )
            half = len(vectors) // 2
            found = (
                dw[at : at + w.numel()].view_as(w),
                dw[b_at : b_at + c],
                vectors[c_at : c_at + c],
                vectors[half + c_at : half + c_at + c],
            )
            for name, f, e in zip(("dw", "dbias", "dgamma", "dbeta"), found, expected, strict=True):
                size = math.sqrt(w.numel() / c) if name == "dgamma" else 1.0
                compare(name, f / size, e / size)
