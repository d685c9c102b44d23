"""See what computes a batch norm: interpreted kernels, compiled kernels, or PyTorch's operators."""

from __future__ import annotations

import contextlib
import importlib.util
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Launches", "observe"]


@dataclass
class Launches:
    """What ran inside an `observe` block.

    Attributes:
        interpreted: launches in Triton's interpreter by kernel name.
        compiled: launches of compiled kernels by kernel name.
        torch: calls of PyTorch's batch norm operators by operator name.
    """

    interpreted: Counter[str] = field(default_factory=Counter)
    compiled: Counter[str] = field(default_factory=Counter)
    torch: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        parts = [
            f"{total} launches of {len(kinds)} {what}"
            for kinds, what in (
                (self.interpreted, "kernels in Triton's interpreter"),
                (self.compiled, "compiled Triton kernels"),
            )
            if (total := sum(kinds.values()))
        ]
        calls = sum(self.torch.values())
        parts.append(f"{calls} calls of PyTorch's batch norm")
        return ", ".join(parts)


class _BatchNormOperators(TorchDispatchMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace != "tritonnorm" and "batch_norm" in func._opname:
            self._seen[func._opname] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def observe(operators: bool = True) -> Iterator[Launches]:
    """Count kernel launches, and calls of PyTorch's batch norm operators, while the block runs.

    Without ``operators`` nothing is counted of PyTorch: that takes a mode, in which `torch.compile`
    does nothing.
    """
    found = Launches()
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("triton") is not None:
            stack.enter_context(_interpreted(found.interpreted))
            stack.enter_context(_compiled(found.compiled))
        if operators:
            stack.enter_context(_BatchNormOperators(found.torch))
        yield found


@contextlib.contextmanager
def _interpreted(seen: Counter[str]) -> Iterator[None]:
    """Count the launches of Triton's interpreter by the kernel's name."""
    from triton.runtime.interpreter import GridExecutor

    original = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen[self.fn.__name__] += 1
        return original(self, *args, **kwargs)

    GridExecutor.__call__ = counted
    try:
        yield
    finally:
        GridExecutor.__call__ = original


@contextlib.contextmanager
def _compiled(seen: Counter[str]) -> Iterator[None]:
    """Count the launches of compiled kernels by the kernel's name, where the launcher makes them.

    Triton calls the hook at every launch, also of a compiled kernel that is kept and called without
    a look-up.
    """
    from triton import knobs

    def entered(metadata: Any) -> None:
        seen[metadata.get()["name"]] += 1

    before = knobs.runtime.launch_enter_hook
    if hasattr(before, "add"):
        before.add(entered)
    else:  # Triton 3.4 has one hook, not a chain of them
        knobs.runtime.launch_enter_hook = entered
    try:
        yield
    finally:
        if hasattr(before, "remove"):
            before.remove(entered)
        else:
            knobs.runtime.launch_enter_hook = before
