"""Count the memory traffic of kernels in the interpreter, and catch stray and racing accesses.

::

    with trace() as t:
        kernel[grid](...)
    assert (t.loaded, t.stored) == (expected_load, expected_store)
    t.raise_on_race()

Every load, store and atomic of every launch inside the block is counted, in bytes, after masking.
An access outside all tensor arguments of its launch raises :class:`OutOfBoundsError` before it
happens. A gap inside a tensor that is not dense counts as inside.

Races are found per launch with vector clocks: two programs race when both touch an element, one of
them with a plain store (or one plainly and one atomically, the atomic counting as a write), and no
chain of release and acquire atomics orders the two. ``sem="relaxed"`` and ``scope="cta"`` order
nothing. Accesses through ``tl.load(volatile=True)`` count as plain loads, and so do the atomic
loads and polls that came with triton 3.9.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from triton.runtime import interpreter as stock

from bench.lab.happens_before import Race, RaceRecorder

__all__ = ["LaunchTraffic", "OutOfBoundsError", "Race", "RaceError", "Trace", "trace"]

SECTOR = 32  # bytes: the unit in which NVIDIA and AMD GPUs move data between L2 and DRAM
MAX_RACES = 1000  # per trace; a broken kernel would otherwise produce one for every element


class OutOfBoundsError(IndexError):
    """A kernel touched memory that belongs to none of its tensor arguments."""


class RaceError(RuntimeError):
    """Two programs of one launch touched the same element without an order between them."""


@dataclass
class LaunchTraffic:
    """What one launch moved. All figures are bytes.

    `load_sectors` and `store_sectors` count whole 32-byte sectors, each once per memory operation
    of a program: divided by `loaded` or `stored` they show how much a strided walk over-fetches.
    `arguments` maps the name of each tensor argument to (loaded, stored, atomic); an access that
    fits several arguments (an in-place call) is booked on the first.
    """

    kernel: str
    grid: tuple[int, ...] = ()
    loaded: int = 0
    stored: int = 0
    atomic: int = 0
    load_sectors: int = 0
    store_sectors: int = 0
    arguments: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes loaded plus bytes stored, atomics left out."""
        return self.loaded + self.stored

    def add(self, other: LaunchTraffic) -> None:
        """Add the figures of `other` to this one."""
        for name in ("loaded", "stored", "atomic", "load_sectors", "store_sectors"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, moved in other.arguments.items():
            mine = self.arguments.get(name, (0, 0, 0))
            self.arguments[name] = (mine[0] + moved[0], mine[1] + moved[1], mine[2] + moved[2])


@dataclass
class Trace:
    """The launches seen by one :func:`trace` block, in order, and the races found in them."""

    launches: list[LaunchTraffic] = field(default_factory=list)
    races: list[Race] = field(default_factory=list)

    def by_kernel(self) -> dict[str, LaunchTraffic]:
        """The figures of all launches, summed per kernel name, in order of first launch."""
        summed: dict[str, LaunchTraffic] = {}
        for launch in self.launches:
            summed.setdefault(launch.kernel, LaunchTraffic(launch.kernel)).add(launch)
        return summed

    @property
    def loaded(self) -> int:
        """Bytes loaded by all launches."""
        return sum(x.loaded for x in self.launches)

    @property
    def stored(self) -> int:
        """Bytes stored by all launches."""
        return sum(x.stored for x in self.launches)

    @property
    def atomic(self) -> int:
        """Bytes touched by atomic operations of all launches, each counted once."""
        return sum(x.atomic for x in self.launches)

    @property
    def total(self) -> int:
        """Bytes loaded plus bytes stored, atomics left out."""
        return self.loaded + self.stored

    @property
    def load_sectors(self) -> int:
        """Bytes of the 32-byte sectors touched by loads."""
        return sum(x.load_sectors for x in self.launches)

    @property
    def store_sectors(self) -> int:
        """Bytes of the 32-byte sectors touched by stores."""
        return sum(x.store_sectors for x in self.launches)

    def raise_on_race(self) -> None:
        """Raise :class:`RaceError` with the first few races, if there are any."""
        if self.races:
            shown = "\n  ".join(str(r) for r in self.races[:5])
            raise RaceError(f"{len(self.races)} racing elements:\n  {shown}")


@dataclass(frozen=True)
class _Buffer:
    name: str
    low: int
    high: int
    itemsize: int


class _Launch:
    """The launch that is running: its tensors, its figures, its memory events."""

    def __init__(self, kernel: str, grid: Any) -> None:
        known = tuple(grid) if isinstance(grid, (tuple, list)) else ()
        self.traffic = LaunchTraffic(kernel, known)
        self.buffers: list[_Buffer] = []
        self.races = RaceRecorder(kernel)
        self.fault: OutOfBoundsError | None = None

    def add_argument(self, name: str, value: Any) -> None:
        if isinstance(value, (tuple, list)):
            for i, item in enumerate(value):
                self.add_argument(f"{name}[{i}]", item)
        elif hasattr(value, "data_ptr"):
            tensor = stock._unwrap_tensor(value)
            self.traffic.arguments.setdefault(name, (0, 0, 0))
            if tensor.numel():
                span = (
                    sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
                )
                low = tensor.data_ptr()
                high = low + span * tensor.element_size()
                self.buffers.append(_Buffer(name, low, high, tensor.element_size()))
        elif hasattr(value, "base") and hasattr(value, "block_shape"):  # a tensor descriptor
            self.add_argument(name, value.base)

    def access(self, kind: str, pointer: Any, mask: Any, program: tuple[int, ...]) -> np.ndarray:
        """Book one block access and return the addresses that pass the mask."""
        size = stock._get_np_dtype(pointer.get_element_ty()).itemsize
        addresses, keep = np.broadcast_arrays(pointer.data, mask)
        addresses = addresses[keep.astype(bool)].astype(np.int64)
        unclaimed = np.ones(addresses.shape, bool)
        column = ("load", "store", "atomic").index(kind)
        for buffer in self.buffers:
            inside = unclaimed & (addresses >= buffer.low) & (addresses + size <= buffer.high)
            if count := int(inside.sum()):
                moved = list(self.traffic.arguments[buffer.name])
                moved[column] += count * size
                self.traffic.arguments[buffer.name] = (moved[0], moved[1], moved[2])
                unclaimed &= ~inside
        if unclaimed.any():
            self._stray(kind, addresses, unclaimed, program)
        moved_bytes = addresses.size * size
        sectors = np.unique(np.concatenate([addresses // SECTOR, (addresses + size - 1) // SECTOR]))
        if kind == "load":
            self.traffic.loaded += moved_bytes
            self.traffic.load_sectors += sectors.size * SECTOR
        elif kind == "store":
            self.traffic.stored += moved_bytes
            self.traffic.store_sectors += sectors.size * SECTOR
        else:
            self.traffic.atomic += moved_bytes
        return addresses

    def _stray(
        self, kind: str, addresses: np.ndarray, stray: np.ndarray, program: tuple[int, ...]
    ) -> None:
        first = int(addresses[stray][0])
        where = "it has no tensor argument with elements"
        if self.buffers:
            near = min(self.buffers, key=lambda b: max(b.low - first, first - b.high))
            element = (first - near.low) // near.itemsize
            length = (near.high - near.low) // near.itemsize
            where = f"the first at {near.name}[{element}], which spans {length} elements"
        self.fault = OutOfBoundsError(
            f"kernel {self.traffic.kernel}, program {program}: {kind} of {int(stray.sum())} "
            f"elements outside every tensor argument, {where}"
        )
        raise self.fault

    def name_of(self, address: int) -> str:
        for buffer in self.buffers:
            if buffer.low <= address < buffer.high:
                return f"{buffer.name}[{(address - buffer.low) // buffer.itemsize}]"
        return hex(address)


@contextlib.contextmanager
def trace(reachable: Mapping[str, Any] | None = None) -> Iterator[Trace]:
    """Record the traffic of every kernel launched inside the block.

    Args:
        reachable: further tensors by name, which kernels reach through addresses in a table.

    Raises:
        OutOfBoundsError: from the launch itself, naming kernel, program and the nearest argument.
    """
    result = Trace()
    running: list[_Launch] = []
    builder, executor = stock.InterpreterBuilder, stock.GridExecutor
    replaced: list[tuple[type, str, Any]] = []

    def replace(owner: type, name: str, new: Any) -> None:
        replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    def watching(call: Callable[..., Any]) -> Callable[..., Any]:
        def launch_watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            launch = _Launch(self.fn.__name__, self.grid)
            for name, tensor in (reachable or {}).items():
                launch.add_argument(name, tensor)
            running.append(launch)
            try:
                return call(self, *args, **kwargs)
            except Exception as error:
                if launch.fault is not None and launch.fault is not error:
                    raise launch.fault from None
                raise
            finally:
                running.pop()
                result.launches.append(launch.traffic)
                result.races += launch.races.find(launch.name_of, MAX_RACES - len(result.races))

        # The barrier scheduler puts its own way to run a launch inside this watch.
        inner = getattr(call, "around", lambda replacement: replacement)
        launch_watched.around = lambda replacement: watching(inner(replacement))  # type: ignore[attr-defined]
        return launch_watched

    replace(executor, "__call__", watching(executor.__call__))

    to_host = executor._init_args_hst

    def init_args(self: Any, args_dev: Any, kwargs: Any) -> Any:
        args, host_kwargs = to_host(self, args_dev, kwargs)
        if running:
            named = [*zip(self.arg_names, args, strict=False), *host_kwargs.items()]
            for name, value in named:
                running[-1].add_argument(name, value)
        return args, host_kwargs

    replace(executor, "_init_args_hst", init_args)

    def watch(name: str, kind: str, pointer_at: int, mask_at: int | None) -> None:
        if not hasattr(builder, name):
            return
        original = getattr(builder, name)

        def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
            if running:
                launch = running[-1]
                mask = True if mask_at is None else getattr(args[mask_at], "data", args[mask_at])
                program = self.grid_idx
                launch.traffic.grid = tuple(self.grid_dim)
                addresses = launch.access(kind, args[pointer_at], mask, program)
                if kind == "atomic":
                    launch.races.atomic(program, addresses, *args[-2:])
                else:
                    launch.races.plain(program, addresses, kind == "store")
            return original(self, *args, **kwargs)

        replace(builder, name, watched)

    watch("create_masked_load", "load", 0, 1)
    watch("create_masked_store", "store", 0, 2)
    watch("create_atomic_rmw", "atomic", 1, 3)
    watch("create_atomic_cas", "atomic", 0, None)
    try:
        yield result
    finally:
        for owner, name, original in reversed(replaced):
            setattr(owner, name, original)
