"""What a group, layer, instance or RMS norm computes, without the data: the sibling of `problem`.

All four normalize groups. A tensor ``[N, C, P]`` has G groups of C / G channels; the values of a
group in one sample share a mean and a variance. Layer and RMS norm over the last D values are
``[rows, D]`` with one group, instance norm has G = C.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tritonnorm.problem import Activity, View

#: What shares a statistic within one sample: the channels of a position (layer norm), a group of
#: channels over all positions, or one channel over all positions (instance norm).
Per = Literal["position", "group", "channel"]


def group_view(
    sizes: Sequence[int], strides: Sequence[int], dense_strides: Sequence[int], groups: int
) -> View | None:
    """The view ``[N, C, P]`` or ``[N, P, C]`` of a tensor; samples stay apart from positions.

    A tensor with one position a sample and one group is rows: its samples become the positions of a
    single sample, ``[P, C]``.

    Args:
        sizes: its sizes, samples first and channels second; none of them 0.
        strides: its strides in elements, any.
        dense_strides: those of a dense tensor in one of the two orders (`canonical`).
        groups: G.

    Returns:
        The view, or None if the tensor's own strides do not merge in that order.
    """
    n, c, p = sizes[0], sizes[1], math.prod(sizes[2:])
    dense = _same(sizes, strides, dense_strides)
    if p == 1:
        if strides[1] != 1 and c > 1:
            return None
        own = (0, 1, strides[0]) if groups == 1 else (strides[0], 1, 0)
        shape = (1, c, n) if groups == 1 else (n, c, 1)
        return View(*shape, True, None if dense else own)
    inner = [d for d in range(2, len(sizes)) if sizes[d] > 1]
    for upper, lower in itertools.pairwise(inner):
        if strides[upper] != sizes[lower] * strides[lower]:
            return None
    channels_last = c > 1 and dense_strides[inner[-1]] != 1
    own = (strides[0], strides[1], strides[inner[-1]])
    return View(n, c, p, channels_last, None if dense else own)


def canonical(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the strides are those of a dense ``[N, C, P]`` or ``[N, P, C]``."""
    return any(_same(sizes, strides, order) for order in (contiguous(sizes), channels_last(sizes)))


def contiguous(sizes: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor, the last dimension innermost."""
    return tuple(math.prod(sizes[d + 1 :]) for d in range(len(sizes)))


def channels_last(sizes: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor whose dimension 1 is innermost."""
    n, c, *rest = contiguous((sizes[0], *sizes[2:], sizes[1]))
    return (n, rest[-1] if rest else c, c, *rest[:-1]) if rest else (n, c)


def _same(sizes: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether strides agree where they matter."""
    return all(n <= 1 or s == t for n, s, t in zip(sizes, a, b, strict=True))


@dataclass(frozen=True)
class GroupProblem:
    """One launch of a group norm, forward or backward: everything a plan may depend on.

    Attributes:
        direction: "forward" or "backward".
        view: the input's memory view (`group_view`).
        groups: G, a divisor of the channels.
        rows: the view holds rows: statistics are per position.
        centred: the mean is subtracted; RMS norm does not.
        dtype: of the input, the residual and the output.
        activity: the kind of activation: "none", "two_valued" or "smooth" derivative.
        residual: whether a residual is added before the activation.
        needs_dx, needs_dresidual, needs_dparams: which gradients a backward computes. Without an
            activation dresidual is dy, and no kernel writes it.
    """

    direction: Literal["forward", "backward"]
    view: View
    groups: int
    rows: bool
    centred: bool
    dtype: torch.dtype
    activity: Activity = "none"
    residual: bool = False
    needs_dx: bool = True
    needs_dresidual: bool = False
    needs_dparams: bool = True

    @property
    def per(self) -> Per:
        """What shares a statistic."""
        if self.rows:
            return "position"
        return "channel" if self.groups == self.view.c else "group"

    @property
    def channels(self) -> int:
        """K: channels of a group."""
        return self.view.c // self.groups

    @property
    def statistics(self) -> int:
        """How many groups are normalized in all: values of the saved mean."""
        return self.view.p if self.rows else self.view.n * self.groups

    @property
    def bytes(self) -> int:
        """S: bytes of the input."""
        return self.view.numel * self.dtype.itemsize

    @property
    def vector(self) -> int:
        """The largest power of two, up to 16, that divides the contiguous extent."""
        return min(16, self.view.fast & -self.view.fast)

    @property
    def strip(self) -> int:
        """The same for the contiguous extent within one group."""
        per_group = self.per == "group" and self.view.channels_last
        extent = self.channels if per_group else self.view.fast
        return min(16, extent & -extent)

    @property
    def reads_residual(self) -> bool:
        """Whether the residual is read: backward only recomputes an activation from it."""
        return self.residual and (self.direction == "forward" or self.activity != "none")

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of statistics and sums."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def __str__(self) -> str:
        view = self.view
        order = "[N, P, C]" if view.channels_last else "[N, C, P]"
        kind = "" if self.centred else ", not centred"
        return f"N={view.n} C={view.c} P={view.p} in order {order}, {self.groups} groups{kind}"


def described(
    direction: Literal["forward", "backward"],
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    groups: int,
    centred: bool,
    activity: Activity,
    residual: bool,
    needs: tuple[bool, ...] = (True, False, True, True),
) -> tuple[GroupProblem, tuple[int, ...], bool, bool]:
    """The problem of a call; strides of a dense twin of the input in one of the two orders; whether
    the input is copied to it; whether a tensor like the input is in neither order.

    ``needs``: dinput, dresidual, dweight, dbias.
    """
    dense = torch.empty_like(torch.empty_strided(sizes, strides, device="meta")).stride()
    reorders = not canonical(sizes, dense)
    if reorders:
        dense = contiguous(sizes)
    view = group_view(sizes, strides, dense, groups)
    copies = view is None
    if view is None:
        view = group_view(sizes, dense, dense, groups)
        assert view is not None  # dense
    problem = GroupProblem(
        *(direction, view, groups),
        rows=groups == 1 and math.prod(sizes[2:]) == 1,
        centred=centred,
        dtype=dtype,
        activity=activity,
        residual=residual,
        needs_dx=needs[0],
        needs_dresidual=needs[1],
        needs_dparams=needs[2] or needs[3],
    )
    return problem, dense, copies, reorders


def minimum_group_bytes(problem: GroupProblem) -> int:
    """The fewest bytes a problem moves through DRAM: each tensor once; vectors are left out.

    In units of S: forward 2 (+1 with a residual), backward 3 (dy, x, dx), one more for each of a
    written dresidual and a residual that must be read again.
    """
    tensors = 2 + problem.reads_residual
    if problem.direction == "backward":
        tensors += problem.needs_dx + problem.needs_dresidual
    return tensors * problem.bytes
