"""Which batch norms provably get their input from one layer, whose output goes nowhere else.

Three kinds of proof: the order of children in `nn.Sequential`s up to the root, a torch.fx trace,
and a recording of real runs. With example inputs only the recording counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from tritonnorm.fold import inspect
from tritonnorm.fold.inputs import Call
from tritonnorm.fold.inspect import Names
from tritonnorm.fold.record import Flow, Output, record
from tritonnorm.fold.trace import Traced, traces


@dataclass(frozen=True)
class Pair:
    """A batch norm and the layer that it can be folded into.

    Attributes:
        name: first name of the batch norm.
        partner: first name of the layer.
        rule: such as "conv2d -> bn".
        proof: what proves the data flow, in words.
        bn: the batch norm.
        producer: the layer.
    """

    name: str
    partner: str
    rule: str
    proof: str
    bn: nn.Module = field(repr=False)
    producer: nn.Module = field(repr=False)


class Finder:
    """Answers, for each batch norm of one model, with a `Pair` or with the reason why not."""

    def __init__(self, model: nn.Module, calls: list[Call] | None) -> None:
        self.model = model
        self.names = Names.of(model)
        self.owners = inspect.weight_owners(model)
        self.paths: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.paths.setdefault(id(module), []).append(name)
        self.compiled = tuple(f"{name}." for name in inspect.compiled_parts(model))
        self.flow: Flow | None = record(model, calls) if calls else None
        self.traces: list[Traced] | str = [] if calls else traces(model)

    def find(self, bn: nn.Module) -> Pair | str:
        """The pair of a batch norm, or the reason for leaving it."""
        if reason := inspect.batch_norm_reason(bn):
            return reason
        if bn is self.model:
            return "the model itself is the batch norm: nothing comes before it"
        if any(name.startswith(self.compiled) for name in self.paths[id(bn)]):
            return "it is inside a compiled module: fold before torch.compile"
        producer, proof = self._flow_of(bn)
        if isinstance(producer, str):
            return producer
        if reason := inspect.producer_reason(producer, bn) or self._tied(producer):
            return reason
        if proof != _RECORDED and (reason := _axis_unknown(producer, bn)):
            return reason
        return Pair(
            self.names[bn], self.names[producer], inspect.rule_name(producer), proof, bn, producer
        )

    def _flow_of(self, bn: nn.Module) -> tuple[nn.Module | str, str]:
        if self.flow is not None:
            return self._recorded(self.flow, bn), _RECORDED
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
        children = list(parents[-1].children())
        position = list(parents[-1]._modules).index(parts[-1])
        producer = children[position - 1] if position and len(children) > position else None
        if producer is None or len(self.paths[id(producer)]) != 1:
            return None
        return producer if type(producer) in inspect.PRODUCERS else None

    def _recorded(self, flow: Flow, bn: nn.Module) -> nn.Module | str:
        if id(bn) not in flow.inputs:
            return "the batch norm was not executed on the example inputs"
        if id(bn) in flow.extra:
            return "the batch norm is called with more than one input"
        if id(bn) in flow.foreign:
            return f"the batch norm's {flow.foreign[id(bn)]}"
        sources = flow.inputs[id(bn)]
        first = sources[0]
        if first is None:
            return "the input of the batch norm is not the output of a convolution or linear layer"
        name = self.names[first]
        if any(source is not first for source in sources):
            return f"the batch norm is called after {name} and after something else"
        if id(first) in flow.foreign:
            return f"{name}'s {flow.foreign[id(first)]}"
        for output in flow.outputs[id(first)]:
            if reason := self._other_use(output, bn, name):
                return reason
        return first

    def _other_use(self, output: Output, bn: nn.Module, name: str) -> str:
        others = [consumer for consumer in output.consumers if consumer is not bn]
        if others:
            return f"{name} is also called before another batch norm ({self.names[others[0]]})"
        if not output.consumers:
            return f"{name} is also called without the batch norm"
        if len(output.consumers) > 1:
            return f"the output of {name} goes into the batch norm more than once"
        if output.uses:
            return f"the output of {name} is also used by {', '.join(sorted(set(output.uses)))}"
        if output.alive:
            return f"the output of {name} is {output.alive}"
        producer = output.producer
        expected = 2 if type(producer) is nn.Linear else _weight(producer).dim()
        if len(output.shape) != expected:
            shape = tuple(output.shape)
            return f"the channels of the batch norm are not those of {name}: its output is {shape}"
        return ""

    def _tied(self, producer: nn.Module) -> str | None:
        for key, tensor in producer._parameters.items():
            if tensor is None:
                continue
            owners = self.owners[inspect.storage_key(tensor) or 0]
            if len(owners) > 1:
                shown = ", ".join(sorted(owners))
                return f"the {key} of {self.names[producer]} is shared: {shown}"
        return None


_RECORDED = "recorded run"


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__}.weight: expected a tensor")
    return weight


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
