"""The timer: order, statistics, clocks."""

from __future__ import annotations

import random
import statistics
import time
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch

from tritonnorm.timing import GpuClock, HostClock, Quiet, Timing, interleaved


class FakeClock:
    """A clock whose seconds are those that the calls say they take."""

    def __init__(self) -> None:
        self.prepared = 0

    def prepare(self, calls: Sequence[Callable[[], float]]) -> Callable[[], float]:
        self.prepared += 1
        return lambda: sum(call() for call in calls) / len(calls)


def test_the_median_of_the_rounds_per_call() -> None:
    ran: list[str] = []
    slow, fast = iter([9.0, 3.0, 4.0, 5.0, 100.0]), iter([2.0, 1.0, 1.0, 1.0, 1.0])

    def run(name: str, seconds) -> float:
        ran.append(name)
        return next(seconds)

    done: list[tuple[int, int]] = []
    clock = FakeClock()
    found = interleaved(
        {"slow": [lambda: run("slow", slow)], "fast": [lambda: run("fast", fast)]},
        clock,
        rounds=5,
        progress=lambda *where: done.append(where),
    )
    noise = pytest.approx(1.7535, abs=1e-4)
    assert found["slow"] == Timing(5.0, 3.8, pytest.approx(27.2), 5, noise)
    assert (found["fast"].median, found["fast"].rounds) == (1.0, 5)
    assert clock.prepared == 2 and done == [(i, 5) for i in range(1, 6)]
    rounds = [set(ran[i : i + 2]) for i in range(0, 10, 2)]
    assert rounds == [{"slow", "fast"}] * 5  # in turn


def test_the_order_within_a_round_is_random_but_the_same_for_a_seed() -> None:
    def order(seed: int) -> list[str]:
        ran: list[str] = []
        calls = {name: [lambda name=name: ran.append(name) or 1.0] for name in "abc"}
        interleaved(calls, FakeClock(), rounds=8, seed=seed)
        return ran

    assert order(1) == order(1) != order(2)
    assert {order(1)[i] for i in range(0, 24, 3)} == set("abc")


def test_a_budget_ends_it_but_not_before_five_rounds() -> None:
    def nap() -> float:
        time.sleep(0.01)
        return 1.0

    found = interleaved({"a": [nap]}, FakeClock(), rounds=1000, budget=0.0)["a"]
    assert found.rounds == 5
    assert 5 <= interleaved({"a": [nap]}, FakeClock(), rounds=1000, budget=0.2)["a"].rounds < 100


def test_several_calls_share_a_run() -> None:
    assert interleaved({"a": [lambda: 1.0, lambda: 3.0]}, FakeClock(), 1)["a"].median == 2.0


def test_the_host_clock_measures_wall_time_after_a_warm_up() -> None:
    calls = []

    def call() -> None:
        calls.append(None)
        time.sleep(0.02 if len(calls) > 2 else 0.5)

    found = interleaved({"a": [call]}, HostClock(warm_up=2), rounds=3)["a"]
    assert len(calls) == 5
    assert 0.02 <= found.median < 0.3


def test_quiet_samples_end_it() -> None:
    noisy = random.Random(0)
    calm = {"a": [lambda: 1.0], "b": [lambda: 2.0]}
    rule = Quiet(least=12)
    assert interleaved(calm, FakeClock(), 1000, quiet=rule)["a"].rounds == 12
    wild = {**calm, "c": [lambda: noisy.uniform(1.0, 2.0)]}
    found = interleaved(wild, FakeClock(), 5000, quiet=rule)
    assert found["a"].rounds == found["c"].rounds  # all of them wait for the last
    assert 65 < found["c"].rounds < 1000  # 20 % of noise stays 20 %: more would not help
    growing = {"a": [lambda: next(steps)]}
    steps = iter(1.05**i for i in range(200))
    assert interleaved(growing, FakeClock(), 200, quiet=rule)["a"].rounds == 200


def test_noise_is_the_standard_deviation_over_the_mean() -> None:
    values = [random.Random(1).uniform(1, 3) for _ in range(50)]
    expected = [statistics.stdev(values[:n]) / statistics.fmean(values[:n]) for n in range(2, 51)]
    assert Quiet._noises(values) == pytest.approx(expected)
    assert Timing.of(values).noise == pytest.approx(expected[-1])
    assert Timing.of([1.0]).noise == 0.0


