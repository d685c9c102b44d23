"""What every algorithm shares: configuration, arguments, interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tritonnorm.device import Device
from tritonnorm.problem import Problem

from ._epilogue import EPILOGUES, Epilogue
from .launch import Launch as Launch
from .launch import forget_compiled as forget_compiled
from .launch import launches_to as launches_to
from .launch import made_for as made_for


# Triton has both, but as functions for kernels too: a call from the host costs microseconds.
def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Config:
    """The shape of a launch. All block sizes are powers of two.

    Attributes:
        block_c: channels of a tile.
        block_n: samples of a tile.
        block_p: positions of a tile.
        splits: programs that share the chunks of one channel block.
        num_warps: warps of a program.
        kept: chunks of a program that stay in its registers (`persistent`); 0 if it overlaps the
            second pass over a group of channel blocks with the first over the next.
        at_once: channel blocks that are worked on at the same time (`persistent`).
        evict_first: whether data accessed once are to leave the cache first (`persistent`).
    """

    block_c: int
    block_n: int
    block_p: int
    splits: int = 1
    num_warps: int = 4
    kept: int = 0
    at_once: int = 0
    evict_first: bool = False

    @property
    def tile(self) -> int:
        """Elements of a tile."""
        return self.block_c * self.block_n * self.block_p

    def chunks(self, problem: Problem) -> int:
        """Tiles that cover one channel block."""
        view = problem.view
        return cdiv(view.n, self.block_n) * cdiv(view.p, self.block_p)

    @property
    def meets(self) -> bool:
        """Whether programs wait for each other."""
        return self.at_once > 0

    @property
    def overlaps(self) -> bool:
        """Whether programs that wait for each other first go on with the next group."""
        return self.meets and self.kept == 0

    def channel_blocks(self, problem: Problem) -> int:
        return cdiv(problem.view.c, self.block_c)

    def geometry(self, problem: Problem) -> dict[str, Any]:
        """The compile-time arguments that describe tiles, the same for every kernel."""
        return {
            "VEC": problem.vector,
            "BLOCK_C": self.block_c,
            "BLOCK_N": self.block_n,
            "BLOCK_P": self.block_p,
            "CHANNELS_LAST": problem.view.channels_last,
        }


@dataclass(frozen=True)
class EpilogueArguments:
    """The device functions of an activation and its parameters; the identity has none.

    A prelu has none either: its slope is a tensor, and the kernels that get one apply it. Its one
    parameter is the distance of the slopes of neighbouring channels: 1, or 0 if they share one.
    """

    functions: Epilogue | None = None
    args: tuple[float, ...] = ()

    @classmethod
    def named(cls, name: str, args: Sequence[float]) -> EpilogueArguments:
        """Those of an activation by name; "" is the identity."""
        if not name:
            return cls()
        return cls(None if name == "prelu" else EPILOGUES[name], tuple(args))

    def forward(self) -> dict[str, Any]:
        f = self.functions
        return {"ACT": f and f.forward, "GATE": f and f.gate, **self._parameters()}

    def backward(self) -> dict[str, Any]:
        f = self.functions
        gradient = {"GRADIENT": f and f.gradient, "GATE": f and f.gate, "GATED": f and f.gated}
        return gradient | self._parameters()

    def _parameters(self) -> dict[str, float | None]:
        a, b = (*self.args, None, None)[:2]
        return {"A": a, "B": b}


@dataclass(slots=True)  # frozen, each field would cost a call
class ForwardArguments:
    """Tensors and scalars of a forward launch. C-vectors are contiguous; x alone may have its own
    strides.

    With given statistics, `running_mean` and `running_var` are those and stay as they are, and
    `mean` and `rstd` are None unless a backward will need them.
    """

    x: Tensor  # [N, C, P] any strides
    y: Tensor  # [N, C, P] dense, written
    mean: Tensor | None  # [C] accumulator dtype, written
    rstd: Tensor | None  # [C] accumulator dtype, written
    residual: Tensor | None  # [N, C, P] dense
    mask: Tensor | None  # uint8 [problem.mask_room], written
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    running_mean: Tensor | None  # [C]
    running_var: Tensor | None  # [C]
    counter: Tensor | None  # [] int64 num_batches_tracked
    momentum: float | None
    eps: float
    slope: Tensor | None = None  # [C] or [1]


@dataclass(slots=True)
class BackwardArguments:
    """Tensors of a backward launch; a gradient that is None is not computed."""

    dy: Tensor  # [N, C, P] dense
    x: Tensor  # [N, C, P] any strides
    mean: Tensor  # [C] accumulator dtype
    rstd: Tensor  # [C] accumulator dtype
    residual: Tensor | None  # [N, C, P] dense
    mask: Tensor | None  # uint8 [problem.mask_room]
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    dx: Tensor | None  # [N, C, P] dense, written
    dresidual: Tensor | None  # [N, C, P] dense, written
    dweight: Tensor | None  # [C] written
    dbias: Tensor | None  # [C] written
    slope: Tensor | None = None  # [C] or [1]
    dslope: Tensor | None = None  # [C] accumulator dtype, written: those of the channels


class Algorithm(Protocol):
    """One way to compute a batch norm, forward and backward. Everything about it lies in one
    file."""

    name: str

    def supports(self, problem: Problem, device: Device) -> str | None:
        """None if it can compute the problem on the device, else the reason in words."""

    def heuristic(self, problem: Problem, device: Device) -> Config:
        """The configuration that a formula picks."""

    def configs(self, problem: Problem, device: Device) -> list[Config]:
        """The configurations worth timing, the heuristic's first."""

    def model_bytes(self, problem: Problem, config: Config) -> int:
        """The bytes of activations (and mask) that the kernels load and store, to the byte."""

    def dram_bytes(self, problem: Problem, config: Config, device: Device) -> float:
        """Those of them that should go through DRAM: without what is read again from the L2
        cache."""

    def predict(self, problem: Problem, config: Config, device: Device) -> float:
        """Seconds that the launches should take: what the formula compares, and what a tuner may
        check."""

    def forward(
        self, problem: Problem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[ForwardArguments], None]:
        """Everything that does not depend on tensors, done once. What comes back launches the
        kernels."""

    def backward(
        self, problem: Problem, config: Config, epilogue: EpilogueArguments
    ) -> Callable[[BackwardArguments], None]:
        """The same for the gradients."""


