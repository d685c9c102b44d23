"""One problem tuned in a process of its own: what a bad configuration does to it stays there.

An illegal access ends the CUDA context, and a hang never ends. The child says before each
configuration which one comes; if it dies or is too slow, that one is left out and a new child does
the rest. The two talk in lines of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from queue import Empty, Queue
from typing import Any

import torch

from tritonnorm.device import Device
from tritonnorm.kernels import algorithms_for
from tritonnorm.kernels.base import Config
from tritonnorm.plan import choose
from tritonnorm.timing import Clock, GpuClock
from tritonnorm.tune.key import Key, Shape
from tritonnorm.tune.search import Candidate, search

__all__ = ["Job", "Result", "candidates_for", "run_job"]

# Errors after which every call of the process fails (CUDA runtime API, cudaError).
_FATAL = (
    *("CUDA error", "HIP error", "illegal memory access", "misaligned address"),
    *("illegal instruction", "launch failure", "device-side assert", "hardware"),
)
DEATHS = 5  # candidates that may take the child with them before the problem is given up
# Compiling a candidate takes a second or two, and checking it against float64 as long on large
# tensors; after a minute without a word something hangs.
PATIENCE = 60.0


@dataclass(frozen=True)
class Job:
    """What a child does.

    Attributes:
        key: of the problem.
        candidates: what to try, the formula's choice first.
        incumbent: the choice so far.
        budget: seconds of measuring.
        index: of the GPU.
        seed: of the tensors and of the order.
    """

    key: Key
    candidates: tuple[Candidate, ...]
    incumbent: Candidate | None = None
    budget: float = 20.0
    index: int = 0
    seed: int = 0


@dataclass
class Result:
    """What came of a job.

    Attributes:
        best: the choice, or None.
        us, formula_us: microseconds of it, and of the formula's choice.
        tried: candidates that were measured.
        failures: reason -> how many.
        error: why there is no choice.
    """

    best: Candidate | None = None
    us: float = 0.0
    formula_us: float = 0.0
    tried: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    error: str | None = None


def candidates_for(problem: Shape, device: Device) -> tuple[Candidate, ...]:
    """All configurations of all algorithms that can compute a problem, the formula's choice
    first."""
    first = choose(problem, device)
    found = [(first.algorithm, first.config)]
    for algorithm in algorithms_for(problem):
        if algorithm.supports(problem, device) is None:
            found += [(algorithm.name, config) for config in algorithm.configs(problem, device)]
    return tuple(dict.fromkeys(found))


def run_job(
    job: Job,
    heard: Callable[[Mapping[str, Any]], None] = lambda said: None,
    command: Sequence[str] = (sys.executable, "-m", "tritonnorm.tune.jobs"),
    patience: float = PATIENCE,
) -> Result:
    """Do a job in child processes.

    Args:
        job: what to do.
        heard: told each line that the child says.
        command: starts a child.
        patience: seconds without a line after which a child is taken to hang; added to the budget
            in the last measurement, which says nothing.
    """
    left, failures, tried = list(job.candidates), Counter[str](), 0
    for _ in range(DEATHS):
        said = _child(
            {**_to_json(job), "candidates": [*map(_plain, left)]}, heard, command, patience
        )
        found = said.pop("result", None)
        if found is not None:
            failures.update(found["failures"])
            best = None if found["best"] is None else _candidate(found["best"])
            error = None if best else "no configuration works"
            us, formula_us = found["us"], found["formula_us"]
            return Result(best, us, formula_us, tried + found["tried"], failures, error)
        last = said.get("begin")
        reason = said["reason"]
        if last is None or _candidate(last) not in left:
            return Result(tried=tried, failures=failures, error=reason)
        failures[reason] += 1
        left.remove(_candidate(last))
        if not left:
            break
    return Result(tried=tried, failures=failures, error="too many configurations end the process")


def _child(
    job: Mapping[str, Any],
    heard: Callable[[Mapping[str, Any]], None],
    command: Sequence[str],
    patience: float,
) -> dict[str, Any]:
    """What a child said last of each kind; its "result", or else a "reason"."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout and process.stderr
    lines: Queue[str | None] = Queue()
    errors: list[str] = []

    def listen() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threads = [
        threading.Thread(target=listen, daemon=True),
        threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True),
    ]
    for thread in threads:
        thread.start()
    said: dict[str, Any] = {}
    try:
        try:
            process.stdin.write(json.dumps(job))
            process.stdin.close()
        except BrokenPipeError:
            pass
        while "result" not in said:
            wait = patience + (float(job["budget"]) if "measuring" in said else 0.0)
            try:
                line = lines.get(timeout=wait)
            except Empty:
                return {**said, "reason": f"takes longer than {wait:.0f} s"}
            if line is None:
                code = process.wait()
                threads[1].join(timeout=5)  # what it said last may not have been read yet
                return {**said, "reason": f"ends the process ({_last_words(errors, code)})"}
            try:
                message = json.loads(line)
            except ValueError:
                continue  # a library printed something
            if isinstance(message, dict):
                said.update(message)
                heard(message)
        return said
    finally:
        process.kill()
        process.wait()
        for thread in threads:
            thread.join(timeout=5)
        process.stdout.close()
        process.stderr.close()


