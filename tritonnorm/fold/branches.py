"""Parallel branches: linear layers and batch norms of one input whose outputs are summed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from tritonnorm.fold.algebra import Folded, FoldRefused, ScaleShift
from tritonnorm.fold.change import Stop
from tritonnorm.fold.graph import OPERATION, Node, Value
from tritonnorm.fold.inspect import CONVS
from tritonnorm.fold.sites import LAYER, ZERO, Site

if TYPE_CHECKING:
    from tritonnorm.fold.plan import Planner


def into_branch(planner: Planner, bn: nn.Module, affine: ScaleShift) -> dict[nn.Module, Site]:
    """The batch norm as a tap of a convolution beside it: w[c, c, centre] += scale.

    Raises:
        Stop: there is no such convolution.
    """
    calls = planner.calls[bn]
    for beside in _beside(planner, calls[0][1]):
        site = planner.site(beside)
        if site.role != LAYER or not isinstance(beside, CONVS) or planner._closed(beside):
            continue
        weight = site.weight
        if any(step != 1 for step in beside.stride) or not _together(planner, bn, beside):
            continue
        tap = _tap(beside)
        channels = affine.scale.numel()
        if tap is None or not beside.in_channels == beside.out_channels == channels:
            continue
        exact = site.exact
        assert exact is not None
        new, each = weight.clone(), torch.arange(channels)
        new.flatten(2)[each, each % weight.shape[1], _flat(tap, weight.shape[2:])] += affine.scale
        changed = site.with_parameters(Folded(new, exact.bias + affine.shift))
        return {bn: planner.site(bn).becomes(ZERO), beside: changed}
    raise Stop("")


def merge_branches(planner: Planner) -> None:
    """Merge convolutions of one input that are summed, where batch norms were folded into them."""
    for layer in list(planner.calls):
        site = planner.out.sites.get(layer)
        if site is None or site.role != LAYER or not site.changed:
            continue
        if not isinstance(layer, CONVS) or site.layer is not layer:
            continue
        for beside in _beside(planner, planner.calls[layer][0][1]):
            other = planner.out.sites.get(beside)
            if other is None or other.role != LAYER or not other.changed or beside is layer:
                continue
            if other.layer is not beside or not _together(planner, layer, beside):
                continue
            merged = _embed(site, other)
            if merged is None:
                continue
            try:
                planner.out.sites[beside] = other.with_parameters(merged)
            except FoldRefused:
                continue
            planner.out.sites[layer] = site.becomes(ZERO)
            planner.out.merged[planner.names[layer]] = planner.names[beside]
            break


def _embed(small: Site, large: Site) -> Folded | None:
    """The weight and bias of one convolution that does what both do, summed."""
    a, b = small.layer, large.layer
    assert isinstance(a, CONVS) and isinstance(b, CONVS) and small.exact and large.exact
    if (a.stride, a.groups, a.out_channels) != (b.stride, b.groups, b.out_channels):
        return None
    same = (a.kernel_size, a.dilation) == (b.kernel_size, b.dilation)
    if same and (a.padding, a.padding_mode) == (b.padding, b.padding_mode):
        weight = large.weight + small.weight
    else:
        if any(size != 1 for size in a.kernel_size) or isinstance(a.padding, str) or any(a.padding):
            return None
        tap = _tap(b)
        if tap is None or tuple(b.kernel_size) == tuple(a.kernel_size):
            return None
        weight = large.weight.clone()
        weight.flatten(2)[..., _flat(tap, weight.shape[2:])] += small.weight.flatten(2)[..., 0]
    bias = small.exact.bias + large.exact.bias
    return Folded(weight, bias)


def _tap(conv: nn.Module) -> tuple[int, ...] | None:
    """The place in the kernel that meets the input at the position of the output."""
    assert isinstance(conv, CONVS)
    tap = []
    for axis, (step, size) in enumerate(zip(conv.dilation, conv.kernel_size, strict=True)):
        pad = 0
        if conv.padding == "same":  # the larger half is behind
            pad = step * (size - 1) // 2
        elif not isinstance(conv.padding, str):
            pad = conv.padding[axis]
        if pad % step or pad // step >= size:
            return None
        tap.append(pad // step)
    return tuple(tap)


def _flat(place: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    number = 0
    for index, size in zip(place, sizes, strict=True):
        number = number * size + index
    return number


def _beside(planner: Planner, node: Node) -> Iterator[nn.Module]:
    """Layers with the same input whose outputs meet that of `node` in a sum."""
    source = node.inputs[0]
    for other in _terms(planner, node):
        if other is not node and other.inputs[0] is source and other.module is not None:
            yield other.module


def _together(planner: Planner, first: nn.Module, second: nn.Module) -> bool:
    """Whether every call of the one meets a call of the other, and neither is used otherwise."""
    mine, theirs = planner.calls[first], planner.calls[second]
    if len(mine) != len(theirs):
        return False
    for (_, a), (_, b) in zip(mine, theirs, strict=True):
        if a.inputs[0] is not b.inputs[0] or b not in _terms(planner, a):
            return False
        if a.outputs[0].shape != b.outputs[0].shape:
            return False
    return True


def _terms(planner: Planner, node: Node) -> list[Node]:
    """The nodes whose outputs are summed with that of `node`, itself included.

    A folded batch norm on the way is an identity. Empty when the output of `node` would not make
    a valid zero there.
    """
    top = _single(planner, node.outputs[0])
    if top is None or (top[1] == 0 and top[0].what.startswith("add_")):
        return []
    sums = top[0]
    while (above := _single(planner, sums.outputs[0])) is not None:
        sums = above[0]
    found: list[Node] = []
    open_: list[Value] = [sums.outputs[0]]
    while open_:
        value = open_.pop()
        maker = value.node
        while maker is not None and maker.module is not None and _passes(planner, maker):
            value = maker.inputs[0]
            maker = value.node
        at_top = value is sums.outputs[0]
        if maker is None or (not at_top and (len(value.uses) != 1 or value.seen)):
            continue
        if maker.kind == OPERATION:
            if _is_sum(maker):
                open_ += maker.inputs
        else:
            found.append(maker)
    return found


def _single(planner: Planner, value: Value) -> tuple[Node, int] | None:
    """The addition that alone uses a value, through identities."""
    while len(value.uses) == 1 and not value.seen:
        node, place = value.uses[0]
        if node.module is not None and _passes(planner, node):
            value = node.outputs[0]
        elif _is_sum(node):
            return node, place
        else:
            return None
    return None


def _is_sum(node: Node) -> bool:
    if node.kind != OPERATION or node.what.partition(".")[0] not in ("add", "add_"):
        return False
    shapes = {value.shape for value in (*node.inputs, *node.outputs)}
    return len(node.inputs) == 2 and len(shapes) == 1 and node.argument("alpha", 1) == 1


def _passes(planner: Planner, node: Node) -> bool:
    assert node.module is not None
    return planner.site(node.module).role == "identity"
