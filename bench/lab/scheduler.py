"""Run the programs of a launch interleaved, so that grid barriers work in the interpreter.

The stock interpreter runs one program to its end before it starts the next, so a program that waits
for another waits for ever. Inside :func:`interleaved` every program has its own thread, one of them
runs at a time, and at each atomic operation the turn passes to a program drawn at random. The same
seed gives the same order. Memory is sequentially consistent: this finds wrong barrier logic and
deadlocks, ``bench.lab.traffic`` finds missing release and acquire semantics, and neither replaces a
run on a GPU.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from triton.runtime import interpreter as stock

__all__ = ["interleaved"]

Program = tuple[int, ...]
_ATOMICS = (
    "create_atomic_rmw",
    "create_atomic_cas",
    "create_atomic_load",
    "create_atomic_store",
)


class _Stop(BaseException):
    """Ends a program's thread after another program has failed."""


class _Scheduler:
    """Hands one baton to the programs of one launch, in an order drawn from `rng`."""

    def __init__(self, kernel: str, rng: random.Random, limit: int) -> None:
        self._kernel = kernel
        self._rng = rng
        self._limit = limit
        self._switches = 0
        self._local = threading.local()
        self._baton = threading.Condition()
        self._live: list[Program] = []
        self._turn: Program | None = None
        self._error: BaseException | None = None

    @property
    def program(self) -> Program:
        """The program id of the calling thread."""
        return self._local.program

    def switch(self) -> None:
        """Pass the turn on, and wait until it comes back."""
        with self._baton:
            self._switches += 1
            if self._switches > self._limit and self._error is None:
                self._error = TimeoutError(
                    f"kernel {self._kernel}: {len(self._live)} of its programs still run "
                    f"after {self._limit} atomic steps (deadlock, or limit too low): "
                    f"{self._live[:8]}"
                )
            self._pass_turn()
            self._wait_for_turn()

    def run(self, grid: tuple[int, int, int], body: Callable[[], Any]) -> None:
        """Run `body` once for every program of `grid`; raise the first error of any of them."""
        self._live = list(itertools.product(*map(range, grid)))
        if not self._live:
            return
        self._turn = self._rng.choice(self._live)
        threads = [
            threading.Thread(target=self._main, args=(program, body), daemon=True)
            for program in self._live
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _main(self, program: Program, body: Callable[[], Any]) -> None:
        self._local.program = program
        try:
            with self._baton:
                self._wait_for_turn()
            with np.errstate(all="ignore"):  # the error state of numpy belongs to the thread
                body()
        except _Stop:
            pass
        except BaseException as error:
            self._error = self._error or error
        finally:
            with self._baton:
                self._live.remove(program)
                self._pass_turn()

    def _pass_turn(self) -> None:
        self._turn = self._rng.choice(self._live) if self._live else None
        self._baton.notify_all()

    def _wait_for_turn(self) -> None:
        while self._turn != self._local.program and self._error is None:
            self._baton.wait()
        if self._error is not None:
            raise _Stop


@contextlib.contextmanager
def interleaved(seed: int = 0, limit: int = 100_000) -> Iterator[None]:
    """Run the programs of every launch inside the block interleaved at their atomic operations.

    Args:
        seed: chooses the order; launches of one block draw from one sequence.
        limit: turns passed within one launch before it counts as a deadlock.

    Raises:
        TimeoutError: from the launch, when `limit` is reached.
    """
    rng = random.Random(seed)
    running: list[_Scheduler] = []
    builder, executor = stock.InterpreterBuilder, stock.GridExecutor
    replaced: list[tuple[type, str, Any]] = []

    def replace(owner: type, name: str, new: Any) -> None:
        replaced.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, new)

    def with_switches(original: Callable[..., Any]) -> Callable[..., Any]:
        def switching(self: Any, *args: Any, **kwargs: Any) -> Any:
            running[-1].switch()
            value = original(self, *args, **kwargs)
            running[-1].switch()
            return value

        return switching

    for name in _ATOMICS:
        if hasattr(builder, name):
            replace(builder, name, with_switches(getattr(builder, name)))

    replace(builder, "interleaved", True)  # a launch whose programs meet looks for it
    # The program id is an attribute of the one builder; here it depends on the thread that asks.
    stock.interpreter_builder.__dict__.pop("grid_idx", None)
    replace(builder, "grid_idx", property(lambda self: running[-1].program))

    def launch(self: Any, *args_dev: Any, **kwargs: Any) -> None:
        names = inspect.getfullargspec(self.fn)
        kwargs = {k: v for k, v in kwargs.items() if k in names.args or k in names.kwonlyargs}
        args_host, kwargs_host = self._init_args_hst(args_dev, kwargs)
        for hook in getattr(self, "pre_run_hooks", ()):
            hook(*args_host, **kwargs_host)
        scope = stock._patch_lang(self.fn)
        try:
            bound = inspect.getcallargs(self.fn, *args_host, **kwargs_host)
            args = {
                name: value if name in self.constexprs else stock._implicit_cvt(value)
                for name, value in bound.items()
            }
            grid = tuple(self.grid(args) if callable(self.grid) else self.grid)
            grid += (1,) * (3 - len(grid))
            stock.interpreter_builder.set_grid_dim(*grid)
            running.append(_Scheduler(self.fn.__name__, rng, limit))
            try:
                running[-1].run(grid, lambda: self.fn(**args))
            finally:
                running.pop()
        finally:
            if scope is not None:  # triton 3.4 leaves its patches in place
                scope.restore()
        self._restore_args_dev(args_dev, args_host, kwargs, kwargs_host)

    outer = executor.__call__  # a traffic trace around this block goes on watching
    replace(executor, "__call__", outer.around(launch) if hasattr(outer, "around") else launch)
    try:
        yield
    finally:
        for owner, name, original in reversed(replaced):
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
