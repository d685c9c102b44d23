"""The batch norm layers of networks that people run, and small twins for the interpreter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A batch norm of a network: channels and size of the plane, and what follows it."""

    channels: int
    plane: tuple[int, ...]
    activation: str | None = "relu"
    residual: bool = False

    def shape(self, batch: int) -> tuple[int, ...]:
        """``[N, C, ...]`` of a batch."""
        return (batch, self.channels, *self.plane)


#: Every distinct one of ResNet-50 (He et al. 2015, table 1, stride in the 3x3 convolution), 224x224
#: input.
RESNET50: tuple[Layer, ...] = (
    Layer(64, (112, 112)),
    Layer(64, (56, 56)),
    Layer(256, (56, 56), residual=True),
    Layer(128, (56, 56)),
    Layer(128, (28, 28)),
    Layer(512, (28, 28), residual=True),
    Layer(256, (28, 28)),
    Layer(256, (14, 14)),
    Layer(1024, (14, 14), residual=True),
    Layer(512, (14, 14)),
    Layer(512, (7, 7)),
    Layer(2048, (7, 7), residual=True),
)


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
