"""The fold of one pair as an edit of the model: computed, applied, and undone on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tritonnorm.activation import resolve
from tritonnorm.fold import algebra
from tritonnorm.fold.algebra import Folded, ScaleShift
from tritonnorm.fold.inspect import OURS, TRANSPOSED
from tritonnorm.fold.pairs import Pair


@dataclass(frozen=True)
class Edit:
    """What folding one pair puts into the model.

    Attributes:
        pair: the batch norm and the layer.
        exact: folded parameters in float64.
        stored: the same, rounded to the layer's dtype.
        scale: largest |scale| over the channels.
    """

    pair: Pair
    exact: Folded
    stored: Folded
    scale: float


def plan_edit(pair: Pair) -> Edit:
    """Compute the folded parameters of a pair; changes nothing.

    Raises:
        FoldRefused: the numbers do not allow it; the message says why.
    """
    affine = affine_of(pair.bn)
    weight = _tensor(pair.producer.weight)
    exact = fold_into(pair.producer, affine)
    groups = pair.producer.groups if type(pair.producer) in TRANSPOSED else None
    peak = algebra.channel_maximum(exact.weight, groups)  # type: ignore[arg-type]
    stored = algebra.cast(exact, weight, peak)
    return Edit(pair, exact, stored, float(affine.scale.abs().amax()))


def affine_of(bn: nn.Module) -> ScaleShift:
    """Scale and shift of a batch norm in eval mode."""
    return algebra.scale_shift(
        _tensor(bn.running_mean),
        _tensor(bn.running_var),
        bn.eps,  # type: ignore[arg-type]
        bn.weight,  # type: ignore[arg-type]
        bn.bias,  # type: ignore[arg-type]
    )


def fold_into(producer: nn.Module, affine: ScaleShift) -> Folded:
    """Folded parameters of a convolution, transposed convolution or linear layer, in float64."""
    weight, bias = _tensor(producer.weight), producer._parameters["bias"]
    if type(producer) in TRANSPOSED:
        return algebra.fold_conv_transpose(weight, bias, producer.groups, affine)  # type: ignore[arg-type]
    return algebra.fold_conv(weight, bias, affine)


def successor(bn: nn.Module) -> nn.Module:
    """What takes the place of a folded batch norm: its activation, or an identity."""
    if type(bn) in OURS:
        activation, args = resolve(bn.activation, bn.activation_args)  # type: ignore[arg-type]
        if activation is not None:
            module = activation.module(*args)
            return module.train(bn.training)
    return nn.Identity().train(bn.training)


class Applied:
    """Edits that were made to a model, with what is needed to take them back."""

    def __init__(self) -> None:
        self._parameters: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        self._children: list[tuple[nn.Module, str, nn.Module]] = []

    def undo(self) -> None:
        """Put the original parameter and module objects back."""
        for parent, key, child in reversed(self._children):
            parent._modules[key] = child
        for module, key, parameter in reversed(self._parameters):
            module._parameters[key] = parameter

    def add(self, model: nn.Module, edit: Edit, folded: Folded) -> None:
        """Fold one pair of `model`, whose modules are found by their names."""
        producer = model.get_submodule(edit.pair.partner)
        bn = model.get_submodule(edit.pair.name)
        self._set(producer, "weight", folded.weight)
        self._set(producer, "bias", folded.bias)
        put = successor(bn)
        for parent in model.modules():
            for key, child in parent._modules.items():
                if child is bn:
                    self._children.append((parent, key, child))
                    parent._modules[key] = put

    def _set(self, module: nn.Module, key: str, value: Tensor) -> None:
        old = module._parameters[key]
        grad = _tensor(module.weight).requires_grad if old is None else old.requires_grad
        new = nn.Parameter(value, requires_grad=grad)
        if old is not None:
            new.__dict__.update(old.__dict__)  # marks that other libraries leave on parameters
        self._parameters.append((module, key, old))
        module._parameters[key] = new


def apply(model: nn.Module, edits: Sequence[Edit], *, exact: bool = False) -> Applied:
    """Fold all pairs; either all of them or, when one raises, none.

    Args:
        model: the model the pairs were found in, or a copy of it.
        edits: the edits.
        exact: store the float64 parameters (for verification) instead of the rounded ones.
    """
    applied = Applied()
    try:
        for edit in edits:
            applied.add(model, edit, edit.exact if exact else edit.stored)
    except BaseException:
        applied.undo()
        raise
    return applied


def _tensor(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"expected a tensor, got {type(value).__name__}")
    return value
