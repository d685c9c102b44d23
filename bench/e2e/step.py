"""One training step of a real model, in a variant: edited, compiled, or a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonnorm
from bench.e2e.clocks import Laps, captured
from bench.models import reorder

__all__ = ["PARTS", "Step", "Workload", "step_of"]

#: Parts of a variant's name: as it is, `tritonnorm.replace`, `torch.compile`, one CUDA graph.
PARTS = ("eager", "replace", "compile", "graph")
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Workload:
    """What a step works on.

    Attributes:
        model: a name of `bench.models.MODELS` without dropout, so that a step can be repeated.
        device: "cpu" or "cuda".
        batch, size: of the random images ``[batch, 3, size, size]``, channels last.
        dtype: "bfloat16" or "float16" is that of autocast, above parameters in float32 and without
            a gradient scaler. "float32" and "float64" are the dtype of everything.

    Raises:
        ValueError: the dtype is none of these.
    """

    model: str = "resnet-50"
    device: str = "cuda"
    batch: int = 256
    size: int = 224
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}; got {self.dtype!r}")

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of autocast, None without it."""
        kind: torch.dtype = getattr(torch, self.dtype)
        return kind if kind.itemsize < 4 else None

    def small(self, dtype: str) -> Workload:
        """What a step is checked on. ResNet-50 has 64 elements a channel at its smallest plane."""
        return replace(self, batch=16, size=64, dtype=dtype)


class Step:
    """Forward with loss, backward, and SGD with momentum. Every call works on the same tensors.

    Args:
        net: the model; its parameters change.
        run: what computes its forward, the model itself or its compiled form.
        pixels, labels: the batch.
        autocast: the dtype that convolutions compute in; None for that of the model.
        laps: told where forward, backward and optimizer begin and end.
    """

    def __init__(
        self,
        net: nn.Module,
        run: Callable[[Tensor], Tensor],
        pixels: Tensor,
        labels: Tensor,
        autocast: torch.dtype | None = None,
        laps: Laps | None = None,
    ) -> None:
        self.net = net
        self.laps = laps
        self._run = run
        self._pixels, self._labels = pixels, labels
        self._autocast = autocast
        self._optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    def __call__(self) -> Tensor:
        """Take the step; returns its loss, detached, so that nothing keeps the graph alive."""
        if self.laps is not None:
            self.laps.start()
        with torch.autocast(
            self._pixels.device.type, self._autocast, enabled=self._autocast is not None
        ):
            loss = F.cross_entropy(self._run(self._pixels), self._labels)
        self._mark()
        loss.backward()
        self._mark()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)  # so that a CUDA graph allocates them itself
        self._mark()
        return loss.detach()

    def captured(self) -> Callable[[], Tensor]:
        """The step as a CUDA graph, with model and optimizer as they were before the warm-up."""
        before = {name: value.clone() for name, value in self.net.state_dict().items()}
        replay = captured(self)
        self.net.load_state_dict(before)  # in place: the graph holds the addresses
        for state in self._optimizer.state.values():
            state["momentum_buffer"].zero_()  # a first step's momentum is its gradient
        return replay

    def _mark(self) -> None:
        if self.laps is not None:
            self.laps.mark()


def step_of(name: str, original: nn.Module, work: Workload, backend: str) -> Step:
    """A step of a copy of the model, by a variant's name made of `PARTS`; not yet captured."""
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float32 if work.autocast else getattr(torch, work.dtype)
    pixels = torch.randn((work.batch, 3, work.size, work.size), generator=generator)
    pixels = pixels.to(work.device, dtype, memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (work.batch,), generator=generator).to(work.device)
    net = copy.deepcopy(original).train().to(work.device, dtype)
    reorder(net, torch.channels_last)
    if "replace" in name:
        net, _ = tritonnorm.replace(net, example_inputs=pixels)
    run: Callable[[Tensor], Tensor] = net
    if "compile" in name:
        run = torch.compile(net, backend=backend, dynamic=False)
    return Step(net, run, pixels, labels, work.autocast)
