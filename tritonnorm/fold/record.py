"""Proof of data flow by recording real runs on the example inputs.

Every operation is seen below autograd, so a use of a tensor cannot hide behind a view, an in-place
call or a functional. A value that somebody keeps (returns, stores) is found by its memory still
being held after the run.
"""

from __future__ import annotations

import gc
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tritonnorm.activation import resolve
from tritonnorm.flow.guard import StateGuard, quiet_run, storage_key, with_schema
from tritonnorm.flow.inputs import Call, takes_numbers, tensors_in
from tritonnorm.fold.escapes import Escapes
from tritonnorm.fold.graph import LAYER, NORM, OPERATION, Node, Run, Span, Value, leaves
from tritonnorm.fold.inspect import OURS, is_layer, is_plain_norm
from tritonnorm.fold.memory import Memory, geometry_of

# Hooks of a module, and how many of them are the recorder's.
_HOOKS = {
    "_forward_hooks": 1,
    "_forward_pre_hooks": 1,
    "_backward_hooks": 0,
    "_backward_pre_hooks": 0,
}
_SMALL = 65536  # elements of a constant that is kept for the algebra


def record(model: nn.Module, calls: list[Call]) -> list[Run]:
    """Run the model once per call and return what was computed from what.

    The model's parameters, buffers and module attributes are as before afterwards.

    Raises:
        ValueError: the model raised on the inputs.
    """
    runs = []
    for position, call in enumerate(calls):
        recorder, fresh = _Recorder(model), call.map(torch.clone)
        if takes_numbers(model, call):
            recorder.run.numbers = "an argument of the model is a number"
        try:
            with quiet_run(), recorder.hooks(), Escapes(recorder.escape), recorder:
                result = model(*fresh.args, **fresh.kwargs)
            recorder.finish(result)
        except Exception as error:
            raise ValueError(
                f"example_inputs: expected inputs the model can run on, but input {position} "
                f"raised {type(error).__name__}: {error}"
            ) from error
        finally:
            recorder.restore()
        runs.append(recorder.run)
    return runs


