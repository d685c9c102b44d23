"""What a plan needs to know about a GPU. Nothing here touches CUDA until a device is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Silicon facts of one GPU; constructible by hand, so that plans can be made and tested without
    it.

    Attributes:
        name: product name, for people only.
        arch: "sm_90", "gfx942", or "interpreter" for Triton's interpreter on the CPU.
        sms: streaming multiprocessors (compute units).
        l2_bytes: size of the last-level cache that all of them share.
        bandwidth: theoretical DRAM bandwidth in bytes per second, 0 if unknown.
        warp: threads of a warp (wavefront).
        bus_bits: width of the memory bus, 0 if unknown.
        memory_khz: highest clock of the memory, as the driver tells it, 0 if unknown.
        held: multiprocessors that kernels of other streams may hold for long, as those of
            collectives do. Programs that wait for each other leave them free.
    """

    name: str
    arch: str
    sms: int
    l2_bytes: int
    bandwidth: float = 0.0
    warp: int = 32
    bus_bits: int = 0
    memory_khz: int = 0
    held: int = 0

    def __post_init__(self) -> None:
        facts = (self.name, *self.identity.values(), self.bandwidth, self.warp)
        object.__setattr__(self, "_hash", hash(facts))

    def __hash__(self) -> int:
        """Worked out once: a device is part of the key of every call."""
        return self._hash  # type: ignore[attr-defined]

    @property
    def identity(self) -> dict[str, str | int]:
        """The facts that tell one kind of GPU from another, whatever its label says.

        A MIG slice has fewer multiprocessors and less cache than the whole, and the 40 and 80 GB
        parts of one product have different memory.
        """
        return {
            "arch": self.arch,
            "sms": self.sms,
            "l2_bytes": self.l2_bytes,
            "bus_bits": self.bus_bits,
            "memory_khz": self.memory_khz,
        }

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """Describe a GPU; for the CPU the interpreter, or what is `simulated`."""
        found = _described.get(device)
        if found is None:
            if device == torch.device("cuda"):
                return cls.of(torch.device("cuda", torch.cuda.current_device()))
            found = _described[device] = _probe(device)
        return found


INTERPRETER = Device("Triton interpreter", "interpreter", sms=4, l2_bytes=1 << 20)

# Known GPUs, for planning without one. Product data sheets; bandwidth in bytes per second.
KNOWN: dict[str, Device] = {
    "a100": Device("NVIDIA A100 80GB", "sm_80", 108, 40 << 20, 2.04e12),
    "h100": Device("NVIDIA H100 80GB", "sm_90", 132, 50 << 20, 3.35e12),
    "h200": Device("NVIDIA H200", "sm_90", 132, 60 << 20, 4.8e12),
    "b200": Device("NVIDIA B200", "sm_100", 148, 126 << 20, 7.7e12),
    "mi300x": Device("AMD Instinct MI300X", "gfx942", 304, 256 << 20, 5.3e12, warp=64),
}


# Data sheets: bandwidth in bytes per second and last-level cache (Infinity Cache where there is
# one) of what HIP shows as one device. The driver's figures would not do: it reports the clock of
# the memory controller, a half to two thirds of what the formula needs, and the L2 in front of the
# Infinity Cache.
AMD: dict[str, tuple[float, int]] = {
    "MI210": (1.638e12, 8 << 20),
    "MI250": (1.638e12, 8 << 20),  # MI250, MI250X: half a package is a device
    "MI300": (5.3e12, 256 << 20),
    "MI325": (6.0e12, 256 << 20),
    "MI350": (8.0e12, 256 << 20),
    "MI355": (8.0e12, 256 << 20),
    "RX 7900 XTX": (0.96e12, 96 << 20),
    "RX 9070": (0.64e12, 64 << 20),
}

_CPU = torch.device("cpu")
_described = {_CPU: INTERPRETER}  # by device, as every call asks


@contextlib.contextmanager
def simulated(device: Device) -> Iterator[None]:
    """Within the context CPU tensors count as lying on ``device``: plans are made, and kernels
    launched, for it.

    For audits without a GPU, under a driver that records launches instead of running them.
    """
    before = _described[_CPU]
    _stand_in(device)
    try:
        yield
    finally:
        _stand_in(before)


def _stand_in(device: Device) -> None:
    _described[_CPU] = device
    for call in _listeners:
        call()


_listeners: list[Callable[[], None]] = []


def on_simulation(call: Callable[[], None]) -> None:
    """Have ``call`` called whenever CPU tensors begin or end to count as lying elsewhere."""
    _listeners.append(call)


def is_simulated() -> bool:
    """Whether CPU tensors count as lying on a GPU at the moment."""
    return _described[_CPU] is not INTERPRETER


def _probe(device: torch.device) -> Device:
    if device.type == "cpu":
        return INTERPRETER
    if device.type != "cuda":
        raise ValueError(f"device: expected a CUDA or ROCm device, got {device.type!r}")
    props = torch.cuda.get_device_properties(device)
    hip = torch.version.hip is not None
    arch = props.gcnArchName.split(":")[0] if hip else f"sm_{props.major}{props.minor}"
    l2_bytes = getattr(props, "L2_cache_size", 0) or 0
    # 0 where the driver does not tell (unified memory parts).
    clock = getattr(props, "memory_clock_rate", 0) or 0
    width = getattr(props, "memory_bus_width", 0) or 0
    if hip:
        known = next((facts for name, facts in AMD.items() if name in props.name), None)
        bandwidth, l2_bytes = known or (0.0, l2_bytes)
    else:
        # kHz times bits, double data rate.
        bandwidth = 2.0 * clock * 1e3 * width / 8
    return Device(
        name=props.name,
        arch=arch,
        sms=props.multi_processor_count,
        l2_bytes=l2_bytes,
        bandwidth=bandwidth,
        warp=getattr(props, "warp_size", 64 if hip else 32),
        bus_bits=width,
        memory_khz=clock,
    )
