"""Tuning whole problems: children that die, sessions that stop, modes that refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tuned
from tritonnorm import recipe as recipes
from tritonnorm import settings
from tritonnorm.device import KNOWN, simulated
from tritonnorm.kernels import BY_NAME
from tritonnorm.plan import plan
from tritonnorm.problem import FoldProblem
from tritonnorm.tune import jobs, online, standing
from tritonnorm.tune.jobs import Job, Result, candidates_for, run_job
from tritonnorm.tune.key import Key
from tritonnorm.tune.prune import Pruned
from tritonnorm.tune.session import Session
from tritonnorm.tune.store import UserCache

H200 = KNOWN["h200"]
P = tuned.problem(4, 16, 49, dtype=torch.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UserCache]:
    monkeypatch.setenv("TRITONNORM_TUNE", "off")
    monkeypatch.setenv("TRITONNORM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(standing, "SHIPPED", tmp_path / "shipped")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    standing.reload()
    yield UserCache(tmp_path / "cache")
    monkeypatch.undo()
    standing.reload()


def job(**options: Any) -> Job:
    return Job(Key.of(P), candidates_for(P, H200), **options)


CHILD = """
import json, os, sys, time
job = json.loads(sys.stdin.read())
print("a library says something", flush=True)
for c in job["candidates"]:
    print(json.dumps({"begin": c}), flush=True)
    if c["algorithm"] == "resident":
        BAD
best = {"best": job["candidates"][-1], "us": 5.0, "formula_us": 6.0, "failures": {"odd": 1}}
print(json.dumps({"result": {**best, "tried": len(job["candidates"])}}), flush=True)
"""


def child(bad: str) -> list[str]:
    return [sys.executable, "-c", CHILD.replace("BAD", bad)]


def bad_ones() -> int:
    """How many candidates of the job end the child; they are not the last ones."""
    names = [name for name, _ in candidates_for(P, H200)]
    assert names[0] == "resident" and names[-1] == "split"
    return names.count("resident")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("os.abort()", "ends the process (exit code -6)"),
        (
            "sys.exit('torch.AcceleratorError: CUDA error: illegal access\\nFor debugging ...')",
            "ends the process (torch.AcceleratorError: CUDA error: illegal access)",
        ),
        ("time.sleep(60)", "takes longer than 1 s"),
    ],
)
def test_what_ends_the_child_costs_one_candidate(bad: str, reason: str) -> None:
    heard: list[Any] = []
    assert 1 <= bad_ones() < jobs.DEATHS
    result = run_job(job(), heard.append, child(bad), patience=1.0 if "sleep" in bad else 30.0)
    assert result.error is None and result.best is not None
    assert result.failures == {reason: bad_ones(), "odd": 1}
    assert result.tried == len(candidates_for(P, H200)) - bad_ones()
    assert (result.us, result.formula_us) == (5.0, 6.0) and heard[-1]["result"]


def test_a_child_that_never_gets_anywhere() -> None:
    assert run_job(job(), command=[sys.executable, "-c", "import sys; sys.exit(1)"]).error == (
        "ends the process (exit code 1)"
    )
    always = CHILD.replace('if c["algorithm"] == "resident":', "if 1:")
    result = run_job(job(), command=[sys.executable, "-c", always.replace("BAD", "os.abort()")])
    assert result.best is None and "too many" in str(result.error)


def test_the_real_child_without_a_gpu() -> None:
    """It starts, and says in a line what is missing."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = run_job(job(), patience=120.0)
    assert result.best is None and "ends the process" in str(result.error)


class Once:
    """Runs the calls once, and says that it took a millisecond."""

    def prepare(self, calls: Sequence[Any]) -> Any:
        for call in calls:
            call()
        return lambda: 1e-3


GROUP = tuned.group(4, 16, 7, 7, groups=4, dtype=torch.float32)


