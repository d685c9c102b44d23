"""What each layer and batch norm has become after the folds planned so far."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tritonnorm.fold import algebra, inspect
from tritonnorm.fold.algebra import Folded, FoldRefused, ScaleShift
from tritonnorm.fold.change import Stop
from tritonnorm.fold.inspect import TRANSPOSED

LAYER, NORM, IDENTITY = "layer", "norm", "identity"
SHIFT, ZERO, FUSED = "shift", "zero", "fused"


@dataclass(frozen=True, eq=False)
class Site:
    """A layer or batch norm of the model and what will be in its place.

    Attributes:
        module: what is there now.
        role: `LAYER`, `NORM`, `IDENTITY`, `SHIFT` (adds `shift`), `ZERO`, or `FUSED` (a batch norm
            with an activation).
        layer: for a layer, the module whose stride, padding and so on it has.
        exact: for a layer, its weight and bias in float64; bias of shape () for none.
        stored: the same, rounded to the dtype of the layer; None when unchanged.
        affine: for a batch norm, its scale and shift, (C,), float64.
        shift: what a `SHIFT` adds, (C,), float64.
        activation: name and parameters of the activation that a `SHIFT` or `FUSED` runs, too.
        changed: whether the module has to be edited.
    """

    module: nn.Module
    role: str
    layer: nn.Module | None = None
    exact: Folded | None = None
    stored: Folded | None = None
    affine: ScaleShift | None = None
    shift: Tensor | None = None
    activation: tuple[str, tuple[float, ...]] | None = None
    changed: bool = False

    @property
    def weight(self) -> Tensor:
        """The float64 weight of a layer."""
        assert self.exact is not None
        return self.exact.weight

    def becomes(self, role: str, shift: Tensor | None = None) -> Site:
        """The same module in another role."""
        return replace(self, role=role, shift=shift, layer=None, exact=None, changed=True)

    def with_parameters(self, exact: Folded, layer: nn.Module | None = None) -> Site:
        """A layer with other parameters.

        Raises:
            FoldRefused: they do not fit the dtype of the layer.
        """
        layer = layer or self.layer
        assert layer is not None
        like = layer.weight
        assert isinstance(like, Tensor)
        groups = layer.groups if isinstance(layer, TRANSPOSED) else None
        peak = algebra.channel_maximum(exact.weight, groups)
        stored = algebra.cast(exact, like, peak)
        return replace(
            self, role=LAYER, layer=layer, exact=exact, stored=stored, affine=None, changed=True
        )


def site_of(module: nn.Module, affine: ScaleShift | None = None) -> Site:
    """The site of a module as it is.

    Raises:
        FoldRefused: the numbers of a batch norm do not allow a fold.
    """
    if inspect.is_layer(module):
        weight, bias = module.weight, module._parameters.get("bias")
        assert isinstance(weight, Tensor)
        if bias is None:
            bias = nn.Parameter(torch.zeros(()))
        exact = Folded(weight.detach().double().cpu(), bias.detach().double().cpu())
        return Site(module, LAYER, layer=module, exact=exact)
    if affine is None:
        affine = affine_of(module)
    return Site(module, NORM, affine=affine)


def affine_of(bn: nn.Module) -> ScaleShift:
    """Scale and shift of a batch norm in eval mode.

    Raises:
        FoldRefused: a statistic or parameter is not usable.
    """

    def cpu(name: str) -> Tensor | None:
        value = getattr(bn, name)
        return value.detach().double().cpu() if isinstance(value, Tensor) else None

    mean, var = cpu("running_mean"), cpu("running_var")
    assert mean is not None and var is not None
    return algebra.scale_shift(mean, var, bn.eps, cpu("weight"), cpu("bias"))  # type: ignore[arg-type]


def after_layer(site: Site, affine: ScaleShift) -> Site:
    """The layer followed by the scale and shift."""
    exact, layer = site.exact, site.layer
    assert exact is not None and layer is not None
    bias = exact.bias if exact.bias.dim() else None
    if isinstance(layer, TRANSPOSED):
        groups: int = layer.groups
        return site.with_parameters(algebra.fold_conv_transpose(exact.weight, bias, groups, affine))
    return site.with_parameters(algebra.fold_conv(exact.weight, bias, affine))


def before_layer(site: Site, affine: ScaleShift) -> Site:
    """The layer preceded by the scale and shift.

    Raises:
        Stop: the shift does not become a bias, because of padding.
    """
    exact, layer = site.exact, site.layer
    assert exact is not None and layer is not None
    bias = exact.bias if exact.bias.dim() else None
    shifts = bool((affine.shift != 0).any())
    if isinstance(layer, TRANSPOSED):
        if shifts:
            raise Stop("the shift is no constant after a transposed convolution")
        return site.with_parameters(algebra.fold_before_conv_transpose(exact.weight, bias, affine))
    if shifts and pads_with_zeros(layer):
        raise Stop("the shift does not pass through zero padding")
    groups = getattr(layer, "groups", 1)
    folded = algebra.fold_before_conv(exact.weight, bias, groups, affine)
    if bias is None and not shifts:
        folded = Folded(folded.weight, exact.bias)
    return site.with_parameters(folded)


def pads_with_zeros(layer: nn.Module) -> bool:
    """Whether zeros take the place of inputs at the borders."""
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
        return False
    if layer.padding == "valid":
        return False
    if layer.padding == "same":
        return any(size != 1 for size in layer.kernel_size)  # type: ignore[union-attr]
    return any(layer.padding)  # type: ignore[arg-type]


def after_norm(site: Site, affine: ScaleShift) -> Site:
    """The batch norm followed by another scale and shift."""
    own = _own(site)
    scale = own.scale * affine.scale
    shift = own.shift * affine.scale + affine.shift
    return _norm(site, ScaleShift(scale, shift))


def before_norm(site: Site, affine: ScaleShift) -> Site:
    """The batch norm preceded by another scale and shift."""
    own = _own(site)
    return _norm(site, ScaleShift(own.scale * affine.scale, own.scale * affine.shift + own.shift))


def _own(site: Site) -> ScaleShift:
    bn = site.module
    assert site.affine is not None
    if not inspect.is_plain_norm(bn) or bn.weight is None or bn.bias is None:
        raise Stop("the next batch norm has no weight and bias to take it")
    return site.affine


def _norm(site: Site, affine: ScaleShift) -> Site:
    stored = norm_parameters(site.module, affine)
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    info = torch.finfo(weight.dtype)
    if bool((stored.weight.abs() > info.max).any() or (stored.bias.abs() > info.max).any()):
        raise FoldRefused("the weight of the next batch norm overflows")
    return replace(site, affine=affine, changed=True)


def norm_parameters(bn: nn.Module, affine: ScaleShift) -> Folded:
    """The weight and bias with which a batch norm has this scale and shift."""
    assert isinstance(bn.running_mean, Tensor) and isinstance(bn.running_var, Tensor)
    mean, var = bn.running_mean.double().cpu(), bn.running_var.double().cpu()
    weight = affine.scale * torch.sqrt(var + bn.eps)  # type: ignore[operator]
    return Folded(weight, affine.shift + mean * affine.scale)


def channel_axis(site: Site) -> int:
    """The axis of the channels at the input and output of a layer, from the end."""
    assert site.layer is not None
    return -1 if isinstance(site.layer, nn.Linear) else -(site.weight.dim() - 1)
