"""What the norms of this library add to those of torch: an activation, by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .activation import resolve


class Activated(torch.nn.Module):
    """Mixed in before torch's class of a norm.

    Attributes:
        activation: name of an activation of `tritonnorm.activation.ACTIVATIONS`, or None.
        activation_args: its parameters, as they were given.
    """

    activation: str | None = None
    activation_args: tuple[float, ...] = ()

    def activation_repr(self) -> str:
        """What the description of the module ends with; empty without an activation."""
        text = ""
        if self.activation is not None:
            text += f", activation={self.activation}"
        if self.activation_args:
            text += f", activation_args={self.activation_args}"
        return text

    def extra_repr(self) -> str:
        """The original's description, and the activation if there is one."""
        return super().extra_repr() + self.activation_repr()


def named(
    activation: str | None, activation_args: Sequence[float]
) -> tuple[str | None, tuple[float, ...]]:
    """The two attributes of `Activated`.

    Raises:
        ValueError: the activation is unknown or its parameters are too many or not numbers.
    """
    found, _ = resolve(activation, activation_args)
    return None if found is None else found.name, tuple(float(a) for a in activation_args)


def torch_class(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The class of `torch.nn` that a class is, or is derived from: the nearest public one.

    It is found by its name, wherever mixins stand. Without another it is `torch.nn.Module`.
    """
    return next(c for c in kind.__mro__ if getattr(torch.nn, c.__name__, None) is c)