@pytest.mark.parametrize("p", [P, GROUP, FoldProblem(*(torch.float32,) * 3, 2, 24, 24 * 32, True)])
def test_the_work_of_a_child(p: Any) -> None:
    """All of it, on the CPU: kernels interpreted, checked, timed."""
    said: list[dict[str, Any]] = []
    few = candidates_for(p, H200)[:2]
    plain = [{"algorithm": name, "config": asdict(config)} for name, config in few]
    todo = {"key": Key.of(p).to_json(), "candidates": plain, "incumbent": None}
    todo |= {"budget": 1000.0, "index": 0, "seed": 0}
    with simulated(replace(H200, l2_bytes=1 << 10)):  # two sets of tensors
        jobs.work(json.loads(json.dumps(todo)), said.append, torch.device("cpu"), Once())
    assert [m["begin"] for m in said if "begin" in m] == plain
    result = said[-1]["result"]
    assert result["best"] == plain[0] and result["us"] == 1000.0 and result["tried"] == 2


def everything(
    todo: dict[Any, tuple[Any, Sequence[Any]]], *args: Any
) -> Iterator[tuple[Any, Pruned]]:
    for name, (_, candidates) in todo.items():
        found = Pruned(list(candidates[:-1]))
        found.reasons["spills registers"] += 1
        yield name, found


def session(do: Any = None, **options: Any) -> Session:
    def simple(j: Job) -> Result:
        return Result(j.candidates[-1], 8.0, 10.0, len(j.candidates))

    return Session(H200, job=do or simple, pruned=everything, **options)


PROBLEMS = [tuned.problem(n) for n in (4, 8, 16)]


def test_a_group_norm_is_tuned_like_a_batch_norm(cache: UserCache) -> None:
    """Tuned, kept, used, left out where it is to be resumed, and checked."""
    wanted = [tuned.group(8, 320, 64, 64), tuned.group(4096, 768, direction="backward")]
    assert {name for name, _ in candidates_for(wanted[1], H200)} == {
        "group_resident",
        "group_split",
    }
    assert len(session().tune(wanted).done) == len(cache.entries()) == 2
    assert [plan(p, H200).source for p in wanted] == ["user cache"] * 2
    assert session(resume=True).tune(wanted).skipped == 2
    assert not any(t.lost for t in session(lambda j: Result(j.incumbent, 8.0, 10.0)).check([]).done)


def test_results_are_kept_as_they_come(cache: UserCache) -> None:
    seen: list[tuple[int, int]] = []
    summary = session().tune(
        [*PROBLEMS, PROBLEMS[0]], lambda s, what: seen.append((len(s.done), len(cache.entries())))
    )
    assert summary.total == len(summary.done) == 3 and summary.stopped is None
    assert all(done == kept for done, kept in seen)
    assert summary.failures == {"spills registers": 3}
    (entry,) = (e for e in cache.entries() if e.key == Key.of(PROBLEMS[0]))
    revision = standing.REVISIONS[entry.algorithm]
    assert (entry.us, entry.formula_us, entry.revision) == (8.0, 10.0, revision)
    assert entry.environment["torch"] == torch.__version__
    assert plan(PROBLEMS[0], H200).source == "user cache"


def test_an_interrupt_keeps_what_was_found(cache: UserCache) -> None:
    count = []

    def second(j: Job) -> Result:
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return Result(j.candidates[0], 8.0, 10.0)

    summary = session(second).tune(PROBLEMS)
    assert summary.stopped == "interrupted" and len(summary.done) == len(cache.entries()) == 1
    summary = session(resume=True).tune(PROBLEMS)
    assert (summary.skipped, len(summary.done), summary.total) == (1, 2, 3)


def test_the_budget_is_shared() -> None:
    seconds: list[float] = []

    def note(j: Job) -> Result:
        seconds.append(j.budget)
        return Result(j.candidates[0], 8.0, 10.0)

    session(note, budget=30.0).tune(PROBLEMS)
    assert seconds[0] == pytest.approx(10.0, abs=0.5) and seconds[2] == 20.0
    summary = session(note, budget=0.5).tune(PROBLEMS)
    assert summary.stopped == "the budget is spent" and summary.done == []


def test_incumbents_and_failures(cache: UserCache) -> None:
    cache.put(tuned.entry(PROBLEMS[0]))
    cache.put(replace(tuned.entry(PROBLEMS[1]), revision=0))
    jobs_seen: list[Job] = []

    def fails(j: Job) -> Result:
        jobs_seen.append(j)
        return Result(error="no configuration works")

    summary = session(fails).tune(PROBLEMS[:2])
    assert [j.incumbent is None for j in jobs_seen] == [False, True]
    assert len(cache.entries()) == 2 and not any(t.changed for t in summary.done)


