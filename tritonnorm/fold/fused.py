"""What does not fold away takes the activation behind it along, and runs with it in one launch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from tritonnorm.activation import of_module
from tritonnorm.fold import inspect
from tritonnorm.fold.graph import Run, Span
from tritonnorm.fold.sites import FUSED, IDENTITY, NORM, SHIFT, Site

if TYPE_CHECKING:
    from tritonnorm.fold.plan import Planner

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fuse_activations(planner: Planner) -> None:
    """Give each batch norm that stays, or of which an addition stays, the activation behind it.

    Both have to be called together and nowhere else, with nothing in between.
    """
    by_id = {id(module): module for module in planner.names.modules.values()}
    for name, bn in planner.norms.items():
        if bn not in planner.calls or type(bn) not in _PLAIN or planner._foreign(bn):
            continue
        site = planner.out.sites.get(bn)
        if site is None or site.role not in (NORM, SHIFT) or (site.role == NORM and site.changed):
            continue
        found = {_behind(planner, run, node.outputs[0], by_id) for run, node in planner.calls[bn]}
        activation = found.pop()
        if found or activation is None:
            continue
        calls = sum(len(run.spans.get(id(activation), ())) for run in planner.runs)
        if calls != len(planner.calls[bn]) or inspect.hooked(activation):
            continue
        kind, numbers = of_module(activation) or (None, ())
        assert kind is not None  # `_behind` found it
        role = FUSED if site.role == NORM else SHIFT
        planner.out.sites[bn] = replace(site, role=role, activation=(kind, numbers), changed=True)
        planner.out.sites[activation] = Site(activation, IDENTITY, changed=True)
        planner.out.fused[name] = planner.names[activation]


def _behind(
    planner: Planner, run: Run, value: Any, by_id: dict[int, nn.Module]
) -> nn.Module | None:
    """The activation module that alone uses a value."""
    if value.seen or len(value.uses) != 1:
        return None
    node = value.uses[0][0]

    def around(span: Span) -> bool:
        return span.first <= node.index < span.last and span.inputs == [value]

    for key, spans in run.spans.items():
        module = by_id.get(key)
        if module is not None and _named(module) and any(map(around, spans)):
            return module
    return None


def _named(module: nn.Module) -> bool:
    """Whether it is exactly an activation module of torch that kernels have."""
    found = of_module(module)
    return found is not None and found[0] is not None
