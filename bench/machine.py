"""The GPU that is measured: its clock, its memory, and a watch over its clocks.

Everything that a run asks of the hardware goes through `Machine`, so that the whole harness can be
tested with one that is made up.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from tritonnorm.device import Device
from tritonnorm.timing import Clock, GpuClock, HostClock, interleaved

__all__ = ["Gpu", "Machine", "NoGpu", "Watch"]

Call = Callable[[], Any]

#: NVML's reasons for clocks below those asked for that spoil a measurement (nvml.h,
#: nvmlClocksEventReasons): power cap, hardware slowdown, software thermal, hardware thermal, power
#: brake.
SPOILING = 0x04 | 0x08 | 0x20 | 0x40 | 0x80


class NoGpu(RuntimeError):
    """There is no GPU to measure."""


class Machine(Protocol):
    """What a run needs of the hardware.

    Attributes:
        device: where the tensors are.
        facts: what the planner knows of it.
        clock: measures a run of calls.
    """

    device: torch.device
    facts: Device
    clock: Clock

    def accept(self) -> bool:
        """Whether what was just measured may count; called after each round."""

    def throttled(self) -> bool:
        """Whether rounds had to be refused since this was last asked."""

    def sm_mhz(self) -> float | None:
        """Clock of the multiprocessors now."""

    def host_seconds(self, call: Call) -> float | None:
        """Host time of a call, from entry to return, with the GPU far behind or not at all."""

    def peak_bytes(self, call: Call) -> int | None:
        """Device memory that a call adds at its highest."""

    def free_bytes(self) -> int | None:
        """Device memory that is free."""


class Watch:
    """NVML's view of one GPU, as far as it is to be had; without it, nothing is known."""

    WAIT = 0.05  # seconds; nvbench waits as long after a throttled sample
    LONGEST = 1.0

    def __init__(self, uuid: str | None) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        self._wait = self.WAIT
        self._refused = False
        with contextlib.suppress(Exception):  # no driver, no library, no right to ask
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
            self._nvml = pynvml

    def ask(self, question: str, *args: Any) -> Any:
        """The answer to an NVML query by name without its ``nvmlDevice`` prefix, or None."""
        with contextlib.suppress(Exception):
            return getattr(self._nvml, f"nvmlDevice{question}")(self._handle, *args)
        return None

    def accept(self) -> bool:
        """False, after a pause that grows, while the driver holds the clocks down."""
        reasons = self.ask("GetCurrentClocksEventReasons")
        if reasons is None:
            reasons = self.ask("GetCurrentClocksThrottleReasons") or 0
        if not reasons & SPOILING:
            self._wait = self.WAIT
            return True
        self._refused = True
        time.sleep(self._wait)
        self._wait = min(2 * self._wait, self.LONGEST)
        return False

    def throttled(self) -> bool:
        """Whether `accept` refused since this was last asked."""
        refused, self._refused = self._refused, False
        return refused

    def sm_mhz(self) -> float | None:
        """Clock of the multiprocessors now."""
        clock = self.ask("GetClockInfo", getattr(self._nvml, "NVML_CLOCK_SM", 1))
        return None if clock is None else float(clock)


class Gpu:
    """A CUDA or ROCm device."""

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise NoGpu("PyTorch finds no GPU")
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        self.facts = Device.of(self.device)
        self.clock: Clock = GpuClock()
        uuid = getattr(torch.cuda.get_device_properties(self.device), "uuid", None)
        self.watch = Watch(None if uuid is None else str(uuid))
        self.accept = self.watch.accept
        self.throttled = self.watch.throttled
        self.sm_mhz = self.watch.sm_mhz

    def host_seconds(self, call: Call) -> float | None:
        class Synchronized(HostClock):
            """The host's clock, with the GPU idle when it starts."""

            def prepare(self, calls: Any) -> Callable[[], float]:
                measure = super().prepare(calls)

                def synchronized() -> float:
                    torch.cuda.synchronize()
                    return measure()

                return synchronized

        # 20 calls of at most some ten launches each do not fill the queue of 1024 launches, so no
        # call waits for the GPU.
        return interleaved({"call": [call] * 20}, Synchronized(), rounds=9)["call"].median

    def peak_bytes(self, call: Call) -> int | None:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        kept = call()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated(self.device) - before

    def free_bytes(self) -> int | None:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]
