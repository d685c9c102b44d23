"""The traffic audit: bytes that each algorithm really moves, counted in the interpreter.

Needs a process in which ``TRITON_INTERPRET=1`` was set before triton was imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from bench.call import DIRECTIONS, Call, Direction
from bench.lab.scheduler import interleaved
from bench.lab.traffic import LaunchTraffic, trace
from bench.layers import RESNET50, twin
from bench.norm_call import NormCall
from bench.processes import Progress, silent
from tritonnorm.device import KNOWN, Device, simulated
from tritonnorm.kernels import BY_NAME, algorithms_for
from tritonnorm.kernels.base import Config
from tritonnorm.plan import fewest_bytes, force_plan, plan

__all__ = ["TrafficRow", "count", "count_all", "layer_calls"]

#: Kernel arguments that are activations or masks; what else a kernel has is per channel, or
#: workspace.
ACTIVATIONS = tuple(
    f"{name}_ptr" for name in ("x", "y", "dy", "dx", "residual", "dresidual", "mask")
)


@dataclass(frozen=True)
class TrafficRow:
    """One direction of one call by one algorithm. All figures are bytes.

    Attributes:
        call, algorithm, direction, config: what ran.
        counted: loaded and stored of activations and mask.
        model: what the algorithm says it moves (`Algorithm.model_bytes`).
        minimum: the fewest bytes of the problem (`fewest_bytes`).
        tensors: the counted bytes by tensor, as (loaded, stored).
        vectors: loaded and stored of per-channel vectors and workspace; no model counts them.
        kernels: names of the kernels launched, in order.
    """

    call: Call | NormCall
    algorithm: str
    direction: Direction
    config: Config
    counted: int
    model: int
    minimum: int
    tensors: dict[str, tuple[int, int]]
    vectors: int
    kernels: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Bytes counted over the fewest."""
        return self.counted / self.minimum

    @property
    def exact(self) -> bool:
        """Whether what was counted is what the model says, to the byte."""
        return self.counted == self.model


def count(
    call: Call | NormCall,
    algorithm: str,
    device: Device = KNOWN["h200"],
    config: Config | None = None,
    directions: Sequence[Direction] = DIRECTIONS,
) -> list[TrafficRow]:
    """Run a call forward and backward by one algorithm, and count.

    Args:
        call: what to run; its values are random.
        algorithm: name of one that supports it.
        device: whose configurations are used; nothing of it is needed.
        config: the configuration, by default the algorithm's formula for each direction.
        directions: those to report; forward runs in any case.

    Raises:
        ValueError: the algorithm does not support the problem.
        OutOfBoundsError, RaceError: a kernel touched what it must not.
        RuntimeError: something else than the kernels of the algorithm ran.
    """
    tensors = call.tensors(generator=torch.Generator().manual_seed(0))
    y: torch.Tensor | None = None
    rows = []
    for direction in DIRECTIONS:
        problem = call.problem(direction)
        if (reason := BY_NAME[algorithm].supports(problem, device)) is not None:
            raise ValueError(f"algorithm: {algorithm} cannot run {call} {direction}: {reason}")
        used = config or BY_NAME[algorithm].heuristic(problem, device)
        with simulated(device), force_plan(algorithm, used):
            chosen = plan(problem, device)
            meeting = interleaved() if used.meets else contextlib.nullcontext()
            with trace() as traffic, meeting:
                if y is None:
                    y = tensors.forward()
                else:
                    tensors.backward(y)
        traffic.raise_on_race()
        if (chosen.algorithm, chosen.config) != (algorithm, used) or not traffic.launches:
            raise RuntimeError(f"{algorithm} {direction} of {call}: something else ran")
        if direction in directions:
            row = TrafficRow(
                *(call, algorithm, direction, used, 0),
                model=BY_NAME[algorithm].model_bytes(problem, used),
                minimum=fewest_bytes(problem),
                tensors={},
                vectors=0,
                kernels=tuple(launch.kernel for launch in traffic.launches),
            )
            rows.append(_with_bytes(row, traffic.launches))
        if direction == directions[-1]:
            break
    return rows


def _with_bytes(row: TrafficRow, launches: Sequence[LaunchTraffic]) -> TrafficRow:
    tensors: dict[str, tuple[int, int]] = {}
    vectors = 0
    for launch in launches:
        for name, (loaded, stored, atomic) in launch.arguments.items():
            if name in ACTIVATIONS:
                before = tensors.get(name.removesuffix("_ptr"), (0, 0))
                tensors[name.removesuffix("_ptr")] = (before[0] + loaded, before[1] + stored)
            else:
                vectors += loaded + stored + atomic
    counted = sum(loaded + stored for loaded, stored in tensors.values())
    return replace(row, counted=counted, tensors=tensors, vectors=vectors)


def layer_calls(quick: bool = False) -> list[Call]:
    """Twins of the ResNet-50 layers in both layouts as BN, BN+relu and BN+add+relu, and inference.

    ``quick``: the deepest layers, one epilogue per layout, and inference.
    """
    shapes = list(dict.fromkeys(twin(layer.shape(256)) for layer in RESNET50))
    if quick:
        first = [Call(shapes[-1], channels_last=False, activation="relu", residual=True)]
        second = [Call(shapes[-1], True, activation="relu", training=t) for t in (True, False)]
        return first + second
    return [
        Call(shape, channels_last, activation=activation, residual=residual, training=training)
        for shape in shapes
        for channels_last in (False, True)
        for activation, residual, training in (
            (None, False, True),
            ("relu", False, True),
            ("relu", True, True),
            ("relu", True, False),
        )
    ]


def _units(
    calls: Sequence[Call | NormCall], device: Device
) -> Iterator[tuple[Call | NormCall, str]]:
    for call in calls:
        for algorithm in algorithms_for(call.problem("forward")):
            if all(algorithm.supports(call.problem(d), device) is None for d in DIRECTIONS):
                yield call, algorithm.name


def count_all(
    progress: Progress = silent,
    calls: Sequence[Call | NormCall] | None = None,
    device: str = "h200",
) -> list[TrafficRow]:
    """`count` every call with all algorithms that support it, configured for a known device."""
    units = list(_units(layer_calls() if calls is None else calls, KNOWN[device]))
    rows: list[TrafficRow] = []
    for i, (call, algorithm) in enumerate(units):
        progress(i, len(units), f"{algorithm} {call.op} {call.size} {call.layout}")
        rows += count(call, algorithm, KNOWN[device])
    progress(len(units), len(units))
    return rows
