"""Batch norms of other classes, recognised by what they compute in the recorded runs.

A module counts when its call is one scale and shift per channel by constants, be it
`F.batch_norm` or multiplications and additions, and after that at most its own children and
activations, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritonnorm.fold.algebra import ScaleShift
from tritonnorm.fold.change import Change, Stop, vector
from tritonnorm.fold.graph import NORM, Node, Run, Span, Value, describe

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "mish": nn.Mish,
}


@dataclass(frozen=True)
class Frozen:
    """What such a module is: scale and shift, (C,), and what it does afterwards."""

    affine: ScaleShift
    tail: nn.Module | None


@dataclass
class _Chain:
    """The operations of one call that make up the scale and shift, from `source` to `value`."""

    source: Value
    value: Value
    scale: Tensor
    shift: Tensor
    nodes: list[Node]
    rest: list[Node]


def recognise(module: nn.Module, runs: list[Run]) -> Frozen | str:
    """What the module is, or why it is not known to be a batch norm.

    The operations of its scale and shift become one node in each of the runs.
    """
    found: list[tuple[Run, _Chain, ScaleShift, list[nn.Module]]] = []
    kind = type(module).__name__
    for run in runs:
        for span in run.spans.get(id(module), ()):
            try:
                chain = _chain(run, span)
                rank = len(chain.value.shape)
                change = Change(_ranked(chain.scale, rank), _ranked(chain.shift, rank))
                affine = ScaleShift(*(v.clone() for v in vector(change, 1, chain.value.shape[1])))
                found.append((run, chain, affine, _tail(module, run, span, chain)))
            except Stop as reason:
                return f"{kind} is more than a scale and shift per channel: {reason}"
    if not found:
        return "the batch norm was not executed on the example inputs"
    _, _, first, parts = found[0]
    for _, _, affine, others in found[1:]:
        same = torch.equal(first.scale, affine.scale) and torch.equal(first.shift, affine.shift)
        if not same or [type(m) for m in others] != [type(m) for m in parts]:
            return f"{kind} does not compute the same in every call"
    for run, chain, _, _ in found:
        _replace(run, module, chain)
    tail = parts[0] if len(parts) == 1 else nn.Sequential(*parts) if parts else None
    return Frozen(first, tail)


def _chain(run: Run, span: Span) -> _Chain:
    if len(span.inputs) != 1 or len(span.outputs) != 1:
        raise Stop("it has more than one input or output")
    source = value = span.inputs[0]
    one = torch.ones((), dtype=torch.float64)
    scale, shift = one, torch.zeros_like(one)
    known: dict[Value, Tensor] = {}
    used: list[Node] = []
    nodes = [node for node in run.nodes if span.first <= node.index < span.last]
    for place, node in enumerate(nodes):
        if node.function is None:
            return _Chain(source, value, scale, shift, used, nodes[place:])
        if all(_constant(v, known) for v in node.inputs):
            result = node.evaluate({v: _double(v, known) for v in node.inputs})
            for made, tensor in zip(
                node.outputs, [result] if isinstance(result, Tensor) else result, strict=False
            ):
                known[made] = tensor.double() if tensor.is_floating_point() else tensor
        elif (step := _step(node, value, known)) is not None:
            inner = (value.uses if value is not source else [(node, 0)], value.seen)
            if [n for n, _ in inner[0]] != [node] or (value is not source and inner[1]):
                raise Stop(f"what goes into {describe(node)} is also used elsewhere")
            s, t = step
            scale, shift = scale * s, shift * s + t
            value = node.outputs[0]
        else:
            return _Chain(source, value, scale, shift, used, nodes[place:])
        used.append(node)
    return _Chain(source, value, scale, shift, used, [])


def _constant(value: Value, known: dict[Value, Tensor]) -> bool:
    return value.constant is not None or value in known


def _double(value: Value, known: dict[Value, Tensor]) -> Tensor:
    tensor = known.get(value, value.constant)
    assert tensor is not None
    return tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu()


def _step(node: Node, value: Value, known: dict[Value, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of one operation on `value` and constants; None if it is another."""
    name = node.what.partition(".")[0].removesuffix("_")
    zero = torch.zeros((), dtype=torch.float64)
    if "batch_norm" in name:
        return _batch_norm(node, value, known)
    if name == "_to_copy" and node.outputs[0].dtype.is_floating_point:
        return zero + 1, zero
    if name not in ("mul", "add", "sub", "div") or len(node.args) < 2:
        return None
    if not (node.args[0] is value and node.args[1] is not value):
        return (
            None if node.args[1] is not value or name in ("sub", "div") else _swapped(node, known)
        )
    if isinstance(node.args[1], Value):
        if not _constant(node.args[1], known):
            return None
        other = _double(node.args[1], known)
    else:
        other = torch.tensor(float(node.args[1]), dtype=torch.float64)
    if name == "mul":
        return other, zero
    if name == "div":
        return 1 / other, zero
    factor = float(node.argument("alpha", 1)) * (-1.0 if name == "sub" else 1.0)
    return zero + 1, other * factor


