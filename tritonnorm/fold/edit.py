"""The edits of a fold on a model: made all together, and undone on demand."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tritonnorm.activated import torch_class
from tritonnorm.activation import resolve
from tritonnorm.fold.algebra import Folded
from tritonnorm.fold.inspect import OURS, Names, is_layer
from tritonnorm.fold.modules import AddActivation, ChannelShift, Zero
from tritonnorm.fold.sites import FUSED, LAYER, NORM, SHIFT, ZERO, Site, norm_parameters
from tritonnorm.nn import BatchNormAct2d

Tails = Mapping[nn.Module, nn.Module]


def tail_of(bn: nn.Module, residual: bool = False) -> nn.Module | None:
    """What one of our batch norms does after the normalization; None for nothing."""
    found: nn.Module | None = None
    if isinstance(bn, BatchNormAct2d):
        found = None if type(bn.act) is nn.Identity else bn.act
    elif isinstance(bn, OURS):
        activation, args = resolve(bn.activation, bn.activation_args)  # type: ignore[arg-type]
        found = None if activation is None else activation.module(*args)
    return AddActivation(found) if residual else found


def _with_activation(bn: nn.Module, name: str, args: tuple[float, ...]) -> nn.Module:
    """One of our batch norms with the tensors of this one."""
    put = copy.copy(bn)
    put.__dict__ |= {k: copy.copy(v) for k, v in bn.__dict__.items() if isinstance(v, dict)}
    put.__class__ = next(ours for ours in OURS if isinstance(bn, torch_class(ours)))
    put.activation, put.activation_args = name, args  # type: ignore[assignment]
    return put


class Applied:
    """Edits that were made to a model, with what is needed to take them back."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        self._children: list[tuple[nn.Module, str, nn.Module]] = []
        self._forwards: list[tuple[nn.Module, dict[str, object]]] = []
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for key, child in parent._modules.items():
                self._places.setdefault(id(child), []).append((parent, key))

    def undo(self) -> None:
        """Put the original parameter and module objects back."""
        for parent, key, child in reversed(self._children):
            parent._modules[key] = child
        for module, key, parameter in reversed(self._parameters):
            module._parameters[key] = parameter
        for module, forward in self._forwards:
            module.__dict__.update(forward)
        self._children, self._parameters, self._forwards = [], [], []

    def add(self, there: nn.Module, site: Site, tail: nn.Module | None, exact: bool) -> None:
        """Edit one module as its site says."""
        if site.role == LAYER:
            assert site.exact is not None and site.layer is not None and site.stored is not None
            folded = site.exact if exact else site.stored
            if not is_layer(there):  # a batch norm that becomes a copy of a shared layer
                put = copy.deepcopy(site.layer).train(there.training)
                self.put(there, put)
                there = put
            self._set(there, "weight", folded.weight)
            if folded.bias.dim():
                self._set(there, "bias", folded.bias)
        elif site.role == NORM:
            assert site.affine is not None
            folded = norm_parameters(site.module, site.affine)
            like = _tensor(there.weight)
            self._set(there, "weight", folded.weight.to(like.device, like.dtype))
            self._set(there, "bias", folded.bias.to(like.device, like.dtype))
        elif site.role == SHIFT:
            assert site.shift is not None
            like = _tensor(there.running_mean)
            shift = site.shift.to(like.device, torch.float64 if exact else like.dtype)
            self.put(there, ChannelShift(shift, tail, site.activation).train(there.training))
        elif site.role == FUSED:
            assert site.activation is not None
            self.put(there, _with_activation(there, *site.activation))
        elif site.role == ZERO:
            self.put(there, Zero().train(there.training))
        else:
            self.put(there, (tail or nn.Identity()).train(there.training))

    def put(self, there: nn.Module, new: nn.Module) -> None:
        """Replace a module under all its names."""
        for parent, key in self._places[id(there)]:
            self._children.append((parent, key, there))
            parent._modules[key] = new

    def drop_forwards(self, model: nn.Module) -> None:
        """Take off forwards on objects that say that their modules are gone: they would do nothing
        but call that of the class."""
        for module in model.modules():
            gone = getattr(module.__dict__.get("forward"), "gone", None)
            if gone is not None and gone():
                before = dict(module.__dict__)
                before["forward"].remove(module)
                taken = {k: v for k, v in before.items() if k not in module.__dict__}
                self._forwards.append((module, taken))

    def _set(self, module: nn.Module, key: str, value: Tensor) -> None:
        old = module._parameters[key]
        weight = _tensor(module.weight)
        grad = weight.requires_grad if old is None else old.requires_grad
        new = nn.Parameter(value.to(weight.device), requires_grad=grad)
        if old is not None:
            new.__dict__.update(old.__dict__)  # marks that other libraries leave on parameters
        self._parameters.append((module, key, old))
        module._parameters[key] = new


def apply(
    model: nn.Module,
    sites: Mapping[nn.Module, Site],
    names: Names,
    tails: Tails | None = None,
    *,
    exact: bool = False,
) -> Applied:
    """Make all edits; either all of them or, when one raises, none.

    Args:
        model: the model the sites were made for, or a copy of it.
        sites: what each module becomes.
        names: of the modules of the original model.
        tails: what stays of a batch norm that did more than normalize.
        exact: store the float64 parameters (for verification) instead of the rounded ones.
    """
    applied = Applied(model)
    found = [
        (model.get_submodule(names[module]), site, (tails or {}).get(module))
        for module, site in sites.items()
        if site.changed
    ]
    try:
        for there, site, tail in found:
            applied.add(there, site, copy.deepcopy(tail), exact)
        applied.drop_forwards(model)
    except BaseException:
        applied.undo()
        raise
    return applied


def _tensor(value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"expected a tensor, got {type(value).__name__}")
    return value


__all__ = ["Applied", "Folded", "apply", "tail_of"]
