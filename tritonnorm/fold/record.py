"""Proof of data flow by recording real runs: which batch norm gets the output of which layer.

While the model runs on the example inputs every operation is seen below autograd, so a use of a
tensor cannot hide behind a view, an in-place call or a functional. A value that somebody keeps
(returns, stores) is found by its memory still being held after the run.
"""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tritonnorm.fold.guard import StateGuard, quiet_run
from tritonnorm.fold.inputs import Call, tensors_in
from tritonnorm.fold.inspect import FOLDABLE, PRODUCERS, storage_key

# Ways by which Python code reads values without an operation.
_ESCAPES = frozenset(
    {"numpy", "__array__", "tolist", "data_ptr", "untyped_storage", "storage", "__dlpack__"}
)


@dataclass
class Output:
    """One output of a layer, from its creation until its memory is freed."""

    producer: nn.Module
    memory: StorageWeakRef
    shape: torch.Size
    uses: list[str] = field(default_factory=list)
    consumers: list[nn.Module] = field(default_factory=list)
    alive: str = ""


@dataclass
class Flow:
    """What the runs showed.

    Attributes:
        outputs: the outputs of each layer, by id of the layer.
        inputs: for each batch norm, by id, the layer of each call, None where it is not known.
        extra: ids of batch norms called with more than one tensor.
        foreign: ids of modules whose tensors were read outside their own call, or that ran in
            another thread; with the reason.
    """

    outputs: dict[int, list[Output]] = field(default_factory=dict)
    inputs: dict[int, list[nn.Module | None]] = field(default_factory=dict)
    extra: set[int] = field(default_factory=set)
    foreign: dict[int, str] = field(default_factory=dict)


def record(model: nn.Module, calls: list[Call]) -> Flow:
    """Run the model once per call and return the data flow between layers and batch norms.

    The model's parameters, buffers and module attributes are as before afterwards.

    Raises:
        ValueError: the model raised on the inputs.
    """
    flow = Flow()
    for position, call in enumerate(calls):
        recorder = _Recorder(model, flow)
        try:
            with quiet_run(), recorder.hooks(), _Escapes(recorder), recorder:
                result = call.run(model)
            recorder.finish(result)
        except Exception as error:
            raise ValueError(
                f"example_inputs: expected inputs the model can run on, but input {position} "
                f"raised {type(error).__name__}: {error}"
            ) from error
        finally:
            recorder.restore()
    return flow


class _Recorder(StateGuard):
    def __init__(self, model: nn.Module, flow: Flow) -> None:
        super().__init__(model)
        self.flow = flow
        self.watched: dict[int, Output] = {}
        self.stack: list[nn.Module] = []
        self.thread = threading.get_ident()
        self.modules = [m for m in model.modules() if type(m) in (*PRODUCERS, *FOLDABLE)]
        self.owners: dict[int, list[nn.Module]] = {}
        for module in self.modules:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if isinstance(tensor, Tensor) and (key := storage_key(tensor)) is not None:
                    self.owners.setdefault(key, []).append(module)

    def reads(self, func: Any, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            key = storage_key(tensor)
            if key is None:
                continue
            if output := self.watched.get(key):
                self._use(output, func._schema.name.partition("::")[2])
            for owner in self.owners.get(key, ()):
                if not any(module is owner for module in self.stack):
                    others = [m for m in self.owners[key] if any(m is s for s in self.stack)]
                    if not others:  # reads by another owner of a tied tensor are its own
                        self.flow.foreign[id(owner)] = "tensors are read outside its own call"

    def _use(self, output: Output, what: str) -> None:
        """Note a use, unless it is the one that the batch norm in progress was given it for."""
        inside = self.stack[-1] if self.stack else None
        if inside is None or not any(inside is consumer for consumer in output.consumers):
            output.uses.append(what)

    def escape(self, what: str, values: Any) -> None:
        for tensor in tensors_in(values):
            key = storage_key(tensor)
            if key is not None and (output := self.watched.get(key)):
                self._use(output, what)

    class _Hooks:
        def __init__(self, recorder: _Recorder) -> None:
            self.recorder = recorder

        def __enter__(self) -> None:
            r = self.recorder
            self.handles = [
                handle
                for module in r.modules
                for handle in (
                    module.register_forward_pre_hook(r._before, with_kwargs=True),
                    module.register_forward_hook(r._after),
                )
            ]

        def __exit__(self, *_: object) -> None:
            for handle in self.handles:
                handle.remove()

    def hooks(self) -> _Hooks:
        return self._Hooks(self)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != self.thread:
            self.flow.foreign[id(module)] = "call runs in another thread"
            return
        self.stack.append(module)
        if type(module) not in FOLDABLE:
            return
        given = [leaf for leaf in tree_leaves((args, kwargs)) if leaf is not None]
        if len(given) != 1:
            self.flow.extra.add(id(module))
        output = None
        if given and isinstance(given[0], Tensor) and (key := storage_key(given[0])) is not None:
            output = self.watched.get(key)
            if output is not None:
                output.consumers.append(module)
        self.flow.inputs.setdefault(id(module), []).append(output.producer if output else None)

    def _after(self, module: nn.Module, args: Any, result: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        self.stack.pop()
        if type(module) in PRODUCERS and isinstance(result, Tensor):
            key = storage_key(result)
            if key is None:
                self.flow.foreign[id(module)] = "output has no memory of its own"
                return
            with torch._C.DisableTorchFunction():
                memory = StorageWeakRef(result.untyped_storage())
            output = Output(module, memory, result.shape)
            self.watched[key] = output
            self.flow.outputs.setdefault(id(module), []).append(output)

    def finish(self, result: Any) -> None:
        """After the run: which outputs does somebody still hold?"""
        returned = {storage_key(tensor) for tensor in tensors_in(result)}
        del result
        if any(not output.memory.expired() for output in self.watched.values()):
            gc.collect()
        for key, output in self.watched.items():
            if key in returned:
                output.alive = "returned by the model"
            elif not output.memory.expired():
                output.alive = "kept after the run"


class _Escapes(TorchFunctionMode):
    """Sees the reads that are no operations, such as `Tensor.numpy`."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # properties: a slot wrapper bound to its descriptor
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in _ESCAPES:
            self.recorder.escape(name, (args, kwargs))
        return func(*args, **(kwargs or {}))