def test_check_finds_what_lost(cache: UserCache) -> None:
    for p in PROBLEMS[:2]:
        cache.put(tuned.entry(p))

    def slower(j: Job) -> Result:
        assert len(j.candidates) == 2 and j.incumbent == j.candidates[1]
        return Result(j.incumbent, 12.0 if j.key.shape[0] == 8 else 8.0, 10.0)

    summary = session(slower).check([])
    assert [t.lost for t in sorted(summary.done, key=lambda t: t.key.shape)] == [False, True]
    assert session(slower).check(PROBLEMS).skipped == 1
    assert all(e.us == 10.0 for e in cache.entries())


def test_candidates_of_a_problem() -> None:
    found = candidates_for(tuned.problem(), H200)
    assert {name for name, _ in found} >= {"resident", "split"} and len(set(found)) == len(found)
    first = plan(tuned.problem(), replace(H200, arch="sm_1"))
    assert found[0] == (first.algorithm, first.config)
    assert set(BY_NAME["split"].configs(tuned.problem(), H200)) <= {c for _, c in found}


def test_on_tunes_what_is_unseen_once(cache: UserCache, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned_: list[Key] = []

    def tune(self: Session, problems: Sequence[Any]) -> Any:
        tuned_.extend(Key.of(p) for p in problems)
        return replace_job(self).tune(problems)

    def replace_job(self: Session) -> Session:
        made = session()
        monkeypatch.setattr(online.Session, "tune", original)
        return made

    original = Session.tune
    monkeypatch.setattr(online.Session, "tune", tune)
    monkeypatch.setattr(online, "refusal", lambda: None)
    monkeypatch.setattr(online, "_index", lambda device: 0)
    monkeypatch.setattr(online, "_done", {})
    monkeypatch.setenv("TRITONNORM_TUNE", "on")
    found = recipes.decided(P, H200)
    assert found.source == "user cache" and tuned_ == [Key.of(P)] and len(cache.entries()) == 1
    assert recipes.decided(P, H200) == found == plan(P, H200)
    monkeypatch.setattr(online.Session, "tune", tune)
    monkeypatch.setenv("TRITONNORM_TUNE", "off")
    recipes.decided(PROBLEMS[0], H200)
    assert len(tuned_) == 1
    monkeypatch.setenv("TRITONNORM_TUNE", "force")
    monkeypatch.setattr(online, "_done", {})
    recipes.decided(P, H200)
    assert tuned_ == [Key.of(P)] * 2
    for device in (H200, KNOWN["b200"], H200):  # each kind of GPU has its own result
        monkeypatch.setattr(online.Session, "tune", tune)
        online.tuned(P, device, plan(P, device))
    assert tuned_ == [Key.of(P)] * 3


def test_nothing_is_tuned_where_it_must_not_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In jobs, in capture and under a compiler the formula's plan is taken, with one warning."""
    monkeypatch.setattr(online, "_said", set())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert online.refusal() is None
    reasons = {}
    with monkeypatch.context() as m:
        m.setenv("WORLD_SIZE", "8")
        reasons["job"] = online.refusal()
    with monkeypatch.context() as m:
        m.setattr(torch.compiler, "is_compiling", lambda: True)
        reasons["tracing"] = online.refusal()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    reasons["captured"] = online.refusal()
    assert all(reason and word in reason for word, reason in reasons.items())
    monkeypatch.setenv("TRITONNORM_TUNE", "on")
    for n in (5, 6, 7):
        assert recipes.decided(tuned.problem(n), H200).source == "formula"
    assert sum("nothing is tuned" in r.getMessage() for r in caplog.records) == 1


def test_a_forced_plan_and_the_interpreter_are_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    from tritonnorm.device import INTERPRETER
    from tritonnorm.plan import force_plan, forced

    monkeypatch.setenv("TRITONNORM_TUNE", "force")
    monkeypatch.setattr(online, "tuned", lambda *args: pytest.fail("tuned"))
    with force_plan("split"), simulated(H200):
        assert recipes.decided(P, H200, forced()).source == "forced"
    assert recipes.decided(P, INTERPRETER).source == "formula"
    assert settings.tune_mode() == "force"
