"""The activations a batch norm can carry: names, parameters, PyTorch's own implementations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Activation:
    """An activation as PyTorch defines it.

    Attributes:
        name: the name that modules and functions take.
        function: PyTorch's implementation, ``function(x, *args)``.
        module: PyTorch's module of the same activation, built as ``module(*args)``.
        defaults: its parameters and their default values, as in `torch.nn.functional`.
        slopes: the two values of the derivative if it has only two, ``slopes(*args)`` -> (gate
            open, shut); one bit per element then describes it.
    """

    name: str
    function: Callable[..., Tensor]
    module: Callable[..., nn.Module]
    defaults: tuple[tuple[str, float], ...] = ()
    slopes: Callable[..., tuple[float, float]] | None = None

    @property
    def two_valued(self) -> bool:
        """Whether the derivative takes only two values."""
        return self.slopes is not None


def _open_or_zero() -> tuple[float, float]:
    return 1.0, 0.0


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("relu", F.relu, nn.ReLU, slopes=_open_or_zero),
        Activation("relu6", F.relu6, nn.ReLU6, slopes=_open_or_zero),
        Activation(
            "leaky_relu",
            F.leaky_relu,
            nn.LeakyReLU,
            (("negative_slope", 0.01),),
            slopes=lambda slope: (1.0, slope),
        ),
        Activation("hardsigmoid", F.hardsigmoid, nn.Hardsigmoid, slopes=lambda: (1.0 / 6.0, 0.0)),
        Activation("hardswish", F.hardswish, nn.Hardswish),
        Activation("sigmoid", torch.sigmoid, nn.Sigmoid),
        Activation("tanh", torch.tanh, nn.Tanh),
        Activation("silu", F.silu, nn.SiLU),
        Activation("gelu", F.gelu, nn.GELU),
        Activation(
            "gelu_tanh",
            lambda x: F.gelu(x, approximate="tanh"),
            lambda: nn.GELU(approximate="tanh"),
        ),
        Activation("elu", F.elu, nn.ELU, (("alpha", 1.0),)),
        Activation("softplus", F.softplus, nn.Softplus, (("beta", 1.0), ("threshold", 20.0))),
        Activation("mish", F.mish, nn.Mish),
    )
}

PRELU = Activation("prelu", F.prelu, nn.PReLU)
"""Its parameter is a tensor, the slope: `functional.batch_norm` takes it, and `replace` passes it.
All that names an activation alone takes one of `ACTIVATIONS`."""

_NONE = (None, "none", "identity")


def resolve(
    activation: str | None, activation_args: Sequence[float] = ()
) -> tuple[Activation | None, tuple[float, ...]]:
    """Look an activation up by name and complete its parameters with their defaults.

    Args:
        activation: a key of `ACTIVATIONS`, or None, "none" or "identity" for no activation.
        activation_args: its leading parameters, in the order of `torch.nn.functional`.

    Raises:
        ValueError: the name is unknown, or the parameters are too many or not numbers.
    """
    if activation in _NONE:
        if len(activation_args):
            raise ValueError(
                "activation_args: expected none without an activation, "
                f"got {tuple(activation_args)}"
            )
        return None, ()
    found = ACTIVATIONS.get(activation) if isinstance(activation, str) else None
    if activation == PRELU.name:
        raise ValueError(
            "activation: the slope of a prelu is learned; expected one of "
            f"{', '.join(sorted(ACTIVATIONS))}, or the function "
            "tritonnorm.functional.batch_norm(..., activation='prelu', slope=...)"
        )
    if found is None:
        raise ValueError(
            f"activation: expected None or one of {', '.join(sorted(ACTIVATIONS))}; "
            f"got {activation!r}"
        )
    names = [name for name, _ in found.defaults]
    if len(activation_args) > len(names):
        raise ValueError(
            f"activation_args: {found.name} takes {len(names)} ({', '.join(names) or 'none'}), "
            f"got {tuple(activation_args)}"
        )
    try:
        given = tuple(float(a) for a in activation_args)
    except (TypeError, ValueError):
        raise ValueError(f"activation_args: expected numbers, got {activation_args!r}") from None
    return found, given + tuple(value for _, value in found.defaults[len(given) :])


_MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.ReLU: ("relu", ()),
    nn.ReLU6: ("relu6", ()),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.Hardsigmoid: ("hardsigmoid", ()),
    nn.Hardswish: ("hardswish", ()),
    nn.Sigmoid: ("sigmoid", ()),
    nn.Tanh: ("tanh", ()),
    nn.SiLU: ("silu", ()),
    nn.ELU: ("elu", ("alpha",)),
    nn.Softplus: ("softplus", ("beta", "threshold")),
    nn.Mish: ("mish", ()),
}


def of_module(module: nn.Module) -> tuple[str | None, tuple[float, ...]] | None:
    """Name and parameters of what an activation module of torch computes.

    ``(None, ())`` for `torch.nn.Identity`; None if the class is another, or a subclass.
    """
    kind = type(module)
    if kind is nn.Identity:
        return None, ()
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh", ()
    name, attributes = _MODULES.get(kind, (None, ()))
    if name is None:
        return None
    return name, tuple(float(getattr(module, a)) for a in attributes)


def resolve_learned(
    activation: str | None, activation_args: Sequence[float], slope: Tensor | None, channels: int
) -> tuple[Activation | None, tuple[float, ...]]:
    """`resolve` where a prelu is possible, too.

    Its parameter for the kernels is the distance of the slopes of neighbouring channels: 1.0, or
    0.0 if they share one.

    Args:
        activation, activation_args: as in `resolve`; "prelu" has no numbers.
        slope: of a prelu, floating-point of one or C elements; None for all other activations.
        channels: C.

    Raises:
        ValueError: as `resolve`; a slope is missing, too much, or of another kind.
    """
    if activation != PRELU.name:
        if slope is not None:
            raise ValueError(
                f"slope: expected None unless activation is 'prelu', got a {slope.dtype} tensor"
            )
        return resolve(activation, activation_args)
    if len(activation_args):
        raise ValueError(f"activation_args: expected none for prelu, got {tuple(activation_args)}")
    if not isinstance(slope, Tensor):
        raise ValueError(f"slope: expected a tensor for prelu, got {slope!r}")
    if not slope.is_floating_point():
        raise ValueError(f"slope: expected a floating-point dtype, got {slope.dtype}")
    if slope.dim() > 1 or slope.numel() not in (1, channels):
        raise ValueError(
            f"slope: expected 1 or {channels} elements in one dimension, got {tuple(slope.shape)}"
        )
    return PRELU, (float(slope.numel() == channels),)


def apply(
    activation: Activation | None, args: Sequence[float], x: Tensor, slope: Tensor | None = None
) -> Tensor:
    """The activation of `x` by PyTorch's own implementation; a slope is brought to its dtype."""
    if slope is not None:
        return F.prelu(x, slope.to(x.dtype))
    return x if activation is None else activation.function(x, *args)
