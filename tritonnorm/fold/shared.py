"""A layer that is called before several batch norms: each gets its own copy of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from tritonnorm.fold import inspect, sites
from tritonnorm.fold.change import Stop
from tritonnorm.fold.graph import LAYER, Node
from tritonnorm.fold.outcome import Plan
from tritonnorm.fold.sites import IDENTITY, NORM, Site

if TYPE_CHECKING:
    from tritonnorm.fold.plan import Planner


def untie(planner: Planner, bn: nn.Module) -> tuple[dict[str, Plan], dict[nn.Module, Site]]:
    """Plans for all batch norms behind the layer of one, and what the modules become.

    The layer becomes an identity, and each batch norm a copy of the layer with itself folded in.

    Raises:
        Stop: another module, or another use of the layer, is in the way.
    """
    conv = _maker(planner.calls[bn][0][1])
    if conv is None or planner.site(conv).role != LAYER:
        raise Stop("")
    site, layer = planner.site(conv), planner.names[conv]
    if reason := planner._closed(conv):
        raise Stop(reason)
    norms: dict[nn.Module, None] = {}
    for run, call in planner.calls[conv]:
        output = call.outputs[0]
        norm = output.uses[0][0].module if len(output.uses) == 1 and not output.seen else None
        if norm is None or norm not in planner.open or norm in planner.affines:
            raise Stop("")
        if planner.site(norm).role != NORM or planner._foreign(norm):
            raise Stop("")
        if len(output.shape) != site.weight.dim():
            raise Stop("the channels of the batch norm are not those of the layer")
        planner._clash(run, call)
        norms[norm] = None
    calls = [call for norm in norms for _, call in planner.calls[norm]]
    if any(call.outputs[0].memory is None for call in calls):
        raise Stop("one of the batch norms behind the layer does more than normalize")
    if len(norms) < 2 or any(_maker(call) is not conv for call in calls):
        raise Stop("")
    changes = {conv: site.becomes(IDENTITY)}
    plans: dict[str, Plan] = {}
    weight = conv.weight
    size = weight.numel() * weight.element_size()  # type: ignore[operator]
    for norm in norms:
        affine = planner._affine(norm)
        changes[norm] = sites.after_layer(Site(norm, LAYER, layer=conv, exact=site.exact), affine)
        name, scale = planner.names[norm], float(affine.scale.abs().amax())
        plans[name] = Plan(
            name,
            f"shared {inspect.rule_name(conv)}",
            (layer,),
            f"{layer} is called before {len(norms)} batch norms: each has a copy of it now",
            scale=scale,
            bytes=size if plans else 0,
        )
    return plans, changes


def _maker(call: Node) -> nn.Module | None:
    """The layer whose output a batch norm is called on."""
    node = call.inputs[0].node
    return node.module if node is not None and node.kind == LAYER else None
