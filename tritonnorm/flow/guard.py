"""Running a model without changing it, and seeing what every operation reads."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StateGuard(TorchDispatchMode):
    """Saves every tensor of the model before an operation first writes it, and puts all back.

    Module attributes that the run rebinds (counters, caches, flags) are put back too. What a
    forward keeps outside the model's modules (globals, contents of its lists) is not.

    Subclasses see the operations through `reads`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._attributes = [_snapshot(module) for module in self._modules]
        self._state: dict[int, list[Tensor]] = {}  # by storage, which several may share
        for tensor in (*model.parameters(), *model.buffers()):
            if (key := storage_key(tensor)) is not None:
                self._state.setdefault(key, []).append(tensor)
        self._saved: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # Some batch norm operations write the running statistics without saying so in their schema.
        if func._schema.is_mutable or "batch_norm" in func.__name__:
            for tensor in tensors:
                self._save(tensor)
        self.reads(func, tensors)
        return func(*args, **kwargs)

    def reads(self, func: Any, tensors: list[Tensor]) -> None:
        """Called before every operation with the tensors among its arguments."""

    def _save(self, tensor: Tensor) -> None:
        key = storage_key(tensor)
        if key in self._state and key not in self._saved:
            self._saved[key] = [(t, t.clone()) for t in map(Tensor.detach, self._state[key])]

    def changes(self) -> tuple[set[int], str]:
        """Storage of the parameters and buffers that the run replaced by others, and a number among
        the modules' attributes that it changed, by its name, or nothing."""
        replaced: set[int] = set()
        counted = ""
        for module, before in zip(self._modules, self._attributes, strict=True):
            for table in ("_parameters", "_buffers"):
                for name, tensor in before[table].items():
                    if tensor is not None and module.__dict__[table].get(name) is not tensor:
                        replaced.add(storage_key(tensor) or 0)
            for name, value in module.__dict__.items():
                if type(value) in (int, float, complex) and value != before.get(name):
                    counted = name
        return replaced, counted

    def restore(self) -> None:
        """Put back what the run changed. Call it outside the mode."""
        with torch.no_grad():
            for tensor, value in itertools.chain(*self._saved.values()):
                tensor.copy_(value)
        for module, before in zip(self._modules, self._attributes, strict=True):
            _put_back(module, before)


_TABLES = ("_parameters", "_buffers", "_modules")


def _snapshot(module: nn.Module) -> dict[str, Any]:
    return {k: dict(v) if k in _TABLES else v for k, v in module.__dict__.items()}


def _put_back(module: nn.Module, before: dict[str, Any]) -> None:
    for name in [name for name in module.__dict__ if name not in before]:
        del module.__dict__[name]
    for name, value in before.items():
        if name not in _TABLES:
            module.__dict__[name] = value
            continue
        table = module.__dict__[name]
        table.clear()
        table.update(value)


@contextlib.contextmanager
def quiet_run(seed: int = 0) -> Iterator[None]:
    """No gradients, no compilation; random numbers from `seed` that leave the generators alone."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with (
        torch.random.fork_rng(devices),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
    ):
        torch.manual_seed(seed)
        yield


def with_schema(func: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    """The arguments of an operation, each with its entry in the schema."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if place < len(args) and not argument.kwarg_only:
            found.append((argument, args[place]))
        elif argument.name in kwargs:
            found.append((argument, kwargs[argument.name]))
    return found


def storage_key(tensor: Tensor) -> int | None:
    """A number that two tensors share exactly when they share memory, or None without storage."""
    try:
        with torch._C.DisableTorchFunction():  # a look of ours, not a use by the model
            return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None
