"""The search finds the best configuration, in its budget, whatever the noise; and keeps the old one
where there is nothing to gain."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tritonnorm.kernels.base import Config
from tritonnorm.tune.jobs import ends_the_context
from tritonnorm.tune.search import Candidate, Wrong, search


def candidate(i: int) -> Candidate:
    return "split", Config(1, 1, 64, splits=1 + i)


@dataclass
class Lab:
    """A GPU that is made up: a clock and a trial, and time that passes only when they work.

    Attributes:
        seconds: of each candidate.
        noise: standard deviation over the mean; one sample in twenty is a tenth slower still.
        setup: seconds that a candidate takes to compile and check.
    """

    seconds: dict[Candidate, float]
    noise: float = 0.03
    setup: float = 0.3
    wrong: set[Candidate] = field(default_factory=set)
    broken: dict[Candidate, Exception] = field(default_factory=dict)
    passed: float = 0.0
    draw: random.Random = field(default_factory=lambda: random.Random(7))
    samples: dict[Candidate, int] = field(default_factory=dict)

    def now(self) -> float:
        return self.passed

    def check(self, c: Candidate) -> None:
        self.passed += self.setup
        if c in self.wrong:
            raise Wrong("y is not written everywhere")
        if c in self.broken:
            raise self.broken[c]

    def calls(self, c: Candidate) -> Sequence[Callable[[], Any]]:
        return [lambda: c]

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> Callable[[], float]:
        c = calls[0]()

        def measure() -> float:
            self.samples[c] = self.samples.get(c, 0) + 1
            value = self.seconds[c] * max(0.5, self.draw.gauss(1.0, self.noise))
            value *= 1.1 if self.draw.random() < 0.05 else 1.0
            self.passed += value * 20
            return value

        return measure


def lab(seconds: Sequence[float], **options: Any) -> tuple[list[Candidate], Lab]:
    found = [candidate(i) for i in range(len(seconds))]
    return found, Lab(dict(zip(found, seconds, strict=True)), **options)


def run(candidates: list[Candidate], made: Lab, **options: Any) -> Any:
    return search(candidates, made, made, now=made.now, **options)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_is_found_within_the_budget(seed: int) -> None:
    """24 candidates, the best 6 % ahead of the second, and 3 % of noise."""
    draw = random.Random(seed)
    seconds = [50e-6 * (1.06 + draw.random() * 12) for _ in range(23)] + [50e-6]
    draw.shuffle(seconds)
    candidates, made = lab(seconds, draw=draw)
    outcome = run(candidates, made, budget=20.0, seed=seed)
    assert outcome.best == candidates[seconds.index(50e-6)]
    assert outcome.complete and made.passed <= 20.0 + made.setup
    assert outcome.timing.median == pytest.approx(50e-6, rel=0.03)
    assert outcome.formula.median == pytest.approx(seconds[0], rel=0.1)
    far = [c for c in candidates if made.seconds[c] > 1.5 * 10 * 50e-6 and c != candidates[0]]
    assert all(made.samples[c] == 1 for c in far)
    assert sum(n > 6 for n in made.samples.values()) <= 7  # a quarter, and the formula's


def test_a_small_gain_changes_nothing() -> None:
    for best, expected in ((99e-6, 0), (90e-6, 1)):
        candidates, made = lab([100e-6, best], noise=0.002)
        assert run(candidates, made).best == candidates[expected]


def test_a_gain_within_the_noise_changes_nothing() -> None:
    for noise, expected in ((0.2, 0), (0.005, 1)):
        candidates, made = lab([100e-6, 96e-6], noise=noise)
        assert run(candidates, made, budget=60.0).best == candidates[expected]


def test_the_incumbent_is_what_has_to_be_beaten() -> None:
    candidates, made = lab([100e-6, 51e-6, 50.5e-6, 80e-6], noise=0.002)
    assert run(candidates, made, incumbent=candidates[1]).best == candidates[1]
    assert run(candidates, made).best in candidates[1:3]
    gone = candidate(99)  # no candidate any more, but still the choice so far
    made.seconds[gone] = 10e-6
    assert run(candidates, made, incumbent=gone).best == gone


def test_what_is_wrong_cannot_win() -> None:
    candidates, made = lab([100e-6, 1e-6, 2e-6, 50e-6], noise=0.002)
    made.wrong = {candidates[1]}
    made.broken = {candidates[2]: type("OutOfResources", (RuntimeError,), {})("too much")}
    outcome = run(candidates, made)
    assert outcome.best == candidates[3] and outcome.tried == 2
    assert outcome.failures == {
        "y is not written everywhere": 1,
        "needs more registers or shared memory than there are": 1,
    }


def test_an_error_that_ends_the_process() -> None:
    candidates, made = lab([100e-6, 1e-6])
    made.broken = {candidates[1]: RuntimeError("CUDA error: an illegal memory access")}
    assert run(candidates, made).failures == {"RuntimeError": 1}
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run(candidates, made, fatal=ends_the_context)
    out = torch.OutOfMemoryError("CUDA out of memory")
    assert not ends_the_context(out) and not ends_the_context(Wrong("y is wrong"))
    assert ends_the_context(RuntimeError("Triton Error [CUDA]: misaligned address"))


def test_nothing_works() -> None:
    candidates, made = lab([1e-6, 2e-6])
    made.wrong = set(candidates)
    outcome = run(candidates, made)
    assert outcome.best is None and outcome.failures["y is not written everywhere"] == 2
    with pytest.raises(ValueError, match="candidates"):
        run([], made)


def test_a_budget_that_is_too_small() -> None:
    """What was measured counts, but only a clear gain over what was there."""
    candidates, made = lab([100e-6] * 10 + [50e-6] * 90, noise=0.002)
    outcome = run(candidates, made, budget=4.0)
    assert not outcome.complete and made.passed < 4.0 + 2 * made.setup
    assert 0 < outcome.tried < 30 and outcome.best is not None
    outcome = run(candidates, made, budget=0.0)
    assert outcome.best == candidates[0] and outcome.tried == 1


def test_each_candidate_is_announced_before_it_runs() -> None:
    candidates, made = lab([3e-6, 2e-6, 1e-6])
    said: list[Candidate] = []
    run(candidates, made, begin=said.append)
    assert said == candidates
