"""fold_state_dict: fold the tensors of a checkpoint by name, without the model's code."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tritonnorm.fold import algebra
from tritonnorm.fold.algebra import FoldRefused
from tritonnorm.report import LEFT, Report, Row

__all__ = ["fold_state_dict"]

_PARTS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_DIRECT = ("conv1d", "conv2d", "conv3d", "linear")


def fold_state_dict(
    state_dict: Mapping[str, Tensor],
    pairs: Mapping[str, str] | Report,
    *,
    eps: float | Mapping[str, float] | None = None,
) -> tuple[dict[str, Tensor], Report]:
    """Fold the batch norms of a checkpoint into convolutions and linear layers, by their names.

    A checkpoint holds tensors, not what follows what. So the caller says it: as names, or with
    the report of `fold` on a model of the same architecture. The result loads into that folded
    model when every one of its folds is of this kind.

    Args:
        state_dict: the tensors by name; it is not changed.
        pairs: for the name of each batch norm the name of the convolution or linear layer right
            before it, whose output nothing else uses; or the report of a fold, of which the rows
            that say so count. Not for transposed convolutions.
        eps: of all batch norms, or of each by its name (1e-5 where there is none); by default
            what the report has, or 1e-5.

    Returns:
        The folded tensors and a report with one row per batch norm of the checkpoint.

    Raises:
        ValueError: a pair names what the checkpoint does not have, or tensors that do not fit.
    """
    given = _from_report(pairs) if isinstance(pairs, Report) else dict(pairs)
    if eps is None:
        eps = pairs.eps if isinstance(pairs, Report) else {}
    taken = list(given.values())
    for bn, layer in given.items():
        _check(state_dict, bn, layer)
        if taken.count(layer) > 1:
            raise ValueError(f"pairs: expected each layer once, got {layer!r} several times")
    folded, report = dict(state_dict), Report("fold")
    for key in state_dict:
        bn = key.removesuffix(".running_mean")
        if bn == key:
            continue
        if bn not in given:
            report.rows.append(Row(bn, "tensors", LEFT, "no pair names it"))
            continue
        layer = given[bn]
        own = eps if isinstance(eps, int | float) else eps.get(bn, 1e-5)
        try:
            report.rows.append(_fold(state_dict, folded, bn, layer, float(own)))
        except FoldRefused as refusal:
            report.rows.append(Row(bn, "tensors", LEFT, str(refusal)))
    return folded, report


def _from_report(report: Report) -> dict[str, str]:
    rows = [row for row in report.rows if row.decision == "folded" and row.rule.endswith(" -> bn")]
    kinds = {row.name: row.rule.removesuffix(" -> bn").removeprefix("grouped ") for row in rows}
    found = {row.name: row.partner for row in rows if kinds[row.name] in _DIRECT}
    return {bn: layer for bn, layer in found.items() if "," not in layer}


def _check(state_dict: Mapping[str, Tensor], bn: str, layer: str) -> None:
    mean, weight = state_dict.get(f"{bn}.running_mean"), state_dict.get(f"{layer}.weight")
    if mean is None or f"{bn}.running_var" not in state_dict:
        raise ValueError(f"pairs: expected a batch norm with running statistics, got {bn!r}")
    if weight is None or weight.dim() < 2:
        raise ValueError(f"pairs: expected a convolution or linear layer, got {layer!r}")
    if weight.shape[0] != mean.numel():
        raise ValueError(
            f"pairs: expected {layer!r} to give the {mean.numel()} channels of {bn!r}, "
            f"got a weight of shape {tuple(weight.shape)}"
        )


def _same(state_dict: Mapping[str, Tensor], key: str) -> list[str]:
    """Other names of a tensor: a checkpoint has one for each name of a module."""
    mine = state_dict[key]
    alike = (
        other
        for other, tensor in state_dict.items()
        if other != key and tensor.shape == mine.shape and tensor.dtype == mine.dtype
    )
    return [other for other in alike if torch.equal(state_dict[other], mine)]


def _fold(
    old: Mapping[str, Tensor], new: dict[str, Tensor], bn: str, layer: str, eps: float
) -> Row:
    mean, var, gamma, beta = (
        old.get(f"{bn}.{name}") for name in ("running_mean", "running_var", "weight", "bias")
    )
    assert mean is not None and var is not None
    affine = algebra.scale_shift(mean, var, eps, gamma, beta)
    weight = old[f"{layer}.weight"]
    if others := _same(old, f"{layer}.weight"):
        raise FoldRefused(f"the weight of {layer} is also {', '.join(others)}")
    exact = algebra.fold_conv(weight, old.get(f"{layer}.bias"), affine)
    stored = algebra.cast(exact, weight, algebra.channel_maximum(exact.weight))
    new[f"{layer}.weight"], new[f"{layer}.bias"] = stored.weight, stored.bias
    for name in _PARTS:
        new.pop(f"{bn}.{name}", None)
    kind = "linear" if weight.dim() == 2 else f"conv{weight.dim() - 2}d"
    scale = float(affine.scale.abs().amax())
    return Row(bn, "tensors", "folded", "named as a pair", f"{kind} -> bn", layer, scale)
