"""Part 4 on a GPU: bandwidth of a few ResNet-50 layers against a roof measured in the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.call import Call, Tensors
from bench.processes import Progress, silent
from tritonnorm import reference
from tritonnorm.activation import ACTIVATIONS
from tritonnorm.device import Device
from tritonnorm.problem import minimum_bytes
from tritonnorm.timing import Clock, GpuClock, Timing, interleaved

__all__ = ["BandwidthResult", "BandwidthRow", "run"]

OURS, EAGER = "tritonnorm", "PyTorch eager"
BATCH = 64


@dataclass(frozen=True)
class BandwidthRow:
    """Time of one call by one provider.

    Attributes:
        call: what ran.
        mode: "forward", or "forward+backward".
        provider: `OURS` or `EAGER`.
        timing: seconds of one call.
        bytes: the fewest bytes of the call (`minimum_bytes`), whoever runs it.
        error: largest error of the output against float64, over the largest value; checked before
            the timing.
    """

    call: Call
    mode: str
    provider: str
    timing: Timing
    bytes: int
    error: float

    @property
    def bandwidth(self) -> float:
        """Fewest bytes over the time, in bytes per second."""
        return self.bytes / self.timing.median


@dataclass(frozen=True)
class BandwidthResult:
    """What part 4 found on a GPU: its name, the roofs in bytes per second, and the rows.

    `copy` is measured, a plain copy far larger than the cache; `theoretical` is 0 if the driver
    does not tell.
    """

    gpu: str
    theoretical: float
    copy: float
    rows: tuple[BandwidthRow, ...]


def layers() -> list[Call]:
    """The calls that are timed."""
    return [
        Call((BATCH, c, s, s), channels_last, torch.bfloat16, "relu", residual)
        for c, s, residual in ((64, 112, False), (256, 56, True), (512, 28, False), (2048, 7, True))
        for channels_last in (True, False)
    ]


def run(
    progress: Progress = silent,
    device: str = "cuda",
    calls: Sequence[Call] | None = None,
    clock: Clock | None = None,
    rounds: int = 15,
) -> BandwidthResult:
    """Measure the roof, then every call: first that its result is right, then its time.

    ``device``, ``clock`` and ``calls`` are arguments so that all but the timing can be tested on a
    CPU.

    Raises:
        RuntimeError: a result is wrong; nothing is timed then.
    """
    clock = clock or GpuClock()
    calls = layers() if calls is None else calls
    facts = Device.of(torch.device(device))
    progress(0, len(calls) + 1, "measuring the copy roof")
    copy = _copy_roof(device, facts, clock, rounds)
    rows: list[BandwidthRow] = []
    for i, call in enumerate(calls):
        progress(i + 1, len(calls) + 1, f"{call.op} {call.size} {call.layout}")
        rows += _measure(call, device, facts, clock, rounds)
    progress(len(calls) + 1, len(calls) + 1)
    return BandwidthResult(facts.name, facts.bandwidth, copy, tuple(rows))


def _copy_roof(device: str, facts: Device, clock: Clock, rounds: int) -> float:
    """Bytes per second (read plus written) of a copy of at least eight times the cache."""
    size = max(8 * facts.l2_bytes, 1 << 20)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    timing = interleaved({"copy": [lambda: target.copy_(source)]}, clock, rounds)["copy"]
    return 2 * size / timing.median


def _measure(
    call: Call, device: str, facts: Device, clock: Clock, rounds: int
) -> list[BandwidthRow]:
    forward = minimum_bytes(call.problem("forward"))
    both = forward + minimum_bytes(call.problem("backward"))
    generator = torch.Generator(device).manual_seed(0)
    # Sets of tensors taken in turn, together four times the cache: no set finds itself there again.
    sets = max(1, -(-4 * facts.l2_bytes // both))
    tensors = [call.tensors(device, generator) for _ in range(sets)]
    providers: dict[str, Callable[[Tensors], Tensor]] = {OURS: Tensors.forward, EAGER: _eager}
    errors = {name: _error(provider, tensors[0]) for name, provider in providers.items()}
    if not errors[OURS] <= 2 * errors[EAGER] + torch.finfo(call.dtype).eps:
        raise RuntimeError(f"{call}: error {errors[OURS]:.2e}, PyTorch's {errors[EAGER]:.2e}")
    rows = []
    for mode, fewest, timed in (("forward", forward, _forward), ("forward+backward", both, _both)):
        variants = {
            name: [_bind(timed, provider, t) for t in tensors]
            for name, provider in providers.items()
        }
        for name, timing in interleaved(variants, clock, rounds).items():
            rows.append(BandwidthRow(call, mode, name, timing, fewest, errors[name]))
    return rows


def _eager(t: Tensors) -> Tensor:
    y = F.batch_norm(t.x, t.running_mean, t.running_var, t.weight, t.bias, t.call.training)
    t.counter.add_(t.call.training)
    y = y if t.residual is None else y + t.residual
    return ACTIVATIONS[t.call.activation].function(y) if t.call.activation else y


def _forward(provider: Callable[[Tensors], Tensor], t: Tensors) -> object:
    with torch.no_grad():
        return provider(t)


def _both(provider: Callable[[Tensors], Tensor], t: Tensors) -> object:
    return torch.autograd.grad(provider(t), t.inputs, t.dy)


def _bind(
    timed: Callable[..., object], provider: Callable[[Tensors], Tensor], t: Tensors
) -> Callable[[], object]:
    return lambda: timed(provider, t)


def _error(provider: Callable[[Tensors], Tensor], t: Tensors) -> float:
    """Largest error of output and input gradient, each over the largest value.

    No gradient goes where the activation bends within rounding of 0: there either side is right.
    """
    x, residual = t.x.detach(), None if t.residual is None else t.residual.detach()
    weight, bias = t.weight.detach(), t.bias.detach()
    common: dict[str, Any] = {"training": t.call.training, "residual": residual}
    running = (t.running_mean, t.running_var)
    straight = reference.forward(x, *running, weight, bias, **common)
    margin = 4 * torch.finfo(t.call.dtype).eps * float(straight.y.abs().max())
    dy = torch.where(straight.y.abs() <= margin, 0.0, t.dy)
    y = provider(t)
    dx = torch.autograd.grad(y, t.x, dy)[0]
    common["activation"] = t.call.activation
    exact = reference.forward(x, *running, weight, bias, **common)
    slope = reference.backward(dy, x, exact.mean, exact.var, weight, bias, **common)
    worst = 0.0
    for found, right in ((y.detach(), exact.y), (dx, slope.dx)):
        error = float((found.double() - right).abs().max() / right.abs().max())
        worst = max(worst, error if error == error else float("inf"))
    return worst