# Seconds between the starts of two dependent small launches. A rounded estimate, to be measured:
# published host times of a launch are 2.2 (compiled handle) to 11 microseconds (JIT) (tritonbench
# issue 1002).
LAUNCH_SECONDS = 3e-6
# The share of the L2 cache that a second read may count on, beside what is written at the same
# time: an ideal cache's share (`tests/compiled/test_cache.py`); a GPU's is to be measured.
L2_SHARE = 0.5
DEFAULT_BANDWIDTH = 1e12  # where a device does not tell its own; only ratios matter then


def predicted_seconds(
    device: Device, dram_bytes: float, programs: int, launches: int, programs_per_sm: int = 1
) -> float:
    """Launch gaps, plus bytes over bandwidth, slower where programs are fewer than fill the
    device."""
    busy = min(1.0, programs / (device.sms * programs_per_sm))
    return launches * LAUNCH_SECONDS + dram_bytes / (device.bandwidth or DEFAULT_BANDWIDTH) / busy


def x_strides(problem: Problem) -> tuple[int | None, int | None, int | None]:
    """The stride arguments of x: None where x is dense, which leaves them out of the compiled
    kernel."""
    return problem.view.strides or (None, None, None)


# The share of the registers for what stays that can be filled before something spills, in the
# derivative of a smooth activation (BN+silu, 64x240x14x14, sm_90 and sm_100: 8 with all, 0 with
# 7/8), and on gfx942 (BN+relu forward, 65536 values of a channel: 22 with all, 0 with 7/8).
MOST_FILLED = 0.875


def registers_kept(problem: Problem) -> float:
    """32-bit registers of an element that stays in a program: x, and in backward all else that is
    read, as it is.

    Values of 16 bits that are loaded one by one take a register each: with half of one counted, the
    backward of BN+relu in bf16 on 256 planes of 7 by 7 spills 56 of them on sm_80 and sm_90. So do
    bytes of a mask, with the bits of eight elements.
    """
    own = max(problem.dtype.itemsize, 4 if problem.vector == 1 else 0) / 4
    if problem.direction == "forward":
        return own
    return own * (2 + problem.reads_residual) + problem.mask / 8


def mask_in_words(config: Config, problem: Problem) -> bool:
    """Whether a tile has whole words of 32 bits of a mask: pipelined loops load nothing smaller."""
    return problem.mask and config.block_p >= (4 if problem.view.channels_last else 32)


def advance_counter(a: ForwardArguments) -> bool:
    """Whether the running averages are cumulative (momentum None); if so the counter moves before
    the launch.

    Every program then reads the new count, and none of them writes it. The host never waits for it.
    """
    if a.momentum is not None or a.counter is None:
        return False
    a.counter.add_(1)
    return True
