"""Whether a variant's training step is right, before its time is taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.e2e.step import Workload, step_of
from bench.launches import observe

__all__ = ["EXACT", "ROUNDING", "Check"]

# Relative errors in float64 below this are rounding: 2.2e-16, times what a ResNet of 50 layers
# amplifies it (measured: 1e-12 for its gradients, 4e-13 for its folded outputs). A wrong formula
# gives errors many orders larger.
EXACT = 1e-9
# In the dtype that is timed, whose kernels may be others, a variant may be so many times as far
# from float64 as eager PyTorch is: it rounds elsewhere, but to the same size. In bfloat16 eager
# PyTorch's running statistics of a new ResNet-50 are 2 % off, and its gradients 130 %, as ReLUs
# open and shut (measured): of gradients this sees no more than that their size is right.
ROUNDING = 4.0


@dataclass(frozen=True)
class Check:
    """Holds a step of a variant against eager PyTorch's in float64, on a small input.

    Attributes:
        exact: what eager PyTorch's step leaves in float64.
        rounding: how far its step in the dtype that is timed is from that.
    """

    original: nn.Module
    work: Workload
    backend: str
    exact: dict[str, Tensor]
    rounding: dict[str, float]

    @classmethod
    def of(cls, original: nn.Module, work: Workload, backend: str) -> Check:
        exact = _after_a_step("eager", original, work.small("float64"), backend)
        timed = _after_a_step("eager", original, work.small(work.dtype), backend)
        return cls(original, work, backend, exact, _errors(timed, exact))

    def __call__(self, name: str) -> float:
        """The largest relative error in float64.

        Raises:
            RuntimeError: an error is larger than rounding makes it.
        """
        exact = self._errors(name, "float64")
        self._refuse(name, exact, dict.fromkeys(exact, EXACT), "float64")
        if "compile" not in name:  # whose forms take a minute each
            # One number, the loss, may be right by chance, which vectors are not: it sets no limit.
            limits = {k: max(EXACT, ROUNDING * e) for k, e in self.rounding.items() if k != "loss"}
            self._refuse(name, self._errors(name, self.work.dtype), limits, self.work.dtype)
        return max(exact.values())

    def _errors(self, name: str, dtype: str) -> dict[str, float]:
        found = _after_a_step(name, self.original, self.work.small(dtype), self.backend)
        return _errors(found, self.exact)

    @staticmethod
    def _refuse(name: str, errors: dict[str, float], limits: dict[str, float], dtype: str) -> None:
        for key, limit in limits.items():
            if not errors[key] <= limit:
                raise RuntimeError(
                    f"{name}: error {errors[key]:.1e} of the {key} after a step in {dtype}, "
                    f"expected at most {limit:.1e}"
                )


def _after_a_step(
    name: str, original: nn.Module, work: Workload, backend: str
) -> dict[str, Tensor]:
    """What a step leaves: its loss, what it adds to the parameters, running statistics, counters.

    What the first step adds to a parameter is its gradient, times the rate.

    Raises:
        RuntimeError: PyTorch computed batch norms of "replace".
    """
    step = step_of(name, original, work, backend)
    before = [p.detach().clone() for p in step.net.parameters()]
    if name == "replace":
        with observe() as launches:  # not around a compiled form, which would run eagerly then
            loss = step()
        if launches.torch:
            raise RuntimeError(f"{name}: {launches}, expected none of PyTorch's")
    else:
        loss = (step.captured() if "graph" in name else step)()
    after = [p.detach() for p in step.net.parameters()]
    buffers = dict(step.net.named_buffers())

    def joined(end: str) -> Tensor:
        return torch.cat([b.flatten() for key, b in buffers.items() if key.endswith(end)])

    return {
        "loss": loss,
        "updates": torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]),
        "running means": joined("running_mean"),
        "running variances": joined("running_var"),
        "counters": joined("num_batches_tracked"),
    }


def _errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm of what is exact."""

    def error(a: Tensor, b: Tensor) -> float:
        a, b = a.double(), b.double()
        return float((a - b).norm() / b.norm().clamp_min(1e-300))

    return {key: error(found[key], value) for key, value in exact.items()}
