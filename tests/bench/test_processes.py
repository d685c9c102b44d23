"""Work in child processes: results, progress, errors, and which of them interpret."""

from __future__ import annotations

import os
import time

import pytest

from bench.processes import Job, WorkFailed, run_jobs


def triton_mode(progress) -> tuple[str, str, int]:
    import torch
    import triton.language as tl

    return os.environ["TRITON_INTERPRET"], type(tl.sum).__name__, torch.get_num_threads()


def add(progress, a: int, b: int) -> int:
    progress(0, 2, "adding")
    progress(2, 2)
    return a + b


def fail(progress) -> None:
    raise ValueError("no such thing")


def die(progress) -> None:
    os._exit(7)


def wait(progress) -> None:
    time.sleep(600)


def span(progress, seconds: float) -> tuple[float, float]:
    start = time.monotonic()
    time.sleep(seconds)
    return start, time.monotonic()


def test_each_process_has_the_mode_it_asks_for() -> None:
    before = os.environ.get("TRITON_INTERPRET")
    jobs = [
        Job("a", triton_mode, interpret=True, threads=1),
        Job("b", triton_mode, interpret=False),
    ]
    first, second = run_jobs(jobs)
    assert first == ("1", "InterpretedFunction", 1)
    assert second[:2] == ("0", "JITFunction")
    assert os.environ.get("TRITON_INTERPRET") == before


def test_results_in_order_and_progress() -> None:
    said: list[tuple] = []
    jobs = [Job("one", add, (1, 2)), Job("two", add, (3, 4))]
    assert run_jobs(jobs, lambda *what: said.append(what)) == [3, 7]
    assert [s for s in said if s[0] == "two"] == [("two", 0, 2, "adding"), ("two", 2, 2, "")]


def test_at_once() -> None:
    (start1, end1), (start2, end2) = run_jobs(
        [Job("a", span, (0.2,)), Job("b", span, (0.2,))], at_once=1
    )
    assert start1 < end1 <= start2 < end2


def test_an_error_brings_its_traceback_and_stops_the_others() -> None:
    begin = time.monotonic()
    with pytest.raises(WorkFailed, match="bad: ValueError: no such thing") as caught:
        run_jobs([Job("bad", fail), Job("slow", wait)])
    assert "in fail" in caught.value.trace
    assert time.monotonic() - begin < 60


def test_a_process_that_dies() -> None:
    with pytest.raises(WorkFailed, match="gone: its process ended with exit code 7"):
        run_jobs([Job("gone", die)])
