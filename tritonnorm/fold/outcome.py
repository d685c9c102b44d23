"""What a planner decides about each batch norm."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from tritonnorm.fold.sites import Site


@dataclass(frozen=True, eq=False)
class Plan:
    """How one batch norm folds.

    Attributes:
        name: first name of the batch norm.
        rule: such as "conv2d -> bn".
        partners: names of the layers that change.
        reason: why this is right, in words.
        reduced: an addition per channel is left.
        scale: largest |scale| over the channels.
        bytes: memory that untied weights take more.
    """

    name: str
    rule: str
    partners: tuple[str, ...]
    reason: str
    reduced: bool = False
    scale: float = 0.0
    bytes: int = 0
    proof: str = ""

    @property
    def direct(self) -> bool:
        """Whether it concerns a layer and the batch norm right behind it."""
        return len(self.partners) == 1 and self.rule.count("->") == 1 and self.rule.endswith("bn")


@dataclass
class Outcome:
    """All plans of a model, by the name of the batch norm, and why the others have none."""

    plans: dict[str, Plan] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    sites: dict[nn.Module, Site] = field(default_factory=dict)
    merged: dict[str, str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)

    @property
    def made(self) -> list[str]:
        """The batch norms that change, in the order in which they were planned."""
        return [*self.plans, *(name for name in self.fused if name not in self.plans)]
