"""The clocks of whole models, on a GPU that only keeps a list of what it was told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from bench.e2e.clocks import EventClock, Laps, captured


class Gpu:
    """Stands for torch.cuda. Its time passes only where work is queued."""

    def __init__(self) -> None:
        self.milliseconds = 0.0
        self.log: list[str] = []

    def work(self, name: str, milliseconds: float) -> str:
        self.milliseconds += milliseconds
        self.log.append(name)
        return name

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        self.log.append(f"{name} begins")
        yield
        self.log.append(f"{name} ends")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing
            self.ready = False

        def record(self) -> None:
            self.at = gpu.milliseconds

        def synchronize(self) -> None:
            self.ready = True

        def elapsed_time(self, end: Event) -> float:
            assert end.ready or gpu.log[-1] == "synchronize"
            return end.at - self.at

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            gpu.log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            gpu.work("replay", 5.0)

    for name, fake in {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "stream": lambda stream: gpu.within(stream.name),
        "graph": lambda graph: gpu.within("capture"),
        "current_stream": lambda: Stream("current"),
        "synchronize": lambda: gpu.log.append("synchronize"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return gpu


def test_event_clock(gpu: Gpu) -> None:
    calls = [lambda: gpu.work("a", 1.0), lambda: gpu.work("b", 3.0)]
    measure = EventClock(warm_up=2).prepare(calls)
    assert gpu.log == ["a", "b"] * 2
    assert measure() == pytest.approx(2e-3)
    assert gpu.log == ["a", "b"] * 3


def test_captured(gpu: Gpu) -> None:
    replay = captured(lambda: gpu.work("step", 7.0))
    assert gpu.log == [
        *("side waits for current", "side begins", "step", "step", "step", "side ends"),
        *("current waits for side", "capture begins", "step", "capture ends"),
    ]
    gpu.log.clear()
    assert replay() == "step" and gpu.log == ["replay"]


def test_laps_on_the_gpu(gpu: Gpu) -> None:
    laps = Laps("cuda")
    for i in range(4):
        laps.start()
        gpu.work("forward", 100.0 if i == 0 else 1.0 + i)  # the first is warm-up
        laps.mark()
        gpu.work("backward", 5.0)
        laps.mark()
        gpu.work("between", 50.0)  # belongs to no part
    assert laps.medians(last=3) == pytest.approx([3e-3, 5e-3])
    assert laps.medians(last=1) == pytest.approx([4e-3, 5e-3])


def test_laps_on_the_host() -> None:
    times = iter([0.0, 1.0, 3.0, 10.0, 12.0, 15.0])
    laps = Laps("cpu", now=lambda: next(times))
    for _ in range(2):
        laps.start()
        laps.mark()
        laps.mark()
    assert laps.medians(last=2) == [1.5, 2.5]
    assert laps.medians(last=1) == [2.0, 3.0]
