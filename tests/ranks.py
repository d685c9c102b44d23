"""Processes that stand in for ranks: started once, joined by gloo, given functions to run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WORLD = 3
PATIENCE = 120.0  # seconds for one function; ranks that wait for each other wait for ever


class Ranks:
    """`WORLD` processes. The first two are also a process group of their own."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, str(folder / "store"), there), daemon=True
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
        """
        for end in self._ends[:world]:
            end.send((function, args, world))
        answers, failures = [], []
        for rank, end in enumerate(self._ends[:world]):
            if not end.poll(PATIENCE):
                self.end()
                raise TimeoutError(f"rank {rank} did not answer {function.__name__}")
            answer, failure = end.recv()
            answers.append(answer)
            failures += [f"rank {rank}:\n{failure}"] if failure else []
        if failures:
            raise AssertionError("\n".join(failures))
        return answers

    def end(self) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """The processes, for as long as the context lasts."""
    with tempfile.TemporaryDirectory() as folder:
        started = Ranks(Path(folder))
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
