"""DenseNet-121 (Huang et al. 2017) in plain PyTorch: transformers has none.

Its batch norms stand before their convolutions and share inputs, so they fold ahead or not at all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DenseNet"]

GROWTH = 32
BLOCKS = (6, 12, 24, 16)  # dense layers per block of DenseNet-121


class DenseLayer(nn.Module):
    """BN-ReLU-conv 1x1 to four times the growth, BN-ReLU-conv 3x3, joined to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * GROWTH, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * GROWTH)
        self.conv2 = nn.Conv2d(4 * GROWTH, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(new)))], 1)


class Transition(nn.Module):
    """BN-ReLU-conv 1x1 to half the channels, then an average over 2x2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)


class DenseNet(nn.Module):
    """The network for images ``[N, 3, H, W]``; logits ``[N, labels]``."""

    def __init__(self, labels: int = 10) -> None:
        super().__init__()
        channels = 2 * GROWTH
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        blocks: list[nn.Module] = []
        for i, layers in enumerate(BLOCKS):
            if i:
                blocks.append(Transition(channels))
                channels //= 2
            for _ in range(layers):
                blocks.append(DenseLayer(channels))
                channels += GROWTH
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, labels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits
