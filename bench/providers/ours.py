"""This library."""

from __future__ import annotations

from torch import Tensor

from bench.call import Tensors
from bench.providers.base import Forward, Provider
from bench.suites import Case
from tritonnorm.device import Device
from tritonnorm.plan import plan

__all__ = ["Ours"]


class Ours(Provider):
    """`tritonnorm.functional.batch_norm`, as its modules call it."""

    name = "tritonnorm"
    what = "this library"
    norms = True
    kernels = True

    def setup(self, case: Case) -> Forward:
        def forward(t: Tensors) -> Tensor:
            return t.forward()

        return forward

    def plan(self, case: Case, tensors: Tensors) -> str:
        device = Device.of(tensors.x.device)
        parts = []
        for direction in ("forward", "backward"):
            if direction in case.mode or (case.mode == "inference" and direction == "forward"):
                chosen = plan(case.call.problem(direction), device)
                c = chosen.config
                tile = f"{c.block_c}x{c.block_n}x{c.block_p}"
                split = f"/{c.splits}" if c.splits > 1 else ""
                parts.append(f"{chosen.algorithm} {tile}{split} {c.num_warps}w ({chosen.source})")
        return " + ".join(parts)
