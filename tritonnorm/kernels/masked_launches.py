"""The launches of `masked`: tiles and splits by formula, and the kernels in their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from tritonnorm.device import Device
from tritonnorm.problem import View

from . import masked
from .base import EpilogueArguments, Launch, cdiv, next_power_of_2
from .streaming import COMBINE, combine_sums_kernel
from .tiling import PROGRAMS_PER_SM, TILE, TILE_FLOAT64, power_of_two_blocks

# Positions of a tile of [N, C, L] data: 1 KiB of 16-bit values. The rest of the tile is channels,
# which share one reading of the mask.
ROW = 512


@dataclass(frozen=True)
class MaskedShape:
    """What the launches depend on: the view of the input (one of the two dense orders), its dtype,
    the tile, and among how many programs the chunks of a channel block are split."""

    view: View
    dtype: torch.dtype
    block_c: int
    block_n: int
    block_p: int
    splits: int

    @classmethod
    def of(cls, view: View, dtype: torch.dtype, device: Device) -> MaskedShape:
        """Tiles of half the elements that `streaming` takes, and splits that fill the device.

        With 4096 the compile audit finds 16 spills on gfx942 (mish in float32, backward).
        """
        elements = TILE_FLOAT64 if dtype == torch.float64 else TILE // 2
        if view.channels_last:
            block_c, block_n = min(64, next_power_of_2(view.c)), 1
            block_p = min(next_power_of_2(view.p), elements // block_c)
        else:
            block_p = power_of_two_blocks(view.p, min(ROW, elements), 64)
            block_c = min(next_power_of_2(view.c), max(1, elements // block_p), 8)
            block_n = min(next_power_of_2(view.n), max(1, elements // (block_p * block_c)))
        shape = cls(view, dtype, block_c, block_n, block_p, 1)
        wanted = cdiv(device.sms * PROGRAMS_PER_SM, shape.channel_blocks)
        return shape.split(max(1, min(wanted, shape.chunks)))

    def split(self, splits: int) -> MaskedShape:
        """The same with other splits, less those that would be empty."""
        per_split = cdiv(self.chunks, splits)
        splits = cdiv(self.chunks, per_split)
        tiles = (self.block_c, self.block_n, self.block_p)
        return MaskedShape(self.view, self.dtype, *tiles, splits)

    @property
    def chunks(self) -> int:
        return cdiv(self.view.n, self.block_n) * cdiv(self.view.p, self.block_p)

    @property
    def channel_blocks(self) -> int:
        return cdiv(self.view.c, self.block_c)

    @property
    def accumulator(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def geometry(self) -> dict[str, int | bool]:
        """The compile-time arguments that describe tiles."""
        fast = self.view.fast
        return {
            "VEC": min(16, fast & -fast),
            "BLOCK_C": self.block_c,
            "BLOCK_N": self.block_n,
            "BLOCK_P": self.block_p,
            "CHANNELS_LAST": self.view.channels_last,
        }


class MaskedLaunches:
    """The kernels of one kind of call, with everything fixed but the tensors.

    Args:
        shape: view, dtype, tiles and splits.
        epilogue: the activation.
    """

    def __init__(self, shape: MaskedShape, epilogue: EpilogueArguments) -> None:
        self.shape = shape
        view = shape.view
        per_split = cdiv(shape.chunks, shape.splits)
        sizes = (view.n, view.c, view.p, per_split, shape.chunks)
        over_chunks = ((shape.channel_blocks, shape.splits), sizes, 4)
        over_channels = ((cdiv(view.c, COMBINE["BLOCK_C"]),), (view.c, shape.splits), 4)
        geometry, forward = shape.geometry, epilogue.forward()
        del forward["GATE"]
        accumulator = tl.float64 if shape.accumulator == torch.float64 else tl.float32
        self._moments = Launch(masked.masked_moments_kernel, *over_chunks, **geometry)
        self._combine = [
            Launch(masked.combine_masked_moments_kernel, *over_channels, CUMULATIVE=c, **COMBINE)
            for c in (False, True)
        ]
        self._apply = [
            Launch(
                *(masked.masked_apply_kernel, *over_chunks),
                **forward,
                FROM_VARIANCE=given,
                ACC=accumulator,
                **geometry,
            )
            for given in (False, True)
        ]
        backward = epilogue.backward()
        active = epilogue.functions is not None
        self._gradient = {
            reads: Launch(
                *(masked.masked_gradient_kernel, *over_chunks),
                **backward,
                READS_X=reads,
                **geometry,
            )
            for reads in ((True,) if active else (True, False))
        }
        self._combine_sums = Launch(combine_sums_kernel, *over_channels, PLANE=1, **COMBINE)
        self._active = active

    def training(
        self,
        x: Tensor,
        keep: Tensor,
        y: Tensor,
        statistics: tuple[Tensor, Tensor, Tensor],
        affine: tuple[Tensor | None, Tensor | None],
        running: tuple[Tensor | None, Tensor | None, Tensor | None],
        momentum: float | None,
        eps: float,
    ) -> None:
        """Write y and ``statistics`` (mean, rstd, count), and move ``running`` (mean, variance,
        counter)."""
        mean, rstd, count = statistics
        cumulative = momentum is None and running[2] is not None
        if cumulative and running[2] is not None:
            running[2].add_(keep.sum() > 1)  # before the kernels that read it; without a host wait
        partial = mean.new_empty((3, self.shape.splits, self.shape.view.c))
        self._moments(x, keep, partial)
        self._combine[cumulative](
            partial, mean, rstd, count, *running, eps, 0.0 if momentum is None else momentum
        )
        self._apply[False](x, keep, y, mean, rstd, *affine, None, None, eps)

    def inference(
        self,
        x: Tensor,
        keep: Tensor,
        y: Tensor,
        saved: tuple[Tensor | None, Tensor | None],
        affine: tuple[Tensor | None, Tensor | None],
        running: tuple[Tensor, Tensor],
        eps: float,
    ) -> None:
        """Write y from given statistics, and those to ``saved`` (mean, rstd) for backward."""
        self._apply[True](x, keep, y, *running, *affine, *saved, eps)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        keep: Tensor,
        statistics: tuple[Tensor, Tensor, Tensor | None],
        affine: tuple[Tensor | None, Tensor | None],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Write ``gradients`` (dx, dweight, dbias; None is not computed). Without a count the
        statistics were given."""
        mean, rstd, count = statistics
        dx, dweight, dbias = gradients
        parameters = dweight is not None or dbias is not None
        vectors = (mean, rstd, *affine)
        sums = parameters or (count is not None and dx is not None)
        corrects = count is not None and dx is not None
        reads = sums or self._active
        partial = whole = None
        if sums:
            partial = rstd.new_empty((2, self.shape.splits, self.shape.view.c))
            early = None if corrects else dx  # of given statistics all gradients are one pass
            self._gradient[reads](dy, x, keep, early, *vectors, partial, None, None)
            whole = rstd.new_empty((2, self.shape.view.c)) if corrects else None
            self._combine_sums(partial, rstd, whole, dweight, dbias, None)
        if dx is not None and (corrects or not sums):
            self._gradient[reads](dy, x, keep, dx, *vectors, None, whole, count)


@lru_cache(maxsize=4096)
def launches(
    view: View, dtype: torch.dtype, device: Device, activation: str, args: tuple[float, ...]
) -> MaskedLaunches:
    """The launches of a kind of call, made once."""
    shape = MaskedShape.of(view, dtype, device)
    return MaskedLaunches(shape, EpilogueArguments.named(activation, args))
