"""What is to be computed, without the data: memory view, problem, fewest bytes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

# Rows from which sums for each column, 8 bytes, are few beside the column's own bytes.
FEW_ROWS = 32

Activity = Literal["none", "two_valued", "smooth"]
#: What a batch norm is over: its tensor; the batches of several ranks, with a collective between
#: the passes; or the valid positions of padded sequences.
Form = Literal["plain", "synced", "masked"]


@dataclass(frozen=True)
class View:
    """A tensor of any rank and memory order, seen as N samples of C channels of P positions.

    All dimensions but the channels are interchangeable to a batch norm. Those outside the channels
    in memory merge into N, those inside into P; with none inside, N becomes P. So a dense tensor
    has one of two memory orders, ``[N, C, P]`` (NCHW) or ``[P, C]`` with N = 1 (channels last, and
    ``(N, C)`` input).

    Attributes:
        n, c, p: extents.
        channels_last: the dense order is ``[P, C]``.
        strides: ``(s_n, s_c, s_p)`` of the tensor in elements, or None if it is dense in that
            order.
    """

    n: int
    c: int
    p: int
    channels_last: bool
    strides: tuple[int, int, int] | None = None

    @property
    def count(self) -> int:
        """Values per channel."""
        return self.n * self.p

    @property
    def numel(self) -> int:
        return self.n * self.c * self.p

    @property
    def fast(self) -> int:
        """Extent of the contiguous axis of the dense order."""
        return self.c if self.channels_last else self.p

    @property
    def mask_bytes(self) -> int:
        """Bytes of a one-bit mask that say something: rows of the dense order, each in whole
        bytes."""
        return self.numel // self.fast * -(-self.fast // 8)

    @property
    def mask_room(self) -> int:
        """Bytes of its memory. ``[N, C, P]`` has ``[N, C]`` rows of P bits; ``[P, C]`` has a row
        for every eight channels, with a byte for each position. Rows begin at multiples of 4."""
        rows, row = self.mask_rows
        return rows * row

    @property
    def mask_rows(self) -> tuple[int, int]:
        """How many rows the memory of a mask has, and of how many bytes."""
        if self.channels_last:
            return -(-self.c // 8), -(-self.p // 4) * 4
        return self.n * self.c, -(-self.p // 32) * 4

    def mask_bits(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask as ``[N, C, P]`` of booleans."""
        rows = mask.reshape(self.mask_rows)
        places = torch.arange(8, device=mask.device)
        if self.channels_last:
            bits = rows[:, None, : self.p] >> places[:, None] & 1
            return bits.reshape(1, -1, self.p)[:, : self.c].bool()
        bits = rows[:, :, None] >> places & 1
        return bits.reshape(self.n, self.c, -1)[:, :, : self.p].bool()

    @classmethod
    def of(
        cls, sizes: Sequence[int], strides: Sequence[int], dense_strides: Sequence[int]
    ) -> View | None:
        """The view of a tensor, in the memory order of a dense tensor of the same sizes.

        Args:
            sizes: its sizes, channels second; none of them 0.
            strides: its strides in elements, any.
            dense_strides: strides of a dense tensor of these sizes: those of
                ``torch.empty_like(tensor)``.

        Returns:
            The view, or None if the tensor's own strides do not merge in that order (crop it in two
            dimensions, say); a dense copy then has one.
        """
        c = sizes[1]
        others = [d for d in range(len(sizes)) if d != 1 and sizes[d] > 1]
        others.sort(key=lambda d: -dense_strides[d])
        outer = [d for d in others if c > 1 and dense_strides[d] > dense_strides[1]]
        inner = others[len(outer) :]
        channels_last = c > 1 and not inner
        if channels_last:
            outer, inner = [], outer
        s_n, s_p = _merged_stride(outer, sizes, strides), _merged_stride(inner, sizes, strides)
        if s_n is None or s_p is None:
            return None
        n, p = _extent(outer, sizes), _extent(inner, sizes)
        dense = all(strides[d] == dense_strides[d] for d in (*others, *([1] if c > 1 else [])))
        return cls(n, c, p, channels_last, None if dense else (s_n, strides[1], s_p))


def _power_of_two_in(n: int) -> int:
    """The largest power of two, up to 16, that divides n."""
    return next(v for v in (16, 8, 4, 2, 1) if n % v == 0)


def _extent(dims: Sequence[int], sizes: Sequence[int]) -> int:
    extent = 1
    for d in dims:
        extent *= sizes[d]
    return extent