def _last_words(errors: Sequence[str], code: int) -> str:
    """The line that names the error; below it CUDA adds advice."""
    lines = [line.strip() for line in errors if line.strip()]
    named = [line for line in lines if "Error: " in line] or lines
    return named[-1][:120] if named else f"exit code {code}"


def _plain(candidate: Candidate) -> dict[str, Any]:
    return {"algorithm": candidate[0], "config": asdict(candidate[1])}


def _candidate(found: Mapping[str, Any]) -> Candidate:
    return found["algorithm"], Config(**found["config"])


def _to_json(job: Job) -> dict[str, Any]:
    keep = None if job.incumbent is None else _plain(job.incumbent)
    plain = {"budget": job.budget, "index": job.index, "seed": job.seed}
    return {"key": job.key.to_json(), "incumbent": keep, **plain}


def work(
    job: Mapping[str, Any],
    say: Callable[[Mapping[str, Any]], None],
    where: torch.device | None = None,
    clock: Clock | None = None,
) -> None:
    """The child's side: tune, and say how it goes."""
    from tritonnorm.tune.trials import trial_of

    where = where or torch.device("cuda", int(job["index"]))
    if where.type == "cuda":
        torch.cuda.set_device(where)
    problem, device = Key.from_json(job["key"]).problem(), Device.of(where)
    keep = None if job["incumbent"] is None else _candidate(job["incumbent"])
    candidates = [_candidate(c) for c in job["candidates"]]
    trial = trial_of(problem, where, device, seed=int(job["seed"]))
    left = {*candidates, *([keep] if keep else [])}

    def begin(candidate: Candidate) -> None:
        left.discard(candidate)
        say({"begin": _plain(candidate), "at": time.monotonic()})
        if not left:
            say({"measuring": True})

    outcome = search(
        candidates,
        trial,
        clock or GpuClock(),
        incumbent=keep if keep in candidates else None,
        budget=float(job["budget"]),
        seed=int(job["seed"]),
        begin=begin,
        fatal=ends_the_context,
    )
    us = [1e6 * t.median if t else 0.0 for t in (outcome.timing, outcome.formula)]
    result = {
        "best": None if outcome.best is None else _plain(outcome.best),
        "us": us[0],
        "formula_us": us[1] or us[0],
        "tried": outcome.tried,
        "failures": dict(outcome.failures),
    }
    say({"result": result})


def ends_the_context(error: Exception) -> bool:
    """Whether an error leaves the process without a working GPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return any(words in str(error) for words in _FATAL)


def _main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with what is said

    def say(message: Mapping[str, Any]) -> None:
        print(json.dumps(dict(message)), file=out, flush=True)

    work(json.loads(sys.stdin.read()), say)


if __name__ == "__main__":
    _main()
