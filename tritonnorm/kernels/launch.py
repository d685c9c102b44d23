"""The one way to launch a kernel: what is fixed is fixed once, and what is compiled is kept."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from threading import get_ident
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_origin: ContextVar[tuple[Any, bool]] = ContextVar("_origin", default=(None, False))


@contextlib.contextmanager
def made_for(origin: Any, one_kind: bool = False) -> Iterator[None]:
    """Launches made within the context have ``origin``: what they are to compute, for observers.

    Of ``one_kind`` they get the same arguments every time as far as dtypes go and what is None:
    whoever makes them promises that, and they no longer look.
    """
    token = _origin.set((origin, one_kind))
    try:
        yield
    finally:
        _origin.reset(token)


@contextlib.contextmanager
def launches_to(sink: Callable[[Launch, tuple[Any, ...]], None]) -> Iterator[None]:
    """Within the context launches of this thread, with their tensors, go to ``sink`` and are not
    made."""
    before = _sinks.get(get_ident())
    _sinks[get_ident()] = sink
    try:
        yield
    finally:
        del _sinks[get_ident()]
        if before is not None:
            _sinks[get_ident()] = before


def is_rehearsing() -> bool:
    """Whether the launches of this thread are not made."""
    return get_ident() in _sinks


_sinks: dict[int, Callable[[Launch, tuple[Any, ...]], None]] = {}  # by thread


class Launch:
    """One launch of a kernel with everything fixed but its tensors, and floats such as eps.

    A kernel's arguments come in this order: tensors and floats, sizes, compile-time values.
    Floating-point fusion is asked for explicitly: Triton 3.10 changes its default.

    Args:
        kernel: what `triton.jit` made.
        grid: programs in up to three dimensions.
        sizes: integers, or None for an argument that is left out of the compiled kernel.
        num_warps: of a program.
        cooperative: the programs wait for each other: all are resident at once, or the launch
            fails.
        keeps: a program keeps data, or the sums of a tile, in registers, and may have all that a
            thread can have.
        meta: compile-time arguments by name.
    """

    __slots__ = (
        "_grid", "_interpreted", "_keeps", "_kernel", "_kinds", "_one_kind", "_options", "_sizes",
        "_tail", "origin",
    )  # fmt: skip

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        sizes: Sequence[int | None],
        num_warps: int,
        cooperative: bool = False,
        keeps: bool = False,
        **meta: Any,
    ) -> None:
        self.origin, self._one_kind = _origin.get()
        self._kinds: tuple[Any, ...] | None = None  # of its first launch, if that is promised
        self._kernel = kernel
        self._interpreted = not isinstance(kernel, JITFunction)
        # With more warps a thread cannot have as many: they share a multiprocessor's registers.
        self._keeps = (keeps or cooperative) and num_warps <= 8
        self._grid = (*grid, 1, 1)[:3]
        self._sizes = tuple(sizes)
        self._options = {**meta, "num_warps": num_warps, "enable_fp_fusion": True}
        if cooperative:
            self._options["launch_cooperative_grid"] = True
        self._tail = (*self._sizes, *(meta[name] for name in kernel.arg_names if name in meta))

    def __call__(self, *tensors: Any) -> None:
        """Launch on the device of the first tensor.

        Triton's own look-up walks all arguments by name and makes a string of them. Here the sizes
        are fixed, and what is compiled depends only on the dtypes of the tensors, if all of them
        are aligned to 16 bytes.
        """
        if (_sinks or self._interpreted) and self._elsewhere(tensors):
            return
        device = driver.active.get_current_device()
        own = tensors[0].get_device()
        if own != device and own >= 0:  # -1 is the CPU, where nothing but a stand-in launches
            with torch.cuda.device(own):
                self(*tensors)
            return
        addresses = 0
        key: Any = self
        try:
            if self._one_kind:
                for t in tensors:
                    if t is not None and t.__class__ is not float:
                        addresses |= t.data_ptr()
            else:
                kinds: list[Any] = [self]
                for t in tensors:
                    if t is None or t.__class__ is float:
                        kinds.append(None)
                    else:
                        addresses |= t.data_ptr()
                        kinds.append(t.dtype)
                key = tuple(kinds)
        except AttributeError:  # a number that is no float, as in momentum=1
            known = (t is None or isinstance(t, torch.Tensor) for t in tensors)
            self(*(t if k else float(t) for t, k in zip(tensors, known, strict=True)))
            return
        if addresses % 16:
            self._by_triton(tensors)
            return
        known = _compiled[device]
        start = known.get(key)
        if start is None:
            known[key] = self._starter(self._by_triton(tensors))
        else:
            start(driver.active.get_current_stream(device), tensors)

    def _elsewhere(self, tensors: tuple[Any, ...]) -> bool:
        """To the sink of this thread, or to the interpreter; False if neither takes it."""
        sink = _sinks.get(get_ident())
        if sink is not None:
            sink(self, tensors)
            return True
        if not self._interpreted:
            return False
        if "launch_cooperative_grid" in self._options:
            _refuse_one_after_another()
        if self._one_kind:
            kinds = _kinds(tensors)
            self._kinds = self._kinds or kinds
            if kinds != self._kinds:
                raise RuntimeError(f"launch: made for {self._kinds}, got {kinds}")
        self._by_triton(tensors)
        return True

    def _starter(self, made: Any) -> Callable[[int, tuple[Any, ...]], None]:
        """What starts the compiled kernel on a stream.

        `made[grid]` does that too, but describes every launch to Triton's hooks even where there
        are none: a fifth of the instructions that a launch took on the host.
        """
        described = made[self._grid]  # loads the kernel
        run, function, metadata = made.run, made.function, made.packed_metadata
        (x, y, z), tail = self._grid, self._tail

        def start(stream: int, tensors: tuple[Any, ...]) -> None:
            enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
            # A hook, None, or since Triton 3.5 a chain of them.
            if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
                described(*tensors, *tail, stream=stream)
            else:
                run(x, y, z, stream, function, metadata, None, None, None, *tensors, *tail)

        return start

    def compile(self, device: int, tensors: tuple[Any, ...]) -> bool:
        """Compile for tensors of these dtypes, aligned, and load it onto a device, the current one,
        without a launch; False if that is done already."""
        key = self if self._one_kind else (self, *_kinds(tensors))
        if key in _compiled[device] or self._interpreted:
            return False
        made = self._kernel.warmup(*tensors, *self._sizes, grid=self._grid, **self._all_options())
        _compiled[device][key] = self._starter(made)
        return True

    def parts(self, backend: str) -> tuple[Any, tuple[int | None, ...], dict[str, Any]]:
        """The kernel, its sizes, and its compile-time arguments and options for a backend.

        Programs that keep data ask for all registers, where one can ask.
        """
        options = self._options
        if self._keeps and backend == "cuda":
            options = {**options, "maxnreg": MOST_REGISTERS}
        return self._kernel, self._sizes, options

    def _by_triton(self, tensors: tuple[Any, ...]) -> Any:
        return self._kernel[self._grid](*tensors, *self._sizes, **self._all_options())

    def _all_options(self) -> dict[str, Any]:
        if self._interpreted:  # it has no target
            return self._options
        return self.parts(driver.active.get_current_target().backend)[2]


# Of a thread. Asked for by name, as ptxas would rather spill a few registers to fit one more
# program on a multiprocessor (BN+gelu, fp16 NCHW, sm_80 and sm_100).
MOST_REGISTERS = 255


def _refuse_one_after_another() -> None:
    """Raise where programs that wait for each other would wait for ever."""
    from triton.runtime.interpreter import InterpreterBuilder

    if not getattr(InterpreterBuilder, "interleaved", False):
        raise RuntimeError(
            "the interpreter runs programs one after another, so they cannot meet: plan for "
            "tritonnorm.device.INTERPRETER, or use bench.lab.scheduler.interleaved"
        )


def _kinds(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the compiled kernel depends on, beside alignment."""
    return tuple(t.dtype if isinstance(t, torch.Tensor) else None for t in tensors)


# Device -> launch and dtypes, or a launch of one kind -> what starts the compiled kernel.
_compiled: defaultdict[int, dict[Any, Any]] = defaultdict(dict)


def forget_compiled(device: int) -> None:
    """Let go of what was compiled for a device: its driver ends."""
    _compiled.pop(device, None)
