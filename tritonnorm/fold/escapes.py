"""Reads of a tensor's elements that are no operations, such as `Tensor.numpy`, during a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode

# Ways by which Python code reads values without an operation.
_ESCAPES = frozenset(
    {"numpy", "__array__", "tolist", "data_ptr", "untyped_storage", "storage", "__dlpack__"}
)


class Escapes(TorchFunctionMode):
    """Tells `escape` of the reads that are no operations: their name, and the arguments."""

    def __init__(self, escape: Callable[[str, Any], None]) -> None:
        super().__init__()
        self.escape = escape

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # properties: a slot wrapper bound to its descriptor
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in _ESCAPES:
            self.escape(name, (args, kwargs))
        return func(*args, **(kwargs or {}))
