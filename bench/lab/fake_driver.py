"""Launch compiled kernels on CPU tensors: everything happens but the launch itself.

Inside :func:`fake_driver` a ``kernel[grid](...)`` specialises its arguments, compiles for the given
target and calls the launcher, as on a GPU. The launcher writes a record instead. That shows which
kernels a call launches, with which grid and arguments, how many variants are compiled, and what a
call costs on the host. Nothing is computed: outputs keep whatever they held.

Not usable in a process that interprets kernels.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as triton_driver
from triton.runtime.jit import JITFunction

from tritonnorm.kernels.base import forget_compiled
from tritonnorm.tune.static import KernelReport, inspect_compiled

__all__ = ["FakeDriver", "HostTime", "LaunchRecord", "Variant", "fake_driver", "host_time"]

# triton caches kernels and device properties by device number: a number never used before gives
# each driver its own caches, so that one target's kernels are not taken for another's.
_device_numbers = itertools.count(10_000)
# By triton's hash of source, options and target, and by whether the kernel was disassembled.
_reports: dict[tuple[str, bool], KernelReport] = {}


@dataclass(frozen=True)
class LaunchRecord:
    """One launch: kernel name, grid, launch options and the arguments by parameter name.

    `variant` is the index of the compiled form that ran, in `FakeDriver.variants`.
    """

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    cooperative: bool
    arguments: dict[str, Any]
    variant: int


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel: argument types, constants, and what is known of alignment."""

    kernel: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    num_warps: int


@dataclass
class FakeDriver:
    """What happened while this driver was active. `launches` and `variants` are in order."""

    target: GPUTarget
    launches: list[LaunchRecord] = field(default_factory=list)
    variants: list[Variant] = field(default_factory=list)
    recording: bool = True
    _sources: list[Any] = field(default_factory=list)  # of the variants
    _device: int = 0

    def variant_count(self, kernel: str | None = None) -> int:
        """Compiled variants of the kernel of that name, or of all kernels."""
        return sum(kernel in (None, v.kernel) for v in self.variants)

    def compiled(self, launch: LaunchRecord) -> Any:
        """The kernel of triton that a launch ran.

        Only while the driver is active: it then lets go of its kernels.
        """
        source = self._sources[launch.variant]
        caches = source.fn.device_caches
        for compiled in caches[self._device][0].values() if self._device in caches else ():
            if compiled.src is source:
                return compiled
        raise RuntimeError(f"the driver that compiled {launch.kernel} is no longer active")

    def report(self, launch: LaunchRecord, disassemble: bool = True) -> KernelReport:
        """The machine code that a launch ran; `disassemble` as in `inspect_compiled`."""
        compiled = self.compiled(launch)
        key = (compiled.hash, disassemble)
        if key not in _reports:
            _reports[key] = inspect_compiled(compiled, disassemble)
        return _reports[key]


@dataclass(frozen=True)
class HostTime:
    """Host time of one call in microseconds: the median and the least of the repeats."""

    median_us: float
    least_us: float
    calls: int
    repeats: int


Launcher = Callable[[FakeDriver, LaunchRecord], None]


def _recorded(log: FakeDriver, launch: LaunchRecord) -> None:
    log.launches.append(launch)


