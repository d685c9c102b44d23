"""Processes that stand in for ranks: started once, joined by gloo, given functions to run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

WORLD = 3
PATIENCE = 90.0  # seconds for one function; ranks that wait for each other wait for ever


class Ranks:
    """`WORLD` processes. The first two are also a process group of their own."""

    def __init__(self) -> None:
        self._ends: list[Connection] = []
        self._processes: list[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, f"{self._folder.name}/store", there), daemon=True
            )
            process.start()
            there.close()
            self._ends.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, world: int = WORLD) -> list[Any]:
        """``function(rank, group, *args)`` on the first ranks; their answers in order.

        Args:
            function: of a module that a process can import.
            args: what can be pickled.
            world: 2 or 3 ranks; ``group`` is theirs.

        Raises:
            AssertionError: it raised on a rank, or a rank gave no answer; the processes are ended
                then, and the next call starts others.
        """
        if not self._ends:
            self._start()
        for end in self._ends[:world]:
            end.send((function, args, world))
        answers: dict[int, Any] = {}
        failures: list[str] = []
        last = time.monotonic() + PATIENCE
        while len(answers) < world:
            waiting = [e for rank, e in enumerate(self._ends[:world]) if rank not in answers]
            ready = connection.wait(waiting, max(0.0, last - time.monotonic()))
            if not ready:
                failures.append("no answer from the other ranks")
                break
            for end in ready:
                rank = self._ends.index(end)  # type: ignore[arg-type]
                answers[rank], failure = self._ends[rank].recv()
                if failure:
                    failures.append(f"rank {rank}:\n{failure}")
                    last = min(last, time.monotonic() + 5)  # the others may wait for it for ever
        if failures:
            self.end()
            raise AssertionError("\n".join(failures))
        return [answers[rank] for rank in range(world)]

    def end(self) -> None:
        """Let the processes end, and end those that do not."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.send(None)
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        if self._ends:
            self._folder.cleanup()
        self._ends, self._processes = [], []


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """The processes, for as long as the context lasts."""
    started = Ranks()
    try:
        yield started
    finally:
        started.end()


def _serve(rank: int, store: str, pipe: Connection) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    import torch.distributed as dist

    from bench.lab import interpreter

    interpreter.install()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # dynamo makes an instance of the function itself, and warns about it
    warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    groups = {2: dist.new_group([0, 1]), WORLD: dist.group.WORLD}
    while (job := pipe.recv()) is not None:
        function, args, world = job
        try:
            pipe.send((function(rank, groups[world], *args), ""))
        except BaseException:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


def parts(sizes: Sequence[int]) -> list[slice]:
    """The rows of each rank in the concatenated batch."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
