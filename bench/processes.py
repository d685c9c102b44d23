"""Work in child processes, each with Triton's interpreter on or off.

Triton decides at its first import whether a process interprets kernels or compiles them, so what
needs the one cannot run beside what needs the other. The work is a function of an importable
module; it is called as ``work(progress, *args)`` and its result comes back pickled.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, cast
from unittest import mock

__all__ = ["Job", "Progress", "WorkFailed", "one_line", "run_jobs", "silent"]


class Progress(Protocol):
    """How work says how far it is."""

    def __call__(self, done: float, of: float, what: str = "") -> None:
        """``done`` of ``of`` units are finished; ``what`` names the next one."""


def silent(done: float, of: float, what: str = "") -> None:
    """A `Progress` that says nothing."""


def one_line(error: BaseException, most: int | None = None) -> str:
    """What an error says in one line, its type if nothing; ``most`` characters at most."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if most is None or len(text) <= most else text[: most - 3] + "..."


class WorkFailed(RuntimeError):
    """Work raised, or its process died. `trace` is the traceback in the child, if there is one."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


@dataclass(frozen=True)
class Job:
    """Work for one child process.

    Attributes:
        name: what progress and errors call it.
        work: a function at the top level of an importable module.
        args: its arguments after ``progress``; they are pickled.
        interpret: whether kernels are interpreted in that process.
        threads: threads of PyTorch there; None leaves PyTorch's own choice.
    """

    name: str
    work: Callable[..., Any]
    args: tuple[Any, ...] = ()
    interpret: bool = False
    threads: int | None = None


def run_jobs(
    jobs: Sequence[Job],
    progress: Callable[[str, float, float, str], None] | None = None,
    at_once: int | None = None,
) -> list[Any]:
    """Run jobs, each in a process of its own, and return their results in order.

    Args:
        jobs: what to run; they start in this order.
        at_once: how many may run at the same time, all if None.
        progress: called as ``progress(job.name, done, of, what)`` whenever a job says how far it
            is.

    Raises:
        WorkFailed: a job raised or its process ended without a result; the others are stopped.
    """
    context = multiprocessing.get_context("spawn")
    running: dict[Connection, tuple[int, Any]] = {}
    results: list[Any] = [None] * len(jobs)
    waiting = list(range(len(jobs)))
    try:
        while waiting or running:
            while waiting and len(running) < (at_once or len(jobs)):
                i = waiting.pop(0)
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(there, jobs[i]), name=jobs[i].name)
                mode = "1" if jobs[i].interpret else "0"
                with mock.patch.dict(os.environ, TRITON_INTERPRET=mode):
                    process.start()
                there.close()
                running[here] = (i, process)
            for connection in cast(list[Connection], wait(list(running))):
                i, process = running[connection]
                try:
                    kind, value = connection.recv()
                except EOFError:
                    process.join()
                    raise WorkFailed(
                        f"{jobs[i].name}: its process ended with exit code {process.exitcode}"
                    ) from None
                if kind == "progress":
                    if progress is not None:
                        progress(jobs[i].name, *value)
                elif kind == "error":
                    raise WorkFailed(f"{jobs[i].name}: {value[0]}", value[1])
                else:
                    results[i] = value
                    process.join()
                    del running[connection]
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return results


def _child(connection: Connection, job: Job) -> None:
    def progress(done: float, of: float, what: str = "") -> None:
        connection.send(("progress", (done, of, what)))

    try:
        if job.threads is not None:
            import torch

            torch.set_num_threads(job.threads)
        if job.interpret:
            from bench.lab import interpreter

            interpreter.install()
        connection.send(("result", job.work(progress, *job.args)))
    except Exception as error:
        connection.send(("error", (f"{type(error).__name__}: {error}", traceback.format_exc())))