@contextlib.contextmanager
def fake_driver(
    target: GPUTarget | None = None,
    *,
    multiprocessors: int = 132,
    shared_memory: int = 232_448,
    launch: Launcher | None = None,
) -> Iterator[FakeDriver]:
    """Make triton believe in a GPU for the length of the block, then restore what was there.

    Args:
        target: what to compile for; sm_90 by default.
        multiprocessors: reported to code that asks the driver for device properties.
        shared_memory: the same, in bytes per program; kernels that need more raise OutOfResources.
        launch: called with each launch, in place of a record of it.

    Raises:
        RuntimeError: in a process that interprets kernels (``TRITON_INTERPRET=1``).
    """
    if not isinstance(tl.sum, JITFunction):
        raise RuntimeError("TRITON_INTERPRET is on in this process: kernels are not compiled here")
    target = target or GPUTarget("cuda", 90, 32)
    device = next(_device_numbers)
    log = FakeDriver(target, _device=device)
    launch = launch or _recorded
    properties = {
        "max_shared_mem": shared_memory,
        "multiprocessor_count": multiprocessors,
        "warpSize": target.warp_size,
        "max_num_regs": 65_536,
    }
    # The attribute behind `active`; reading `active` itself would look for a real GPU.
    slot = "_active" if hasattr(triton_driver, "_active") else "active"  # triton 3.4: active
    previous = getattr(triton_driver, slot)
    triton_driver.set_active(_driver(log, device, properties, launch))
    try:
        yield log
    finally:
        # First the kernels: triton 3.9 asks the active driver to unload those that go.
        forget_compiled(device)
        for function in {source.fn for source in log._sources}:
            function.device_caches.pop(device, None)
        setattr(triton_driver, slot, previous)


def host_time(call: Callable[[], Any], *, calls: int = 200, repeats: int = 15) -> HostTime:
    """Measure the host time of `call`, after one warm-up, as the median over `repeats` loops.

    Under :func:`fake_driver`, set ``log.recording = False`` first: writing records takes time too.
    The launcher here is an empty Python function; on a GPU it is C code that talks to the driver.
    """
    call()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter_ns() - start) / calls / 1000)
    return HostTime(statistics.median(samples), min(samples), calls, repeats)


def _driver(log: FakeDriver, device: int, properties: dict[str, int], launch: Launcher) -> Any:
    """An object with the parts of a triton driver that specialising and launching touch."""

    class Launcher:
        """Made once per compiled variant; called once per launch."""

        def __init__(self, source: Any, metadata: Any) -> None:
            self._kernel = source.fn.__name__
            self._names = list(source.fn.arg_names)
            self._num_warps = metadata.num_warps
            self._num_stages = getattr(metadata, "num_stages", 0)
            self._cooperative = bool(getattr(metadata, "launch_cooperative_grid", False))
            self._variant = len(log.variants)
            log._sources.append(source)
            log.variants.append(
                Variant(
                    kernel=self._kernel,
                    signature=dict(source.signature),
                    constants=dict(source.constants),
                    attributes=dict(source.attrs),
                    num_warps=metadata.num_warps,
                )
            )

        def __call__(
            self,
            x: int,
            y: int,
            z: int,
            stream: int,
            function: Any,
            packed_metadata: Any,
            launch_metadata: Any,
            enter_hook: Any,
            exit_hook: Any,
            *arguments: Any,
        ) -> None:
            if enter_hook is not None:
                enter_hook(launch_metadata)
            if log.recording:
                record = LaunchRecord(
                    kernel=self._kernel,
                    grid=(x, y, z),
                    num_warps=self._num_warps,
                    num_stages=self._num_stages,
                    cooperative=self._cooperative,
                    arguments=dict(zip(self._names, arguments, strict=True)),
                    variant=self._variant,
                )
                launch(log, record)

    class Utils:
        """Stands for the driver's binary loader and device queries."""

        @staticmethod
        def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
            return name, name, 0, 0, 1024  # module, function, registers, spills, most threads

        @staticmethod
        def unload_module(module: Any) -> None:
            return None

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return properties

    class Driver:
        launcher_cls = Launcher
        utils = Utils()

        @staticmethod
        def get_current_target() -> GPUTarget:
            return log.target

        @staticmethod
        def get_current_device() -> int:
            return device

        @staticmethod
        def get_current_stream(device: int) -> int:
            return 0

        @staticmethod
        def get_active_torch_device() -> torch.device:
            return torch.device("cpu")

        @staticmethod
        def get_device_interface() -> Any:
            return torch.cpu

    return Driver()