def _swapped(node: Node, known: dict[Value, Tensor]) -> tuple[Tensor, Tensor] | None:
    first = node.args[0]
    if not isinstance(first, Value) or not _constant(first, known):
        return None
    other, one = _double(first, known), torch.ones((), dtype=torch.float64)
    if node.what.startswith("mul"):
        return other, torch.zeros_like(one)
    return (one, other) if node.argument("alpha", 1) == 1 else None


def _batch_norm(node: Node, value: Value, known: dict[Value, Tensor]) -> tuple[Tensor, Tensor]:
    if node.argument("training", False):
        raise Stop("it normalizes with the statistics of the batch")
    tensors: list[Tensor | None] = []
    for name in ("running_mean", "running_var", "weight", "bias"):
        given = node.argument(name)
        if given is None and name in ("weight", "bias"):
            tensors.append(None)
        elif not isinstance(given, Value) or not _constant(given, known):
            raise Stop(f"its {name} is computed from the input")
        else:
            shape = (-1, *(1,) * (len(value.shape) - 2))
            tensors.append(_double(given, known).reshape(shape))
    mean, var, weight, bias = tensors
    assert mean is not None and var is not None
    if bool((var + float(node.argument("eps", 0.0)) <= 0).any()):
        raise Stop("a variance is negative")
    scale = torch.rsqrt(var + float(node.argument("eps", 0.0)))
    scale = scale if weight is None else scale * weight
    return scale, (0.0 if bias is None else bias) - mean * scale


def _tail(module: nn.Module, run: Run, span: Span, chain: _Chain) -> list[nn.Module]:
    """What runs after the scale and shift: children of the module, and activations."""
    if not chain.nodes or chain.value is chain.source:
        raise Stop("it computes nothing of that kind")
    children = [
        (call.first, call.last, child, call)
        for child in module.children()
        for call in run.spans.get(id(child), ())
        if span.first <= call.first and call.last <= span.last
    ]
    value, parts, rest = chain.value, [], list(chain.rest)
    while value is not span.outputs[0]:
        if value.seen or len({node for node, _ in value.uses}) != 1:
            raise Stop("its normalized values are used elsewhere, too")
        call = next((c for c in children if c[3].inputs == [value] and c[0] < c[1]), None)
        if call is not None and len(call[3].outputs) == 1:
            rest = [node for node in rest if not call[0] <= node.index < call[1]]
            parts.append(call[2])
            value = call[3].outputs[0]
            continue
        node = value.uses[0][0]
        name = node.what.partition(".")[0].removesuffix("_")
        if name not in _ACTIVATIONS or node not in rest:
            raise Stop(f"it goes on with {describe(node)}")
        rest.remove(node)
        parts.append(_ACTIVATIONS[name]())
        value = node.outputs[0]
    if rest:
        raise Stop(f"it also computes {describe(rest[0])}")
    return parts


def _replace(run: Run, module: nn.Module, chain: _Chain) -> None:
    place, index = run.nodes.index(chain.nodes[0]), chain.nodes[-1].index
    for node in chain.nodes:
        run.remove(node)
    new = Node(index, NORM, type(module).__name__, module, inputs=[chain.source])
    new.outputs = [chain.value]
    run.add(new)
    run.nodes.insert(place, run.nodes.pop())


def _ranked(tensor: Tensor, rank: int) -> Tensor:
    return tensor.reshape((1,) * (rank - tensor.dim()) + tuple(tensor.shape))


__all__ = ["Frozen", "recognise"]
