"""The layers of networks, and small twins of them for the interpreter."""

from __future__ import annotations

from tritonnorm.tune.networks import (
    NETWORKS,
    RESNET50,
    SEQUENCE,
    Layer,
    densenet121,
    distinct,
    efficientnet_b0,
    mobilenet_v3,
    unet3d,
)

__all__ = [
    "NETWORKS",
    "RESNET50",
    "SEQUENCE",
    "Layer",
    "densenet121",
    "distinct",
    "efficientnet_b0",
    "mobilenet_v3",
    "twin",
    "unet3d",
]


def twin(shape: tuple[int, ...], batch: int = 3, largest: int = 28) -> tuple[int, ...]:
    """A small shape that is tiled as the large one is: odd batch, few channels, smaller planes.

    Channels keep their remainder by 16, and planes stay what they are up to ``largest`` and are
    halved above it, so that the vector width that divides the contiguous axis stays the same in
    both layouts.
    """
    n, c, *plane = shape
    small = []
    for extent in plane:
        while extent > largest and extent % 2 == 0:
            extent //= 2
        small.append(extent)
    return (min(n, batch), c if c <= 32 else 16 + c % 16, *small)
