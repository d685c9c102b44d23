"""What every algorithm shares: configuration, arguments, interface, and the one way to launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tritonnorm.device import Device
from tritonnorm.problem import Problem

from ._epilogue import EPILOGUES, Epilogue


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
    """

    block_c: int
    block_n: int
    block_p: int
    splits: int = 1
    num_warps: int = 4

    @property
    def tile(self) -> int:
        """Elements of a tile."""
        return self.block_c * self.block_n * self.block_p

    def chunks(self, problem: Problem) -> int:
        """Tiles that cover one channel block."""
        view = problem.view
        return cdiv(view.n, self.block_n) * cdiv(view.p, self.block_p)

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
    """The device functions of an activation and its parameters; the identity has none."""

    functions: Epilogue | None = None
    args: tuple[float, ...] = ()

    @classmethod
    def named(cls, name: str, args: Sequence[float]) -> EpilogueArguments:
        """Those of an activation by name; "" is the identity."""
        return cls(EPILOGUES[name], tuple(args)) if name else cls()

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


@dataclass(frozen=True)
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
    mask: Tensor | None  # uint8 [view.mask_bytes], written
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    running_mean: Tensor | None  # [C]
    running_var: Tensor | None  # [C]
    counter: Tensor | None  # [] int64 num_batches_tracked
    momentum: float | None
    eps: float
    epilogue: EpilogueArguments


@dataclass(frozen=True)
class BackwardArguments:
    """Tensors of a backward launch; a gradient that is None is not computed."""

    dy: Tensor  # [N, C, P] dense
    x: Tensor  # [N, C, P] any strides
    mean: Tensor  # [C] accumulator dtype
    rstd: Tensor  # [C] accumulator dtype
    residual: Tensor | None  # [N, C, P] dense
    mask: Tensor | None  # uint8 [view.mask_bytes]
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    dx: Tensor | None  # [N, C, P] dense, written
    dresidual: Tensor | None  # [N, C, P] dense, written
    dweight: Tensor | None  # [C] written
    dbias: Tensor | None  # [C] written
    epilogue: EpilogueArguments


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

    def predict(self, problem: Problem, config: Config, device: Device) -> float:
        """Seconds that the launches should take: what the formula compares, and what a tuner may
        check."""

    def forward(self, problem: Problem, config: Config, a: ForwardArguments) -> None:
        """Launch the forward kernels."""

    def backward(self, problem: Problem, config: Config, a: BackwardArguments) -> None:
        """Launch the backward kernels."""


# Seconds between the starts of two dependent small launches. A rounded estimate, to be measured:
# published host times of a launch are 2.2 (compiled handle) to 11 microseconds (JIT) (tritonbench
# issue 1002).
LAUNCH_SECONDS = 3e-6
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


def advance_counter(a: ForwardArguments) -> bool:
    """Whether the running averages are cumulative (momentum None); if so the counter moves before
    the launch.

    Every program then reads the new count, and none of them writes it. The host never waits for it.
    """
    if a.momentum is not None or a.counter is None:
        return False
    a.counter.add_(1)
    return True


def launch(
    kernel: Any, grid: tuple[int, ...], x: Tensor, *args: Any, num_warps: int, **meta: Any
) -> None:
    """Launch a kernel on the device of `x`.

    Floating-point fusion is asked for explicitly: Triton 3.10 changes its default.
    """
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        _launch(kernel, grid, args, meta, num_warps)
    else:
        with torch.cuda.device(x.device):
            _launch(kernel, grid, args, meta, num_warps)


# What is launched -> the compiled kernel, and its compile-time arguments in the kernel's order.
# Triton's own look-up walks all arguments with their names and builds a string from them.
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def forget_compiled(device: int) -> None:
    """Let go of what was compiled for a device: its driver ends."""
    for key in [key for key in _compiled if key[0] == device]:
        del _compiled[key]


def _launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any], num_warps: int
) -> None:
    if not isinstance(kernel, JITFunction):  # the interpreter
        kernel[grid](*args, **meta, num_warps=num_warps, enable_fp_fusion=True)
        return
    key = _specialization(kernel, args, meta, num_warps)
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, **meta, num_warps=num_warps, enable_fp_fusion=True)
        constants = tuple(meta[name] for name in kernel.arg_names[len(args) :])
        _compiled[key] = compiled, constants
    else:
        compiled, constants = found
        compiled[grid if len(grid) == 3 else (*grid, 1, 1)[:3]](*args, *constants)


def _specialization(
    kernel: Any, args: tuple[Any, ...], meta: dict[str, Any], num_warps: int
) -> tuple[Any, ...]:
    """The device, and everything that Triton compiles a kernel anew for."""
    kinds: list[Any] = [driver.active.get_current_device(), id(kernel), num_warps]
    for value in meta.values():  # functions by identity: their own hash is of their source
        kinds.append(id(value) if isinstance(value, JITFunction) else value)
    for a in args:
        if a is None:
            kinds.append(None)
        elif type(a) is int:  # 1 is a constant; multiples of 16 are; 32 or 64 bits
            kinds.append((a == 1, a % 16 == 0, -(2**31) <= a < 2**31))
        elif type(a) is float:
            kinds.append(float)
        else:
            kinds.append((a.dtype, a.data_ptr() % 16 == 0))
    return tuple(kinds)


def power_of_two_blocks(extent: int, limit: int, floor: int) -> int:
    """The power of two between `floor` and `limit` that covers an extent with the least padding.

    Never longer than the extent needs. Padding wastes issue slots, not bandwidth, so up to 1/16
    more of it is accepted for a larger block.
    """
    best = min(limit, next_power_of_2(extent))
    floor = min(floor, best)
    candidates = [best]
    while candidates[-1] > floor:
        candidates.append(candidates[-1] // 2)
    padded = [cdiv(extent, b) * b for b in candidates]
    least = min(padded)
    return next(
        b for b, size in zip(candidates, padded, strict=True) if size <= least + least // 16
    )


def tile_shape(problem: Problem, elements: int, max_block_c: int) -> tuple[int, int, int]:
    """A tile ``(block_c, block_n, block_p)`` of about `elements` that keeps contiguous runs long.

    Channels last: channels first, up to `max_block_c`, then positions. Otherwise one channel,
    positions first (at least 64, or the whole plane: 128 bytes of 16-bit data, a cache line), then
    samples.
    """
    view = problem.view
    bits = 8 if problem.mask else 1  # a mask packs eight neighbours of the contiguous axis
    if view.channels_last:
        block_c = min(max(bits, next_power_of_2(view.c)), max_block_c)
        return block_c, 1, min(next_power_of_2(view.p), max(1, elements // block_c))
    floor = min(64, next_power_of_2(view.p))
    block_p = max(bits, power_of_two_blocks(view.p, elements, floor))
    return 1, min(next_power_of_2(view.n), max(1, elements // block_p)), block_p