def test_refused_rounds_are_measured_again() -> None:
    values = iter([1.0, 50.0, 60.0, 2.0, 3.0])
    answers = iter([True, False, False, True, True])
    calls = {"a": [lambda: next(values)]}
    found = interleaved(calls, FakeClock(), 3, accept=lambda: next(answers))["a"]
    assert (found.median, found.rounds) == (2.0, 3)
    never = interleaved({"a": [lambda: 1.0]}, FakeClock(), 4, accept=lambda: False)["a"]
    assert never.rounds == 4  # it ends all the same
    late = interleaved({"a": [lambda: 1.0]}, FakeClock(), 9, budget=0.0, accept=lambda: False)
    assert late["a"].rounds == 5


class FakeCuda:
    """Stands for torch.cuda: a graph holds the calls made while it is captured; replay runs them.

    A call takes the seconds that it returns; `log` says on which stream what ran.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.stream, self.capturing, self.log = 0.0, "default", None, []
        self.order: list[str] = []  # of what was handed to the GPU
        fake = self

        class Stream:
            def wait_stream(self, other: object) -> None:
                pass

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now
                fake.order.append("event")

            def synchronize(self) -> None:
                fake.now += 0.0

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        class Graph:
            def __init__(self) -> None:
                self.calls: list[Callable[[], float]] = []

            def replay(self) -> None:
                fake.order.append("graph")
                for seconds in self.calls:
                    fake.now += seconds

        class On:
            def __init__(self, stream: object, graph: Graph | None = None) -> None:
                self.stream, self.graph = stream, graph

            def __enter__(self) -> None:
                self.before = fake.stream, fake.capturing
                fake.stream, fake.capturing = self.stream, self.graph

            def __exit__(self, *_: object) -> None:
                fake.stream, fake.capturing = self.before

        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": Graph,
            "stream": On,
            "graph": lambda graph, stream: On(stream, graph),
            "current_stream": Stream,
            "synchronize": lambda: None,
            "_sleep": self.sleep,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def sleep(self, cycles: int) -> None:
        self.order.append("sleep")

    def call(self, name: str, seconds: float) -> Callable[[], str]:
        def run() -> str:
            self.log.append((name, self.stream, self.capturing is not None))
            if self.capturing is not None:
                self.capturing.calls.append(seconds)
            return name

        return run


def test_the_gpu_clock_measures_a_graph_of_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    calls = [cuda.call("a", 300e-6), cuda.call("b", 100e-6)]
    measure = GpuClock(warm_up_seconds=0.0).prepare(calls)
    assert measure() == pytest.approx(200e-6)
    # Asleep while the graph is handed over, so that no host is between the events.
    assert cuda.order[-4:] == ["sleep", "event", "graph", "event"]
    eager = [name for name, _, captured in cuda.log if not captured]
    assert eager == ["a", "b"] * 3  # the warm-up
    assert [name for name, _, captured in cuda.log if captured] == ["a", "b"]  # 400 us: enough
    assert len({stream for _, stream, _ in cuda.log}) == 1 and cuda.log[0][1] != "default"


def test_the_gpu_clock_repeats_short_work_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    measure = GpuClock(200e-6, warm_up_seconds=0.0).prepare([cuda.call("a", 3e-6)])
    before = cuda.now
    assert measure() == pytest.approx(3e-6)
    assert 200e-6 <= cuda.now - before < 206e-6


def test_the_gpu_clock_keeps_outputs_while_all_calls_run(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)

    class Output:
        pass

    seen: list[int] = []
    living: weakref.WeakSet[Output] = weakref.WeakSet()

    def call() -> Output:
        output = Output()
        living.add(output)
        seen.append(len(living))
        return output

    GpuClock(least_seconds=0.0, warm_up_seconds=0.0).prepare([call] * 3)
    assert seen == [1, 2, 3] * (len(seen) // 3) and len(seen) >= 12


@pytest.mark.parametrize(
    ("variants", "rounds", "message"),
    [
        ({}, 1, "variants: expected at least one"),
        ({"a": []}, 1, "each with at least one call"),
        ({"a": [lambda: 1.0]}, 0, "rounds: expected at least 1, got 0"),
    ],
)
def test_bad_input(variants, rounds, message) -> None:
    with pytest.raises(ValueError, match=message):
        interleaved(variants, FakeClock(), rounds)
    with pytest.raises(ValueError, match="at least one round"):
        Timing.of([])
