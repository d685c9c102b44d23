"""How the content of a value changes: an affine map per element, kept as small as it allows.

A `Change` says new = scale * old + shift. Both tensors are float64, on the CPU, and broadcast to
the shape of the value, with 1 for every axis along which they do not differ: (1, C, 1, 1) for
channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Stop(Exception):
    """A change cannot pass; the message is the reason, in words."""


@dataclass(frozen=True, eq=False)
class Change:
    """new = scale * old + shift; the same number of axes as the value."""

    scale: Tensor
    shift: Tensor

    @property
    def is_nothing(self) -> bool:
        """Whether it changes nothing."""
        return bool((self.scale == 1).all() and (self.shift == 0).all())

    @property
    def scales_only(self) -> bool:
        """Whether nothing is added."""
        return bool((self.shift == 0).all())

    def map(self, move: object) -> Change:
        """The same operation on scale and shift, then made small again."""
        return Change(compress(move(self.scale)), compress(move(self.shift)))  # type: ignore[operator]


def along(axis: int, rank: int, scale: Tensor, shift: Tensor) -> Change:
    """A change with one scale and shift per index of `axis`."""
    shape = [1] * rank
    shape[axis] = -1
    return Change(scale.reshape(shape), shift.reshape(shape))


def nothing(rank: int) -> Change:
    """The change that is none."""
    one = torch.ones((1,) * rank, dtype=torch.float64)
    return Change(one, torch.zeros_like(one))


def vector(change: Change, axis: int, size: int) -> tuple[Tensor, Tensor]:
    """Scale and shift along `axis`, each (size,).

    Raises:
        Stop: it differs along another axis.
    """
    found = []
    for tensor in (change.scale, change.shift):
        others = [n for place, n in enumerate(tensor.shape) if place != axis % tensor.dim()]
        if any(n != 1 for n in others):
            raise Stop("its channels are not the channels there")
        found.append(tensor.reshape(-1).expand(size))
    return found[0], found[1]


def compress(tensor: Tensor) -> Tensor:
    """The tensor with length 1 on every axis along which it does not change."""
    for axis, size in enumerate(tensor.shape):
        first = tensor.narrow(axis, 0, 1) if size > 1 else tensor
        if size > 1 and bool((tensor == first).all()):
            tensor = first
    return tensor


def reshape(tensor: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """What reshaping a value from `before` to `after` does to a tensor that broadcasts to it.

    The axes fall into groups of equal size before and after; a group along which the tensor does
    not change stays 1, so that nothing large is made.
    """
    full, target = [], []
    i = j = 0
    while i < len(before) or j < len(after):
        start_i, start_j = i, j
        a = b = 1
        while True:
            if a == b and (i > start_i or j > start_j) and (a != 1 or i - start_i == j - start_j):
                break
            if a <= b and i < len(before):
                a *= before[i]
                i += 1
            elif j < len(after):
                b *= after[j]
                j += 1
            elif i < len(before):
                a *= before[i]
                i += 1
            else:
                break
        varies = any(tensor.shape[k] != 1 for k in range(start_i, i))
        full += list(before[start_i:i]) if varies else [1] * (i - start_i)
        target += list(after[start_j:j]) if varies else [1] * (j - start_j)
    return tensor.expand(full).reshape(target)
