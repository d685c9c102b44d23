"""How many bytes of memory traffic fusing saves, by the fewest bytes that each launch can move."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritonnorm.activation import ACTIVATIONS, PRELU
from tritonnorm.flow.inputs import calls_from
from tritonnorm.fusing.verify import observed
from tritonnorm.problem import Problem, View, minimum_bytes
from tritonnorm.report import Report

_KINDS = {**ACTIVATIONS, PRELU.name: PRELU}


@dataclass(frozen=True)
class Saving:
    """Bytes of one training step in the norms and what follows them.

    Attributes:
        before: each norm, addition and activation as a launch of its own.
        after: as the report says.
    """

    before: int
    after: int


def predicted(model: nn.Module, report: Report, example_inputs: object) -> Saving:
    """The traffic of the replaced norms in one training step on the inputs.

    Args:
        model: the model, before or after `replace`.
        report: of `replace`.
        example_inputs: as for `replace`; the model is run on the first.

    Raises:
        ValueError: the model raised on the inputs.
    """
    rules = {row.name: row.rule for row in report.rows if row.decision in ("fused", "replaced")}
    names = {module: name or "(root)" for name, module in model.named_modules()}
    before = after = 0

    def look(module: nn.Module, args: tuple[object, ...], kwargs: object) -> None:
        nonlocal before, after
        rule = rules.get(names.get(module, ""))
        if rule is not None and args and isinstance(args[0], Tensor) and args[0].numel():
            before += separate(args[0], rule)
            after += together(args[0], rule)

    observed(model, calls_from(example_inputs)[:1], look)
    return Saving(before, after)


def together(x: Tensor, rule: str) -> int:
    """Bytes of forward and backward where one call computes all of a rule.

    Other norms than batch norm keep the residual for any activation, never a bit per element.
    """
    parts = rule.split(" -> ")
    kind = _KINDS.get(parts[-1])
    added = "add" in parts
    bits = kind is not None and kind.two_valued and parts[0] == "bn"
    problems = [
        Problem(
            direction,
            True,
            _view(x),
            x.dtype,
            "none" if kind is None else "two_valued" if bits else "smooth",
            residual=added,
            mask=added and bits,
            needs_dresidual=added and direction == "backward" and kind is not None,
        )
        for direction in ("forward", "backward")
    ]
    return sum(map(minimum_bytes, problems))


def separate(x: Tensor, rule: str) -> int:
    """Bytes of forward and backward where each part of a rule is a launch of its own.

    An addition reads two tensors and writes one; its gradient is passed on as it is. An activation
    reads one and writes one; its gradient reads two and writes one.
    """
    parts = rule.split(" -> ")
    tensors = 3 * ("add" in parts) + 5 * (parts[-1] in _KINDS)
    return together(x, "bn") + tensors * x.numel() * x.element_size()


def _view(x: Tensor) -> View:
    sizes = x.shape if x.dim() > 1 else torch.Size((1, *x.shape))
    like = torch.empty_strided(sizes, x.stride() or (1,), device="meta")
    view = View.of(sizes, like.stride(), torch.empty_like(like).stride())
    if view is None:  # a dense copy is made
        view = View.of(sizes, *(torch.empty(sizes, device="meta").stride(),) * 2)
    assert view is not None
    return view
