"""freeze(model): fine-tuning with fixed statistics, folded in every step (arXiv 2305.11624).

Weights, gamma and beta are trained as before; each forward folds them into one weight and bias per
layer, and gradients flow through the fold. Where the statistics are fixed that is the same function
as layer and batch norm one after the other, without the batch norm's pass over the activations and
without keeping the layer's output for its backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from . import folding, frozen
from .folding import Source
from .joined import Joined
from .report import LEFT, Report, Row

__all__ = ["freeze", "unfreeze"]

Filter = Callable[[nn.Module, str], bool]


def freeze(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    filter_fn: Filter | None = None,
    dry_run: bool = False,
) -> tuple[nn.Module, Report]:
    """Fix the statistics of the batch norms that follow a layer, and fold them in every step.

    The parameters stay the same objects under the same names, and so do the buffers; optimizers and
    checkpoints go on. The model is edited in place: modules get another class, the model two hooks.
    A batch norm that is left goes on as it was, with batch statistics in training.

    Args:
        model: the model.
        example_inputs: inputs as `tritonnorm.fold` takes them. The model runs on them in training
            mode, except for its batch norms, and in eval mode; a pair counts when both show it.
            Without inputs only what `nn.Sequential`, a torch.fx trace, or a module of
            `tritonnorm.conv_nn` proves is frozen.
        filter_fn: called as ``filter_fn(batch_norm, name)``; False leaves the batch norm.
        dry_run: only report.

    Returns:
        The same model and the report, one row per batch norm.

    Raises:
        ValueError: the model is not a module, or raised on the example inputs; nothing is changed
            then.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    report = Report("freeze", dry_run=dry_run)
    from .fold import pairing  # here, with the work: it takes 60 ms to import

    if reason := pairing.frozen_reason(model):
        for name, bn in pairing.batch_norms(model):
            report.rows.append(Row(name or "(root)", type(bn).__name__, LEFT, reason))
        report.notes.append(reason)
        return model, report
    layers = {id(pair[1]): pair for pair in _joined(model)}
    finder = None
    chosen: list[tuple[nn.Module, nn.Module]] = []
    for name, bn in pairing.batch_norms(model):
        row = (name or "(root)", type(bn).__name__)
        if filter_fn is not None and not filter_fn(bn, name):
            report.rows.append(Row(*row, LEFT, "left out by filter_fn"))
            continue
        if type(bn) in frozen.PLAIN:
            report.rows.append(Row(*row, LEFT, "it is frozen already"))
            continue
        pair: Any = layers.get(id(bn))
        proof = "they are one module"
        if pair is None:
            finder = finder or pairing.Both(model, example_inputs)
            pair, proof = finder.find(bn)
        reason = proof if pair is None else _refusal(*pair)
        if reason is not None:
            report.rows.append(Row(*row, LEFT, reason))
            continue
        layer = pair[0]
        chosen.append(pair)
        partner = next(n for n, m in model.named_modules() if m is layer)
        report.rows.append(Row(*row, "frozen", proof, pairing.rule_name(layer), partner))
    if not dry_run and chosen:
        _swap(model, chosen)
    return model, report


def unfreeze(model: nn.Module) -> nn.Module:
    """Undo `freeze`: every module gets its class back, with what the parameters have learned.

    Args:
        model: the model, or a copy or a part of it; it is edited in place.

    Returns:
        The same model.
    """
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), frozen.Group):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
        if type(module) in frozen.PLAIN:
            module.__class__ = frozen.PLAIN[type(module)]
            module.__dict__.pop("_frozen", None)
    return model


def _joined(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The pairs inside modules of `conv_nn`, where neither part has a second place."""
    places = Counter(id(child) for module in model.modules() for child in module.children())
    for module in model.modules():
        if isinstance(module, Joined) and module.is_plain():
            layer, bn = module.layer, module.bn
            if places[id(layer)] == places[id(bn)] == 1:
                yield layer, bn


def _refusal(layer: nn.Module, bn: nn.Module) -> str | None:
    source = Source.of(layer, bn)
    if not source.plain:
        return "a tensor is a subclass, is not strided or has no values yet"
    with torch.no_grad():
        return folding.refusal(source, folding.fold(source))


def _swap(model: nn.Module, pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    layers: list[Any] = []
    for layer, bn in pairs:
        layer.__dict__["_frozen"] = frozen.State(bn)
        layer.__class__ = frozen.LAYERS[type(layer)]
        bn.__class__ = frozen.NORMS[type(bn)]
        layers.append(layer)
    group = frozen.Group(layers)
    model.register_forward_pre_hook(group.before)
    model.register_forward_hook(group.after, always_call=True)
