"""The norm layers of networks that people run: batch norms, and below them the other norms.

A network is the tuple of its distinct layers, written out or made from the paper's own rule. The
batch norm of a projection shortcut has the shape of the block's last one and nothing after it; it
is left out, for a batch norm alone is measured on every shape anyway. The batch is not part of a
layer: networks on images are trained with 32 to 256, U-Net with 1 or 2, projection heads with 256
to 4096.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A batch norm of a network: channels and size of the plane, and what follows it.

    The plane is empty for an input ``[N, C]``.
    """

    channels: int
    plane: tuple[int, ...]
    activation: str | None = "relu"
    residual: bool = False

    def shape(self, batch: int) -> tuple[int, ...]:
        """``[N, C, ...]`` of a batch."""
        return (batch, self.channels, *self.plane)


def distinct(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Each layer once, in the order of first appearance."""
    return tuple(dict.fromkeys(layers))


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


def efficientnet_b0() -> Iterator[Layer]:
    """All 49 batch norms of EfficientNet-B0 (Tan and Le 2019, table 1), 224x224 input, in order.

    A block expands its channels, convolves them depthwise and projects them; the activation (SiLU)
    follows the first two. The sum with the block's input has no activation, and while training the
    paper's stochastic depth lies between: there it is BN alone.
    """
    stages = (  # expansion, channels, blocks, stride
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 40, 2, 2), (6, 80, 3, 2)),
        *((6, 112, 3, 1), (6, 192, 4, 2), (6, 320, 1, 1)),
    )
    before, size = 32, 112
    yield Layer(before, (size, size), "silu")
    for expansion, channels, blocks, first_stride in stages:
        for block in range(blocks):
            stride = 1 if block else first_stride
            wide = expansion * before
            if expansion > 1:
                yield Layer(wide, (size, size), "silu")
            size //= stride
            yield Layer(wide, (size, size), "silu")
            same = stride == 1 and before == channels
            yield Layer(channels, (size, size), None, residual=same)
            before = channels
    yield Layer(1280, (size, size), "silu")


def densenet121() -> Iterator[Layer]:
    """All 121 batch norms of DenseNet-121 (Huang et al. 2017, table 1), 224x224 input, in order.

    A layer of a dense block is BN-ReLU-convolution 1x1 to four times the growth rate, then
    BN-ReLU-convolution 3x3 to the growth rate, which is appended to its input. A transition halves
    the channels and the plane.
    """
    growth, blocks = 32, (6, 12, 24, 16)
    channels, size = 2 * growth, 56
    yield Layer(channels, (112, 112))
    for block, layers in enumerate(blocks):
        if block:  # the transition between two blocks
            yield Layer(channels, (size, size))
            channels, size = channels // 2, size // 2
        for _ in range(layers):
            yield Layer(channels, (size, size))
            yield Layer(4 * growth, (size, size))
            channels += growth
    yield Layer(channels, (size, size))


def unet3d() -> Iterator[Layer]:
    """All 14 batch norms of the 3-d U-Net (Cicek et al. 2016, figure 2), in order.

    The input is 128x128x128. The paper's 132x132x116 needs its unpadded convolutions; padded ones,
    which most take, need sides that three poolings halve. Each of the four levels has two
    convolutions on the way down, which double the channels before the pooling, and all but the
    lowest two on the way up.
    """
    levels = range(4)
    for level in levels:
        side = 128 >> level
        yield Layer(32 << level, (side,) * 3)
        yield Layer(64 << level, (side,) * 3)
    for level in reversed(levels[:-1]):
        for _ in range(2):
            yield Layer(64 << level, (128 >> level,) * 3)


def mobilenet_v3() -> Iterator[Layer]:
    """All 46 batch norms of MobileNetV3-Large (Howard et al. 2019, table 1), 224x224 input, in
    order.

    A block expands its channels, convolves them depthwise and projects them; the first two are
    followed by its activation, the last by none. A block of stride 1 that keeps its channels adds
    its input.
    """
    blocks = (  # expanded, channels, kind, stride
        *((16, 16, "relu", 1), (64, 24, "relu", 2), (72, 24, "relu", 1), (72, 40, "relu", 2)),
        *((120, 40, "relu", 1), (120, 40, "relu", 1), (240, 80, "hardswish", 2)),
        *((200, 80, "hardswish", 1), (184, 80, "hardswish", 1), (184, 80, "hardswish", 1)),
        *((480, 112, "hardswish", 1), (672, 112, "hardswish", 1), (672, 160, "hardswish", 2)),
        *((960, 160, "hardswish", 1), (960, 160, "hardswish", 1)),
    )
    before, size = 16, 112
    yield Layer(before, (size, size), "hardswish")
    for expanded, channels, activation, stride in blocks:
        if expanded != before:
            yield Layer(expanded, (size, size), activation)
        size //= stride
        yield Layer(expanded, (size, size), activation)
        yield Layer(channels, (size, size), None, residual=stride == 1 and channels == before)
        before = channels
    yield Layer(960, (size, size), "hardswish")


#: Inputs without planes: (N, C), and (N, C, L) from short and wide to long with few channels.
SEQUENCE: tuple[Layer, ...] = (
    # Projection heads: SimCLR (Chen et al. 2020), BYOL (Grill et al. 2020), Barlow Twins (Zbontar
    # et al. 2021).
    Layer(2048, ()),
    Layer(4096, ()),
    Layer(8192, ()),
    # PointNet (Qi et al. 2017, classification), 1024 points: shared and then plain perceptrons.
    Layer(64, (1024,)),
    Layer(128, (1024,)),
    Layer(1024, (1024,)),
    Layer(512, ()),
    Layer(256, ()),
    # QuartzNet (Kriman et al. 2019, table 1), 16 s of speech: 1600 frames, 800 after the stride.
    Layer(256, (800,)),
    Layer(256, (800,), residual=True),
    Layer(512, (800,)),
    Layer(512, (800,), residual=True),
    Layer(1024, (800,)),
    # M5 (Dai et al. 2017, table 1), 4 s of sound at 8 kHz through a stride of 4.
    Layer(128, (8000,)),
    # Few channels, long: six sensors at 65536 samples. With a batch of 20 PyTorch's statistics ran
    # at 15 GB/s on an H20 (FlagGems, pull request 5754).
    Layer(6, (65536,)),
)

#: Name -> its distinct layers.
NETWORKS: dict[str, tuple[Layer, ...]] = {
    "resnet50": RESNET50,
    "efficientnet_b0": distinct(efficientnet_b0()),
    "densenet121": distinct(densenet121()),
    "unet3d": distinct(unet3d()),
    "mobilenet_v3": distinct(mobilenet_v3()),
    "sequence": SEQUENCE,
}


@dataclass(frozen=True)
class NormLayer:
    """A group norm of so many groups over ``plane`` positions, or, with 0 groups, a layer or RMS
    norm of rows of `channels` values, ``plane`` of them a sample."""

    channels: int
    plane: tuple[int, ...]
    groups: int = 0
    activation: str | None = None
    centred: bool = True

    def shape(self, batch: int) -> tuple[int, ...]:
        """``[N, C, ...]`` of a batch, or ``[rows, C]``."""
        if self.groups:
            return (batch, self.channels, *self.plane)
        rows = batch
        for extent in self.plane:
            rows *= extent
        return (rows, self.channels)


def diffusion_unet() -> Iterator[NormLayer]:
    """All 61 group norms of the U-Net of latent diffusion (Rombach et al. 2022, as in Stable
    Diffusion 1), 64x64 latents, in order.

    320 channels, times 1, 2, 4, 4 on four levels, two residual blocks a level on the way down and
    three on the way up, whose input is joined with that of the way down. A residual block has two
    group norms with SiLU; the attention after it, on all levels but the deepest, one without.
    """
    width, multiples, side = 320, (1, 2, 4, 4), 64
    skips, before = [width], width

    def block(entering: int, leaving: int, attends: bool) -> Iterator[NormLayer]:
        plane = (side, side)
        yield NormLayer(entering, plane, 32, "silu")
        yield NormLayer(leaving, plane, 32, "silu")
        if attends:
            yield NormLayer(leaving, plane, 32)

    deepest = len(multiples) - 1
    for level, times in enumerate(multiples):
        for _ in range(2):
            yield from block(before, width * times, level < deepest)
            before = width * times
            skips.append(before)
        if level < deepest:
            skips.append(before)
            side //= 2
    yield from block(before, before, True)
    yield from block(before, before, False)
    for level in range(deepest, -1, -1):
        for _ in range(3):
            yield from block(before + skips.pop(), width * multiples[level], level < deepest)
            before = width * multiples[level]
        side *= 2 if level else 1
    yield NormLayer(before, (side, side), 32, "silu")


#: Rows of language and vision transformers; the sequence is the longest that they were trained on.
TRANSFORMER: tuple[NormLayer, ...] = (
    NormLayer(768, (512,)),  # BERT base (Devlin et al. 2018)
    NormLayer(1024, (512,)),  # BERT large
    NormLayer(768, (197,)),  # ViT-B/16 (Dosovitskiy et al. 2020): 14 x 14 patches and one token
    NormLayer(1024, (197,)),  # ViT-L/16
    NormLayer(1600, (1024,)),  # GPT-2 (Radford et al. 2019), the largest
    # LLaMA (Touvron et al. 2023), table 2: 7, 13, 33 and 65 billion parameters.
    *(NormLayer(d, (2048,), centred=False) for d in (4096, 5120, 6656, 8192)),
)

#: Name -> its distinct layers that are not batch norms.
NORM_NETWORKS: dict[str, tuple[NormLayer, ...]] = {
    "diffusion_unet": tuple(dict.fromkeys(diffusion_unet())),
    "transformer": TRANSFORMER,
}
