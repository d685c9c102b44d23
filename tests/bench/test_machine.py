"""What is asked of the hardware: the watch over the clocks, memory, host time, the environment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bench import machine as module
from bench.machine import Gpu, NoGpu, Watch
from bench.record.environment import environment
from bench.record.rows import TABLES
from bench.record.schema import SCHEMA, fault
from tests.bench.simulated import SimulatedGpu
from tritonnorm import device

ROOT = Path(__file__).resolve().parents[2]


class Nvml(types.ModuleType):
    """As much of NVML as is asked, for one GPU."""

    NVML_CLOCK_SM = 1

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.reasons = 0

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> str:
        assert uuid == b"GPU-1234"
        return "handle"

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        assert handle == "handle"
        return self.reasons

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {1: 1755, 2: 2619}[kind]

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def nvmlDeviceGetEccMode(self, handle: str) -> tuple[int, int]:
        return 1, 1

    def nvmlDeviceGetMigMode(self, handle: str) -> None:
        raise RuntimeError("Not Supported")

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    found = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    return found


def test_the_watch_refuses_while_clocks_are_held_down(nvml, monkeypatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    watch = Watch("1234")
    assert watch.accept() and not watch.throttled() and watch.sm_mhz() == 1755
    nvml.reasons = 0x1  # idle: no reason to refuse
    assert watch.accept()
    for reason in (0x4, 0x8, 0x20, 0x40, 0x80):
        nvml.reasons = reason
        assert not watch.accept()
    nvml.reasons = 0
    assert watch.accept() and watch.throttled() and not watch.throttled()
    assert slept == [0.05, 0.1, 0.2, 0.4, 0.8]
    nvml.reasons = 0x4
    assert not watch.accept() and slept[-1] == 0.05  # it starts again


def test_without_nvml_nothing_is_known_and_everything_counts(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    watch = Watch("1234")
    assert watch.accept() and not watch.throttled()
    assert watch.sm_mhz() is None and watch.ask("GetTemperature", 0) is None


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoGpu, match="PyTorch finds no GPU"):
        Gpu()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, nvml: Nvml) -> Gpu:
    """A `Gpu` over a made-up torch.cuda."""
    props = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        multi_processor_count=132,
        L2_cache_size=52_428_800,
        memory_clock_rate=2_619_000,
        memory_bus_width=5120,
        warp_size=32,
        uuid="1234",
        total_memory=80 << 30,
    )
    held = [1000, 1000]
    for name, value in {
        "is_available": lambda: True,
        "set_device": lambda device: None,
        "get_device_properties": lambda device: props,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (60 << 30, 80 << 30),
        "memory_allocated": lambda device: held[0],
        "reset_peak_memory_stats": lambda device: held.__setitem__(1, held[0]),
        "max_memory_allocated": lambda device: held[1],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(device, "_described", {torch.device("cpu"): device.INTERPRETER})
    found = Gpu()
    found.held = held
    yield found


def test_a_gpu(gpu: Gpu) -> None:
    assert gpu.facts.bandwidth == pytest.approx(3.352e12, rel=1e-3)  # the product's 3.35 TB/s
    assert gpu.free_bytes() == 60 << 30

    def call() -> None:
        gpu.held[1] = max(gpu.held[1], gpu.held[0] + 500)

    assert gpu.peak_bytes(call) == 500
    calls: list[None] = []
    seconds = gpu.host_seconds(lambda: calls.append(None))
    assert seconds is not None and 0 < seconds < 1e-3 and len(calls) >= 9 * 20


def test_the_environment_of_a_gpu(gpu: Gpu) -> None:
    found = environment(gpu, seed=3, arguments=["run"])
    assert found["gpu"]["name"] == "NVIDIA H100 80GB HBM3" and found["gpu"]["sms"] == 132
    assert found["gpu"]["power_limit_w"] == 700 and found["gpu"]["ecc"] is True
    assert found["gpu"]["mig"] is None and found["gpu"]["memory_mhz"] == 2619
    assert found["versions"]["driver"] == "580.1" and found["seed"] == 3
    check_header(found)


def check_header(found: dict[str, object]) -> None:
    tables: dict[str, list[object]] = {name: [] for name in TABLES}
    assert fault({"schema": SCHEMA, "environment": found, **tables}) is None


def test_the_environment_names_no_host_and_no_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/home/somebody/cache")
    monkeypatch.setenv("TRITONNORM_LOG", "debug")
    found = environment(None, arguments=["run", "--json", "/home/somebody/out.json"])
    check_header(found)
    text = json.dumps(found)
    node = os.uname().nodename
    assert "somebody" not in text and (len(node) < 4 or node not in text)
    assert found["variables"]["TRITONNORM_LOG"] == "debug"
    assert found["command"] == "python -m bench run --json out.json"
    assert found["gpu"]["name"] == "none" and found["versions"]["torch"] == torch.__version__
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    if git.returncode == 0:
        assert found["commit"] == git.stdout.strip()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    check_header(environment(SimulatedGpu()))


@pytest.mark.parametrize(
    ("name", "bandwidth", "cache"),
    [
        ("AMD Instinct MI300X", 5.3e12, 256 << 20),
        ("AMD Radeon RX 7900 XTX", 0.96e12, 96 << 20),
        ("AMD Something New", 0.0, 4 << 20),
    ],
)
def test_amd_figures_come_from_data_sheets(monkeypatch, name, bandwidth, cache) -> None:
    props = types.SimpleNamespace(
        name=name,
        gcnArchName="gfx942:sramecc+:xnack-",
        multi_processor_count=304,
        L2_cache_size=4 << 20,
        memory_clock_rate=1_300_000,
        memory_bus_width=8192,
        warp_size=64,
    )
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: props)
    found = device._probe(torch.device("cuda", 0))
    assert (found.bandwidth, found.l2_bytes, found.arch, found.warp) == (
        *(bandwidth, cache, "gfx942"),
        64,
    )
