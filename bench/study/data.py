"""The images of the study: scikit-learn's handwritten digits, or a folder of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["SUFFIXES", "Images", "Parts", "Sequences", "digits", "folder", "sequences"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
TEST, VALIDATION = 0.3, 0.15  # shares of the images; the rest trains


@dataclass(frozen=True)
class Parts:
    """One split: images and labels for training, for choosing a learning rate, and for testing."""

    x: Tensor
    y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def first(self, count: int) -> Parts:
        """The same with fewer training images."""
        rest = (self.validation_x, self.validation_y, self.test_x, self.test_y)
        return Parts(self.x[:count], self.y[:count], *rest)


@dataclass(frozen=True)
class Images:
    """All images.

    Attributes:
        name: what they are, for titles.
        x: float32 ``[count, channels, height, width]`` from 0 to 1.
        y: int64 ``[count]``.
        classes: names of the labels.
        target: the accuracy whose first reach counts as converged.
    """

    name: str
    x: Tensor
    y: Tensor
    classes: tuple[str, ...]
    target: float

    def split(self, seed: int) -> Parts:
        """Shuffled by the seed, every class with the same shares in each part."""
        g = torch.Generator().manual_seed(seed)
        parts: tuple[list[Tensor], ...] = ([], [], [])
        for label in range(len(self.classes)):
            at = (self.y == label).nonzero()[:, 0]
            at = at[torch.randperm(len(at), generator=g)]
            test, validation = (max(1, round(share * len(at))) for share in (TEST, VALIDATION))
            cuts = at.tensor_split([test, test + validation])
            for part, own in zip(parts, cuts, strict=True):
                part.append(own)
        test_at, validation_at, train_at = (torch.cat(part) for part in parts)
        train_at = train_at[torch.randperm(len(train_at), generator=g)]
        return Parts(
            *(t for at in (train_at, validation_at, test_at) for t in (self.x[at], self.y[at]))
        )


def digits() -> Images:
    """The 1797 handwritten digits of 8x8 pixels (Alpaydin and Kaynak, UCI ML repository)."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    pixels = torch.as_tensor(x / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    names = tuple(map(str, range(10)))
    return Images("handwritten digits", pixels, torch.as_tensor(y, dtype=torch.int64), names, 0.95)


def folder(path: Path, size: int = 16, most: int = 1000) -> Images:
    """Images in one folder per class, as ``cats/1.jpg``; scaled to a square, RGB.

    Args:
        path: the folder of folders.
        size: height and width in pixels.
        most: images taken of a class, the first by name.

    Raises:
        ValueError: fewer than two classes, or one with fewer than ten images.
    """
    import numpy as np
    from PIL import Image

    if not path.is_dir():
        raise ValueError(f"--data: expected a folder, got {path}")
    found = {
        f.name: sorted(p for p in f.rglob("*") if p.suffix.lower() in SUFFIXES)[:most]
        for f in sorted(path.iterdir())
        if f.is_dir()
    }
    found = {name: files for name, files in found.items() if files}
    if len(found) < 2:
        raise ValueError(f"--data: expected a folder per class, two or more, got {list(found)}")
    pixels, labels = [], []
    for label, (name, files) in enumerate(found.items()):
        if len(files) < 10:
            raise ValueError(f"--data: expected at least 10 images of {name}, got {len(files)}")
        for file in files:
            with Image.open(file) as image:
                small = image.convert("RGB").resize((size, size))
            pixels.append(torch.from_numpy(np.array(small)).permute(2, 0, 1))
            labels.append(label)
    x = torch.stack(pixels).float() / 255.0
    # Two classes: half of the way from chance to certain.
    target = (1.0 + 1.0 / len(found)) / 2
    return Images(" and ".join(found), x, torch.tensor(labels), tuple(found), target)


@dataclass(frozen=True)
class Sequences:
    """Images read patch by patch: ``x [count, 16, features]`` and their ``lengths [count]``."""

    x: Tensor
    lengths: Tensor


GRID = 4  # patches in a row and in a column


def sequences(x: Tensor) -> Sequences:
    """16 patches in reading order, without those that are blank; zeros pad the end.

    A patch is its pixels, and its row and column from -1 to 1. It is blank if all of its pixels are
    0, as beside a digit: 7 to 16 are left of a digit. Photographs have none to leave out.
    """
    high, wide = (side // GRID for side in x.shape[2:])
    patches = x[:, :, : GRID * high, : GRID * wide].unfold(2, high, high).unfold(3, wide, wide)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    place = torch.linspace(-1.0, 1.0, GRID, device=x.device)
    places = torch.cartesian_prod(place, place).expand(len(x), -1, -1)
    ink = patches.any(2)
    lengths = ink.sum(1).clamp(min=1)
    at = (~ink).int().argsort(dim=1, stable=True)[:, :, None]  # those with ink first, in order
    whole = torch.cat([patches, places], 2)
    moved = whole.gather(1, at.expand_as(whole))
    keep = torch.arange(GRID**2, device=x.device) < lengths[:, None]
    return Sequences(torch.where(keep[:, :, None], moved, 0.0), lengths)
