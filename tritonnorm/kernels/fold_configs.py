"""How the fold of a model is laid out: what a plan for it depends on, and what it may choose."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tritonnorm.device import Device
from tritonnorm.folding import Source
from tritonnorm.problem import FoldProblem

from .base import Config, cdiv, predicted_seconds
from .folding import USUAL, affine_dtype, layout, tile_kind


def problem_of(sources: Sequence[Source]) -> FoldProblem:
    """What a plan for these pairs depends on."""
    first = sources[0]
    shapes = [layout(s) for s in sources]
    rows = all(
        shape is not None and tile_kind(s.weight, shape) > 0
        for s, shape in zip(sources, shapes, strict=True)
    )
    return FoldProblem(
        *(first.weight.dtype, affine_dtype(sources), first.mean.dtype, len(sources)),
        sum(s.mean.numel() for s in sources), sum(s.weight.numel() for s in sources), rows,
    )  # fmt: skip


class Fold:
    """One launch for all pairs; its tiles and warps are what there is to tune."""

    name = "fold"

    def supports(self, problem: FoldProblem, device: Device) -> str | None:
        return None

    def heuristic(self, problem: FoldProblem, device: Device) -> Config:
        return USUAL

    def configs(self, problem: FoldProblem, device: Device) -> list[Config]:
        """Tiles of 512 to 4096 elements. In float64 none is larger than the formula's: the compile
        audit finds spills."""
        wide = problem.accumulator == torch.float64
        shapes = [(8, 64), (16, 64)] + ([] if wide else [(16, 128), (32, 64), (32, 128)])
        found = [USUAL] + [Config(c, 1, m, 1, warps) for c, m in shapes for warps in (4, 8)]
        return list(dict.fromkeys(found))

    def model_bytes(self, problem: FoldProblem, config: Config) -> int:
        return problem.bytes

    def predict(self, problem: FoldProblem, config: Config, device: Device) -> float:
        programs = max(problem.pairs, cdiv(problem.channels, config.block_c))
        return predicted_seconds(device, problem.bytes, programs, launches=2)
