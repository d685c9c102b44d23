"""What a result depends on: GPU, driver, versions, commit, seed. No names of hosts or users."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import tritonnorm
from bench.machine import Gpu, Machine, Watch
from tritonnorm.device import Device

__all__ = ["command_line", "environment"]

ROOT = Path(__file__).resolve().parents[2]
#: Variables that change what is measured. Their values are numbers and switches; those that hold a
#: path are left out.
PREFIXES = ("TRITONNORM_", "TRITON_", "TORCHINDUCTOR_", "CUDA_DEVICE_", "CUDA_LAUNCH_", "PYTORCH_")


def environment(
    machine: Machine | None, seed: int = 0, arguments: Sequence[str] | None = None
) -> dict[str, Any]:
    """The header of a results file, as plain values.

    Args:
        machine: the GPU that is measured; None if only the CPU is.
        seed: of the run.
        arguments: of the command line; `sys.argv` by default.
    """
    return {
        "date": datetime.date.today().isoformat(),
        "command": command_line(sys.argv[1:] if arguments is None else arguments),
        "seed": seed,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if (status := _git("status", "--porcelain")) is None else bool(status),
        "gpu": _gpu(machine),
        "versions": {
            "tritonnorm": tritonnorm.__version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": str(v) if (v := torch.backends.cudnn.version()) else None,
            "driver": _driver(machine),
            "os": f"{platform.system()} {platform.machine()}",
        },
        "host": {
            "cpu": _cpu(),
            "cores": os.cpu_count() or 0,
            "threads": torch.get_num_threads(),
        },
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(PREFIXES) and os.sep not in value
        },
    }


def command_line(arguments: Sequence[str]) -> str:
    """The command to repeat a run, without the folders of this machine."""
    parts = [Path(a).name if os.sep in a else a for a in arguments]
    return " ".join(["python -m bench", *parts])


def _gpu(machine: Machine | None) -> dict[str, Any]:
    facts = Device("none", "none", 0, 0) if machine is None else machine.facts
    found: dict[str, Any] = {
        "name": facts.name,
        "arch": facts.arch,
        "sms": facts.sms,
        "l2_bytes": facts.l2_bytes,
        "bandwidth_gb_s": facts.bandwidth * 1e-9 or None,
    }
    if isinstance(machine, Gpu):
        props = torch.cuda.get_device_properties(machine.device)
        found["memory_bytes"] = props.total_memory
        found |= _watched(machine.watch)
    return found


def _watched(watch: Watch) -> dict[str, Any]:
    """What NVML tells. Kinds of clock: 1 SM, 2 memory (nvml.h, nvmlClockType_t)."""
    milliwatt = watch.ask("GetEnforcedPowerLimit")
    ecc, mig = watch.ask("GetEccMode"), watch.ask("GetMigMode")
    others = watch.ask("GetComputeRunningProcesses")
    return {
        "sm_mhz_max": watch.ask("GetMaxClockInfo", 1),
        "sm_mhz": watch.ask("GetClockInfo", 1),
        "memory_mhz": watch.ask("GetClockInfo", 2),
        "power_limit_w": None if milliwatt is None else milliwatt / 1000,
        "temperature_c": watch.ask("GetTemperature", 0),
        "ecc": bool(ecc[0]) if ecc else None,
        "mig": bool(mig[0]) if mig else None,
        "other_processes": None if others is None else len(others) > 1,
    }


def _driver(machine: Machine | None) -> str | None:
    if not isinstance(machine, Gpu):
        return None
    try:
        import pynvml

        version = pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # no NVML: not worth failing for
        return None
    return version.decode() if isinstance(version, bytes) else str(version)


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
