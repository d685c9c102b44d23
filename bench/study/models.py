"""The networks of the study. Their batch norms are this library's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tritonnorm

__all__ = ["NORMS", "cnn", "lstm", "mlp", "transformer"]

#: The kinds of normalization that are compared.
NORMS = ("batch", "group", "layer", "none")


def norm_class(name: str) -> Any:
    """The class of this library, or torch's of the same name where there is none yet."""
    return getattr(tritonnorm, name, None) or getattr(nn, name)


def mlp(
    features: int, classes: int, norm: str, *, width: int = 100, layers: int = 3
) -> nn.Sequential:
    """Linear, batch norm or none, sigmoid; three times; a classifier.

    The network of Ioffe and Szegedy (2015), section 4.1. The sigmoid is a module of its own, so
    that what enters it can be watched.
    """
    parts: list[nn.Module] = [nn.Flatten()]
    for _ in range(layers):
        parts.append(nn.Linear(features, width))
        if norm == "batch":
            parts.append(tritonnorm.BatchNorm1d(width))
        parts.append(nn.Sigmoid())
        features = width
    return nn.Sequential(*parts, nn.Linear(features, classes))


def cnn(channels: int, classes: int, norm: str, *, width: int = 16) -> nn.Sequential:
    """Three 3x3 convolutions with ReLU, the last two with stride 2; global mean; a classifier.

    "layer" normalizes all channels and pixels of an image together (one group), "group" four
    channels at a time.
    """
    parts: list[nn.Module] = []
    for out, stride in ((width, 1), (2 * width, 2), (2 * width, 2)):
        parts.append(nn.Conv2d(channels, out, 3, stride, padding=1, bias=norm == "none"))
        if norm == "batch":
            parts.append(tritonnorm.BatchNorm2d(out, activation="relu"))
        else:
            if norm != "none":
                groups = 1 if norm == "layer" else out // 4
                parts.append(norm_class("GroupNorm")(groups, out))
            parts.append(nn.ReLU())
        channels = out
    return nn.Sequential(
        *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


class _LayerNormLSTM(nn.Module):
    """An LSTM with layer norm of its gates and cell (Ba, Kiros and Hinton, 2016), or with none."""

    def __init__(self, features: int, hidden: int, normalized: bool) -> None:
        super().__init__()

        def norm(width: int) -> nn.Module:
            return norm_class("LayerNorm")(width) if normalized else nn.Identity()

        self.hidden = hidden
        self.input = nn.Linear(features, 4 * hidden)
        self.recurrent = nn.Linear(hidden, 4 * hidden, bias=False)
        nn.init.orthogonal_(self.input.weight)
        for block in self.recurrent.weight.detach().chunk(4):
            nn.init.orthogonal_(block)
        nn.init.zeros_(self.input.bias)
        nn.init.ones_(self.input.bias[:hidden].detach())
        self.norm_input, self.norm_recurrent = norm(4 * hidden), norm(4 * hidden)
        self.norm_cell = norm(hidden)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], self.hidden)
        for t in range(x.shape[1]):
            gates = self.norm_input(self.input(x[:, t])) + self.norm_recurrent(self.recurrent(h))
            forget, write, read, new = gates.chunk(4, 1)
            next_c = forget.sigmoid() * c + write.sigmoid() * new.tanh()
            next_h = read.sigmoid() * self.norm_cell(next_c).tanh()
            going = (t < lengths)[:, None]
            h, c = torch.where(going, next_h, h), torch.where(going, next_c, c)
        return h


class _LSTMClassifier(nn.Module):
    def __init__(self, features: int, classes: int, norm: str, hidden: int, steps: int) -> None:
        super().__init__()
        self.batch = norm == "batch"
        self.lstm: nn.Module = (
            tritonnorm.BatchNormLSTM(features, hidden, steps, batch_first=True)
            if self.batch
            else _LayerNormLSTM(features, hidden, normalized=norm == "layer")
        )
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        found = self.lstm(x, lengths)
        return self.classifier(found[1][0] if self.batch else found)


def lstm(features: int, classes: int, norm: str, *, hidden: int = 32, steps: int = 16) -> nn.Module:
    """An LSTM whose last state of each sequence is classified. All start from the same kind of
    weights: orthogonal, with 1 for the bias of the forget gate."""
    return _LSTMClassifier(features, classes, norm, hidden, steps)


class _Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and with a shortcut."""

    def __init__(self, width: int, heads: int, norm: str) -> None:
        super().__init__()
        self.batch = norm == "batch"

        def made() -> nn.Module:
            if self.batch:
                return tritonnorm.MaskedBatchNorm1d(width, layout="NLC")
            return norm_class("LayerNorm")(width) if norm == "layer" else nn.Identity()

        self.first, self.second = made(), made()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.layers = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        mask = (keep,) if self.batch else ()
        y = self.first(x, *mask)
        x = x + self.attention(y, y, y, key_padding_mask=~keep, need_weights=False)[0]
        return x + self.layers(self.second(x, *mask))


class _Transformer(nn.Module):
    def __init__(
        self, features: int, classes: int, norm: str, width: int, blocks: int, steps: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.place = nn.Parameter(0.02 * torch.randn(steps, width))
        self.blocks = nn.ModuleList(_Block(width, 4, norm) for _ in range(blocks))
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        keep = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        x = self.embed(x) + self.place
        for block in self.blocks:
            x = block(x, keep)
        pooled = torch.where(keep[:, :, None], x, 0.0).sum(1) / lengths[:, None]
        return self.classifier(pooled)


def transformer(
    features: int, classes: int, norm: str, *, width: int = 32, blocks: int = 3, steps: int = 16
) -> nn.Module:
    """Pre-norm blocks over the patches of an image; the mean of the valid ones is classified."""
    return _Transformer(features, classes, norm, width, blocks, steps)
