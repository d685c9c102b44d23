"""Host time of a call of BN+relu: from Python's entry to the last launch, which launches nothing.

The kernels are compiled for an H100 and launched through `bench.lab.fake_driver`, whose launcher is
an empty Python function; on a GPU it is C code that talks to the driver. So this is the library's
own share: checks, autograd, plan, allocation of the outputs, arguments.

PyTorch has no such driver. Its batch norm followed by ReLU runs on the CPU, on a tensor so small
that the arithmetic hardly counts; but it is in there, as are its CPU operators in place of those of
a GPU. That makes it an upper bound of its work on the host.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritonnorm
from bench.call import Call
from bench.lab.fake_driver import fake_driver
from bench.processes import Progress, silent
from bench.record.rows import HostRow
from tritonnorm.device import KNOWN, simulated
from tritonnorm.timing import HostClock, interleaved

__all__ = ["FUNCTION", "MODULE", "SHAPES", "TORCH", "run"]

GPU = KNOWN["h100"]
MODULE, FUNCTION, TORCH = "tritonnorm.nn", "tritonnorm.functional", "torch on the CPU"
#: [N, C, H, W] in float32: one launch a direction, and several. PyTorch gets the first only; the
#: others it would spend its time computing.
SHAPES = ((2, 16, 4, 4), (8, 16, 112, 112))


def run(
    progress: Progress = silent,
    rounds: int = 21,
    calls: int = 100,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
) -> list[HostRow]:
    """Time forward, backward and both while training, and inference; variants in turn.

    Args:
        progress: told before each mode.
        rounds: samples of each variant.
        calls: of which a sample is the mean.
        shapes: of the inputs.

    Raises:
        RuntimeError: in a process that interprets kernels.
    """
    rows: list[HostRow] = []
    done = 0
    with simulated(GPU), fake_driver(multiprocessors=GPU.sms) as log:
        log.recording = False
        for shape in shapes:
            variants = {name: variant.modes() for name, variant in _variants(shape).items()}
            if shape != shapes[0]:
                del variants[TORCH]
            for mode in variants[MODULE]:
                what = f"BN+relu {mode} {'x'.join(map(str, shape))}"
                progress(done, 4 * len(shapes), what)
                with torch.set_grad_enabled(mode != "inference"):
                    timings = interleaved(
                        {name: [modes[mode]] * calls for name, modes in variants.items()},
                        HostClock(warm_up=1),
                        rounds,
                    )
                rows += [
                    HostRow(what, name, 1e6 * t.median, 1e6 * t.p20, 1e6 * t.p80, t.rounds)
                    for name, t in timings.items()
                ]
                done += 1
    progress(done, done)
    return rows


@dataclass(frozen=True)
class _Variant:
    """A way to call BN+relu: while training, in inference, and what gradients are asked for."""

    training: Callable[[], Tensor]
    inference: Callable[[], Tensor]
    inputs: list[Tensor]
    dy: Tensor

    def modes(self) -> dict[str, Callable[[], Any]]:
        """Mode -> one call."""
        y = self.training()
        return {
            "forward": self.training,
            "backward": lambda: torch.autograd.grad(y, self.inputs, self.dy, retain_graph=True),
            "forward+backward": lambda: torch.autograd.grad(self.training(), self.inputs, self.dy),
            "inference": self.inference,
        }


def _variants(shape: tuple[int, ...]) -> dict[str, _Variant]:
    call = Call(shape, dtype=torch.float32, activation="relu")
    generator = torch.Generator().manual_seed(0)
    tensors = call.tensors(generator=generator)
    settled = replace(call, training=False).tensors(generator=generator)

    def module(bn: nn.Module, apply: Callable[[nn.Module, Tensor], Tensor]) -> _Variant:
        in_eval = copy.deepcopy(bn).eval()
        return _Variant(
            lambda: apply(bn, tensors.x),
            lambda: apply(in_eval, tensors.x),
            [tensors.x, *bn.parameters()],
            tensors.dy,
        )

    ours = tritonnorm.nn.BatchNorm2d(shape[1], activation="relu")
    return {
        MODULE: module(ours, lambda bn, x: bn(x)),
        FUNCTION: _Variant(tensors.forward, settled.forward, tensors.inputs, tensors.dy),
        TORCH: module(nn.BatchNorm2d(shape[1]), lambda bn, x: F.relu(bn(x))),
    }
