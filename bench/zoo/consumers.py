"""What uses the output of each batch norm in one run: seen by the operations, not by `replace`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Fusable", "fusable"]

ACTIVATIONS = frozenset(
    ("relu", "leaky_relu", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "elu", "gelu")
) | {"softplus", "mish"}
SLOPE = "_prelu_kernel"


@dataclass
class _Output:
    """One output of a batch norm, and the operations that read it: name, id of the call."""

    norm: nn.Module
    tensor: Tensor
    uses: list[tuple[str, int]] = field(default_factory=list)
    closed: bool = False  # overwritten, so later reads see something else


@dataclass
class Fusable:
    """Batch norms that could run together with what follows them.

    Attributes:
        groups: sets of batch norms of which one can be fused: two where both are added.
        slopes: those among them that a prelu follows, whose slope is learned.
    """

    groups: set[frozenset[nn.Module]] = field(default_factory=set)
    slopes: set[frozenset[nn.Module]] = field(default_factory=set)


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, _Output] = {}
        self.calls = 0

    def made(self, norm: nn.Module, args: Any, tensor: Tensor) -> None:
        self.outputs[tensor.untyped_storage()._cdata] = _Output(norm, tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        plain = name.rstrip("_")
        if plain == "hardtanh" and tuple(args[1:3]) == (0, 6):
            plain = "relu"
        if plain == "add":
            alike = isinstance(args[1], Tensor) and args[0].shape == args[1].shape
            plain = "add" if alike and kwargs.get("alpha", 1) == 1 else "other"
        self.calls += 1
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                found = self.outputs.get(tensor.untyped_storage()._cdata)
                if found is not None and not found.closed:
                    found.uses.append((plain, self.calls))
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            written = self.outputs.get(args[0].untyped_storage()._cdata)
            if written is not None:
                written.closed = True
        return func(*args, **kwargs)


def fusable(model: nn.Module, run: Any) -> Fusable:
    """The batch norms of a model with an activation or an addition as their only consumer.

    Args:
        model: the model, in eval mode.
        run: runs it once and returns its outputs.
    """
    watch = _Watch()
    handles = [
        m.register_forward_hook(watch.made) for m in model.modules() if isinstance(m, _BatchNorm)
    ]
    with torch.no_grad(), watch:
        returned = tree_leaves(run())
    for handle in handles:
        handle.remove()
    kept = {t.untyped_storage()._cdata for t in returned if isinstance(t, Tensor)}
    found, sums = Fusable(), dict[int, set[nn.Module]]()
    for key, output in watch.outputs.items():
        names = sorted(name for name, _ in output.uses)
        if key in kept and not output.closed:
            continue
        by_hand = names == ["mul", "sigmoid"]
        if by_hand or (len(names) == 1 and names[0] in (*ACTIVATIONS, SLOPE)):
            found.groups.add(frozenset((output.norm,)))
            if names == [SLOPE]:
                found.slopes.add(frozenset((output.norm,)))
        elif names == ["add"]:
            sums.setdefault(output.uses[0][1], set()).add(output.norm)
    found.groups |= {frozenset(norms) for norms in sums.values()}
    return found