def _merged_stride(dims: Sequence[int], sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The one stride of dimensions given from outer to inner, 0 if there are none, None if they do
    not merge."""
    for upper, lower in itertools.pairwise(dims):
        if strides[upper] != sizes[lower] * strides[lower]:
            return None
    return strides[dims[-1]] if dims else 0


@dataclass(frozen=True)
class Problem:
    """One launch of a batch norm, forward or backward: everything a plan may depend on, and no
    data.

    Attributes:
        direction: "forward" or "backward".
        batch_statistics: the statistics are those of the batch (training), not given (inference).
        view: the input's memory view.
        dtype: of the input, the residual and the output.
        activity: the kind of activation: "none", "two_valued" or "smooth" derivative.
        residual: whether a residual is added before the activation.
        mask: whether a bit mask is written (forward) or read in place of the residual (backward).
        needs_dx, needs_dresidual, needs_dparams: which gradients a backward computes.
        form: what it is over; each form has its own algorithms.
    """

    direction: Literal["forward", "backward"]
    batch_statistics: bool
    view: View
    dtype: torch.dtype
    activity: Activity = "none"
    residual: bool = False
    mask: bool = False
    needs_dx: bool = True
    needs_dresidual: bool = False
    needs_dparams: bool = True
    form: Form = "plain"

    @property
    def bytes(self) -> int:
        """S: bytes of the input."""
        return self.view.numel * self.dtype.itemsize

    @property
    def vector(self) -> int:
        """The largest power of two, up to 16, that divides the contiguous extent: what vector width
        it allows."""
        return _power_of_two_in(self.view.fast)

    @property
    def plane(self) -> int:
        """Positions of a plane that `flat` merges with the channels; 1 where it merges nothing.

        With a mask what decides must be the same in forward and backward. A block of whole planes
        then has 8 of them, mostly, and what fits the registers of a program as one channel may not
        as 8; so only where accesses of a plane have less than 8 bytes.
        """
        view = self.view
        if self.form != "plain" or view.channels_last or view.strides is not None:
            return 1
        columns, few = view.c * view.p, view.n < FEW_ROWS
        access = self.vector * self.dtype.itemsize
        if self.mask and (few or columns % 8 or access >= 8):
            return 1
        sums = self.direction == "backward" and self.needs_dparams
        if sums and not self.batch_statistics and few:
            return 1
        wider = access < 16 and _power_of_two_in(columns) > self.vector
        return view.p if wider else 1

    @property
    def flat(self) -> Problem:
        """The same as rows of C * P columns, each with values of one channel.

        A plane of 7 by 7 allows single elements, a row of 512 such planes 128 bits. Only where that
        widens accesses (`plane`). A mask then packs such rows, not planes.
        """
        if self.plane == 1:
            return self
        view = self.view
        return replace(self, view=View(1, view.c * self.plane, view.n, True))

    @property
    def mask_bytes(self) -> int:
        """Bytes of a mask that say something."""
        return self.flat.view.mask_bytes

    @property
    def mask_room(self) -> int:
        """Bytes of the memory of a mask."""
        return self.flat.view.mask_room

    def mask_bits(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask as ``[N, C, P]`` of booleans."""
        view, bits = self.view, self.flat.view.mask_bits(mask)
        if self.plane == 1:
            return bits
        return bits[0].T.reshape(view.n, view.c, view.p)

    @property
    def sums(self) -> bool:
        """Whether a backward needs the sums over each channel."""
        return self.needs_dparams or (self.batch_statistics and self.needs_dx)

    @property
    def reads_residual(self) -> bool:
        """Whether the residual itself is read (a mask replaces it in backward)."""
        if self.direction == "forward":
            return self.residual
        return self.residual and self.activity != "none" and not self.mask

    @property
    def reads_input(self) -> bool:
        """Whether x is read: the gradient of an affine map of given statistics does not need it."""
        if self.direction == "forward":
            return True
        recomputes = self.activity != "none" and not self.mask
        return self.sums or recomputes

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of statistics and sums."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def __str__(self) -> str:
        view = self.view
        order = "[P, C]" if view.channels_last else "[N, C, P]"
        form = "" if self.form == "plain" else f", {self.form}"
        return f"N={view.n} C={view.c} P={view.p} in order {order}{form}"


def minimum_bytes(problem: Problem) -> int:
    """The fewest bytes a problem moves through DRAM: each tensor once; per-channel vectors are left
    out.

    In units of S, the bytes of x: forward 2 (+1 with a residual), backward 3 (dy, x, dx), one more
    for each of a written dresidual and a residual that must be read again; a mask costs S/16 for
    16-bit x.
    """
    tensors = problem.reads_input + problem.reads_residual
    if problem.direction == "forward":
        tensors += 1
    else:
        tensors += 1 + problem.needs_dx + problem.needs_dresidual
    return tensors * problem.bytes + problem.mask * problem.mask_bytes


@dataclass(frozen=True)
class FoldProblem:
    """The fold of all (layer, batch norm) pairs of a model, and its gradient: what a plan may
    depend on.

    Attributes:
        dtype: of the weights.
        affine: of gamma and beta.
        statistics: of the running statistics.
        pairs: how many there are.
        channels: of all pairs together.
        elements: of all weights together.
        rows: whether every weight has a row per channel, each at a multiple of 16 bytes.
    """

    dtype: torch.dtype
    affine: torch.dtype
    statistics: torch.dtype
    pairs: int
    channels: int
    elements: int
    rows: bool

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype that is computed in."""
        wide = torch.float64 in (self.dtype, self.affine, self.statistics)
        return torch.float64 if wide else torch.float32

    @property
    def bytes(self) -> int:
        """Bytes of the weights that fold and gradient load and store: read, write; read twice,
        write."""
        return 5 * self.elements * self.dtype.itemsize