class _Recorder(StateGuard):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.run, self.model = Run(), model
        self.memory: dict[int, Memory] = {}
        self.stack: list[Span] = []
        self.thread = threading.get_ident()
        self.numbers: list[Value] = []  # those of which the code got elements as numbers
        self.literals: list[Value] = []
        self.owners: dict[int, list[nn.Module]] = {}
        self.state: dict[int, Tensor] = {}
        self.plain = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        # Asked before the modules have hooks of ours.
        self.whole = {id(m): is_layer(m) or is_plain_norm(m) for m in self.plain}
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if isinstance(tensor, Tensor) and (key := storage_key(tensor)) is not None:
                    self.owners.setdefault(key, []).append(module)
                    self.state[key] = tensor

    # operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inside = self._inside()
        if inside is not None:
            self._read_inside(inside, args, kwargs)
            return super().__torch_dispatch__(func, types, args, kwargs)
        known = tree_map(self._leaf, (args, kwargs))  # before the operation changes anything
        index = len(self.run.nodes)
        self._foreign_reads(known)
        written = [
            given
            for argument, given in with_schema(func, args, kwargs)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if "batch_norm" in func.__name__:
            written = []  # statistics written in training mode: state of the model, put back
        result = super().__torch_dispatch__(func, types, args, kwargs)
        node = Node(index, OPERATION, func._schema.name.partition("::")[2], None, func, *known)
        if func._overloadname != "default":
            node.what += f".{func._overloadname}"
        node.inputs = list(leaves(known))
        for value in node.inputs:
            self._note(self.run.reads, value.memory, index)
        for tensor in tensors_in(written):
            self._overwrite(tensor, index)
        made = list(tensors_in(result))
        results, fresh = len(made), False
        made += tensors_in(written)
        for place, tensor in enumerate(made):
            if storage_key(tensor) is None:
                for value in node.inputs:
                    value.seen.append(f"used by {node.what}, whose result cannot be followed")
                continue
            value, new = self._value(tensor, make=True)
            fresh |= new
            if new:
                node.outputs.append(value)
            elif place < results:  # known already; its place among the results stays
                node.outputs.append(Value(tensor.shape, tensor.dtype, None))
        if node.what.startswith("_local_scalar_dense"):
            self.numbers += [value for value in node.inputs if value.dtype != torch.bool]
        if "lift_fresh" in node.what:  # a literal in the code of the model
            self.literals += node.inputs
            for value in node.inputs:
                value.constant = result.detach().clone()
        if fresh or not made:  # an operation that gives its input back is no use of it
            self.run.add(node)
            self._constant(node, result)
        return result

    def _leaf(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        value, _ = self._value(leaf)
        return value

    def _value(self, tensor: Tensor, make: bool = False) -> tuple[Value, bool]:
        """The value that a tensor shows now, and whether it is new."""
        key = storage_key(tensor)
        if key is None:
            return Value(tensor.shape, tensor.dtype, None, seen=["without memory"]), True
        memory = self.memory.get(key)
        if memory is None:
            memory = self.memory[key] = Memory(tensor)
            memory.given = not make
        geometry = geometry_of(tensor)
        if geometry in memory.views:
            return memory.views[geometry], False
        value = Value(tensor.shape, tensor.dtype, key)
        if not make and (memory.written or not memory.given):
            # a view made before the memory was written in place: its content is a mixture
            parts = list(dict.fromkeys((*memory.parts, *memory.views.values())))
            index = len(self.run.nodes)
            self.run.add(Node(index, OPERATION, "in-place write", inputs=parts, outputs=[value]))
        elif not make and key in self.state and tensor.numel():
            value.constant = tensor.detach()
        memory.views[geometry] = value
        return value, True

    def _overwrite(self, tensor: Tensor, index: int) -> None:
        key = storage_key(tensor)
        if key is None or key not in self.memory:
            return
        memory = self.memory[key]
        self._note(self.run.writes, key, index)
        whole = tensor.numel() * tensor.element_size() == memory.size
        memory.parts = [] if whole else [*memory.parts, *memory.views.values()]
        memory.views, memory.written = {}, True

    def _constant(self, node: Node, result: Any) -> None:
        """Keep small results that depend on nothing but the model's state."""
        random = torch.Tag.nondeterministic_seeded in node.function.tags
        if not random and all(value.constant is not None for value in node.inputs):
            for tensor in tensors_in(result):
                for value in node.outputs:
                    if value.memory == storage_key(tensor) and tensor.numel() <= _SMALL:
                        value.constant = tensor.detach().clone()

    def _foreign_reads(self, known: Any) -> None:
        for value in leaves(known):
            owners = self.owners.get(value.memory or 0, ())
            if any(owner is span.module for owner in owners for span in self.stack):
                continue
            for owner in owners:
                self.run.foreign[id(owner)] = "tensors are read outside its own call"

    @staticmethod
    def _note(table: dict[int, list[int]], key: int | None, index: int) -> None:
        if key is not None:
            table.setdefault(key, []).append(index)

    # modules

    def _whole(self, module: nn.Module) -> bool:
        """Whether a call of this module is one node."""
        return self.whole.get(id(module), False)

    def _inside(self) -> Span | None:
        """The call of a layer or plain batch norm in progress."""
        return next((span for span in self.stack if self._whole(span.module)), None)

    def _read_inside(self, span: Span, args: Any, kwargs: Any) -> None:
        """Inside a layer only its input and its own tensors may be read."""
        mine = {value.memory for value in span.inputs}
        for tensor in tensors_in((args, kwargs)):
            key = storage_key(tensor)
            if key is None or key in mine:
                continue
            owners = self.owners.get(key, ())
            inner = self.stack[self.stack.index(span) :]
            if owners and not any(o is s.module for o in owners for s in inner):
                for owner in (*owners, span.module):
                    self.run.foreign[id(owner)] = "tensors are read outside its own call"
            if key in self.memory and not self.memory[key].given:
                for value in self.memory[key].views.values():
                    value.seen.append(f"read inside {type(span.module).__name__}")

    class _Hooks:
        def __init__(self, recorder: _Recorder) -> None:
            self.recorder = recorder

        def __enter__(self) -> None:
            r = self.recorder
            self.handles = [
                handle
                for module in r.plain
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
            self.run.foreign[id(module)] = "call runs in another thread"
            return
        shown = () if self._inside() else (args, kwargs)
        given = [self._value(t)[0] for t in tensors_in(shown)]
        span = Span(module, len(self.run.nodes), inputs=given)
        if self._inside() is None and self._whole(module):
            if not 1 <= len(given) <= 2:
                self.run.foreign[id(module)] = "call has more than one input"
            for value in given:
                self._note(self.run.reads, value.memory, len(self.run.nodes))
        self.stack.append(span)

    def _after(self, module: nn.Module, args: Any, result: Any) -> None:
        if threading.get_ident() != self.thread:
            return
        span = self.stack.pop()
        if self._inside() is None and self._whole(module):
            self._close(span, result)
        elif self._inside() is None:
            span.outputs = [self._value(t, make=True)[0] for t in tensors_in(result)]
        if any(len(getattr(module, name)) > count for name, count in _HOOKS.items()):
            what = f"seen by a hook of {type(module).__name__}"
            for value in (*span.inputs, *span.outputs):
                value.seen.append(what)
        span.last = len(self.run.nodes)
        self.run.spans.setdefault(id(module), []).append(span)

    def _close(self, span: Span, result: Any) -> None:
        """Turn the call of a layer or batch norm into a node, and its activation into another."""
        module, run = span.module, self.run
        if not isinstance(result, Tensor) or storage_key(result) is None or not span.inputs:
            run.foreign[id(module)] = "output has no memory of its own"
            for value in span.inputs:
                value.seen.append(f"used by {type(module).__name__}")
            return
        out, new = self._value(result, make=True)
        if not new:
            run.foreign[id(module)] = "output is its input"
            return
        span.outputs = [out]
        kind = LAYER if is_layer(module) else NORM
        tail: list[tuple[str, list[Value]]] = []
        if isinstance(module, OURS):
            if len(span.inputs) == 2:
                tail.append(("add.Tensor", span.inputs[1:]))
            activation, _ = resolve(*(module.epilogue() or (None,)))  # type: ignore[operator]
            if activation is not None:
                tail.append((activation.name, []))
        elif len(span.inputs) == 2:
            run.foreign[id(module)] = "call has more than one input"
        values = [Value(out.shape, out.dtype, None) for _ in tail] + [out]
        kind_ = type(module).__name__
        node = Node(len(run.nodes), kind, kind_, module, inputs=span.inputs[:1])
        node.outputs = [values[0]]
        run.add(node)
        for place, (what, more) in enumerate(tail):
            node = Node(len(run.nodes), OPERATION, what, inputs=[values[place], *more])
            node.outputs = [values[place + 1]]
            run.add(node)

    # the end

    def escape(self, what: str, values: Any) -> None:
        inside = self._inside()
        for tensor in tensors_in(values):
            key = storage_key(tensor)
            if inside is None and key in self.memory:
                value = self._value(tensor)[0]
                value.seen.append(f"also used by {what}")
                self.numbers.append(value)

    def finish(self, result: Any) -> None:
        """After the run: which values does somebody still hold, and which are constants?"""
        returned = {storage_key(tensor) for tensor in tensors_in(result)}
        del result
        made = (m for key, m in self.memory.items() if not m.given and key not in returned)
        if any(not memory.alive.expired() for memory in made):
            gc.collect()
        for key, memory in self.memory.items():
            if memory.given:
                self.run.kept.add(key)
                why = "written into a tensor that was there before" if memory.written else ""
                for value in (*memory.views.values(), *memory.parts) if why else ():
                    value.seen.append(why)
                continue
            why = "returned by the model" if key in returned else ""
            if not why and not memory.alive.expired():
                why = "kept after the run"
            if why:
                self.run.kept.add(key)
                for value in (*memory.views.values(), *memory.parts):
                    value.seen.append(why)
        changed, counted = self.changes()
        changed |= {key for key in self.state if key in self.run.writes}
        self.run.settle(changed, self.literals)
        if not self.run.numbers and any(value.constant is None for value in self.numbers):
            self.run.numbers = "a number in the code is read from a tensor"
        if not self.run.numbers and counted:
            self.run.numbers = f"the model changes its attribute {counted}"
        if self.run.numbers:
            self.run.settle(changed, self.literals)
