"""How near a kernel comes to limits other than bandwidth: to those of instructions and latency."""

from __future__ import annotations

from tritonnorm.device import Device
from tritonnorm.tune.static import KernelReport

__all__ = ["ISSUED", "LATENCY", "issue", "programs", "wait"]

# Target -> instructions of threads that its GPU issues in a second. For the H200 NVIDIA gives 67
# TFLOPS of float32, two for every fused multiply-add that its multiprocessors issue.
ISSUED = {"sm_90": 67e12 / 2}
# The most of its bytes' time that a kernel may need to issue its instructions; the second where
# every element has an address of its own: BN+add+relu on planes of 7 by 7 needs 1.23, too much.
MOST_ISSUE, MOST_ISSUE_ALONE = 1.0, 1.25
# The same of waiting for memory, where there are loops, and of code that runs once: that begins and
# ends with trips for what channels have one of (running statistics: 3 of 4 waits of `resident`).
MOST_WAIT, MOST_WAIT_ONCE = 1.0, 2.0
# Bytes of x from which a wait is a fault: smaller ones have too few programs to fill a GPU.
LARGE = 32 << 20
# Seconds from a load to its data while DRAM is busy: an estimate, to be measured on an H200.
LATENCY = 0.8e-6
# What programs on one multiprocessor share, by NVIDIA's tables of compute capabilities.
REGISTERS, WARPS, PROGRAMS = 65_536, 64, 32
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
SYSTEM = 1 << 10  # bytes of shared memory that each program takes besides its own


def issue(report: KernelReport, device: Device) -> float:
    """The share of the time that its bytes take which a kernel's busiest loop needs to issue its
    instructions; 0 where that is not known."""
    issued = ISSUED.get(device.arch)
    if issued is None:
        return 0.0
    most = max((each.instructions / each.bytes for each in report.loops), default=0.0)
    return most * device.bandwidth / issued


def programs(report: KernelReport, device: Device, warps: int, grid: int) -> int:
    """Programs of a launch that one multiprocessor holds at once; 0 where that is not known.

    Args:
        report: of the kernel.
        device: the GPU.
        warps: of a program.
        grid: programs of the launch.
    """
    shared = SHARED.get(device.arch)
    if shared is None:
        return 0
    registers = -(-report.registers // 8) * 8  # as they are dealt out
    return min(
        REGISTERS // (registers * warps * device.warp),
        shared // (report.shared + SYSTEM),
        WARPS // warps,
        PROGRAMS,
        -(-grid // device.sms),
    )


def wait(report: KernelReport, device: Device, threads: int) -> float:
    """The share of the time that its bytes take which a kernel waits for memory, in the loop that
    waits most, or in all of it if it has none; 0 where that is not known.

    By Little's law: 1 where the bytes on their way to a multiprocessor are as many as its share of
    the bandwidth moves in the time that one load takes.

    Args:
        report: of the kernel.
        device: the GPU.
        threads: on one multiprocessor.
    """
    if not threads:
        return 0.0
    loops = [each for each in report.loops if each.inner] or report.loops
    most = max((each.waits / each.bytes for each in loops), default=0.0)
    return most * LATENCY * device.bandwidth / device.sms / threads
