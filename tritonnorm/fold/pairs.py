"""Without example inputs: which batch norms provably follow one layer that has no other use.

Two kinds of proof: the order of children in `nn.Sequential`s up to the root, and a torch.fx trace.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tritonnorm.fold import inspect
from tritonnorm.fold.inspect import Names
from tritonnorm.fold.trace import Traced, traces


@dataclass(frozen=True)
class Pair:
    """The layer that a batch norm can be folded into, and what proves the data flow, in words."""

    producer: nn.Module
    proof: str


class Finder:
    """Answers, for each batch norm of one model, with a `Pair` or with the reason why not."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = Names.of(model)
        self.held = inspect.held(model)
        self.paths: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.paths.setdefault(id(module), []).append(name)
        self.traces: list[Traced] | str = traces(model)

    def find(self, bn: nn.Module) -> Pair | str:
        """The pair of a batch norm, or the reason for leaving it."""
        producer, proof = self._flow_of(bn)
        if isinstance(producer, str):
            return producer
        if holder := self.held.get(id(producer)):
            return f"{self.names[producer]} is also held by {holder}; give example_inputs"
        if reason := inspect.producer_reason(producer, bn) or _axis_unknown(producer, bn):
            return reason
        return Pair(producer, proof)

    def _flow_of(self, bn: nn.Module) -> tuple[nn.Module | str, str]:
        if (producer := self._sequential(bn)) is not None:
            return producer, "neighbours in nn.Sequential"
        if isinstance(self.traces, str):
            return f"the data flow is not proven: {self.traces}; give example_inputs", ""
        answers = [traced.producer(bn) for traced in self.traces]
        for answer in answers:
            if isinstance(answer, str):
                return answer, ""
        if len({id(answer) for answer in answers}) > 1:
            return "the batch norm follows different layers, depending on the arguments", ""
        return answers[0], "torch.fx trace"

    def _sequential(self, bn: nn.Module) -> nn.Module | None:
        """The child before `bn`, when both are called by nothing but plain Sequentials."""
        if len(paths := self.paths[id(bn)]) != 1 or not paths[0]:
            return None
        parts = paths[0].split(".")
        parents = [self.model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
        if any(type(p) is not nn.Sequential or "forward" in p.__dict__ for p in parents):
            return None
        children = list(parents[-1]._modules.values())  # a shared one each time
        position = list(parents[-1]._modules).index(parts[-1])
        producer = children[position - 1] if position and len(children) > position else None
        if producer is None or len(self.paths[id(producer)]) != 1:
            return None
        return producer if type(producer) in inspect.PRODUCERS else None


def _axis_unknown(producer: nn.Module, bn: nn.Module) -> str | None:
    """Without shapes the channel axis is certain only where the ranks leave no choice.

    BatchNorm1d takes (N, C) and (N, C, L), and convolutions take inputs without a batch axis.
    """
    two = type(producer) in (nn.Conv2d, nn.ConvTranspose2d) and isinstance(bn, nn.BatchNorm2d)
    three = type(producer) in (nn.Conv3d, nn.ConvTranspose3d) and isinstance(bn, nn.BatchNorm3d)
    if two or three:
        return None
    return (
        "whether the batch norm acts on the channels of the layer depends on the shapes; "
        "give example_inputs"
    )
