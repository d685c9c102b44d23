"""The timer: order, statistics, clocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest

from tritonnorm.timing import HostClock, Timing, interleaved


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
    assert found["slow"] == Timing(5.0, 3.8, pytest.approx(27.2), 5)
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
