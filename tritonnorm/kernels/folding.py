"""The fold of all (layer, batch norm) pairs of a model in one launch, and its gradient in another.

``w' = s * w`` and ``b' = s * (b - mean) + beta`` with ``s = gamma / sqrt(var + eps)``. A table on
the device says for each pair where its tensors lie. Each program takes a block of channels of one
pair and walks the whole rows of their weight, so a sum over a row needs no second program: it has
one order. `docs/folding.md` derives the gradients.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritonnorm.folding import Source

from . import _moments as moments
from .base import Config, Launch, cdiv
from .lasting import lasting

# Columns of the table. The first six are addresses, 0 for a tensor that is None.
COLUMNS = ("w", "bias", "mean", "var", "gamma", "beta", "w_at", "b_at", "c_at", "c", "j", "i", "k")
WIDTH = 16  # a row of the table: the columns, then kind, first program, bits of eps
# What the formula takes: 1024 elements for 4 warps are 8 a thread, two 16-byte loads of float32.
USUAL = Config(16, 1, 64)
ALIGN = 16  # elements between the starts of results in their buffer: 16 bytes in every dtype


@dataclass(frozen=True)
class Batch:
    """Pairs that one launch folds: the same dtypes on one device.

    Attributes:
        table: ``[pairs, WIDTH]`` int64.
        work: ``[programs]`` int32, the pair of each program.
        places: where w', b' and the channels of each pair start, in elements of their buffers.
        weights: elements of a buffer that holds all w' and b'.
        channels: elements of a buffer that holds one vector of each pair.
        dtypes: of the weights, of gamma and beta, of the statistics.
        config: tiles (`tiles_of`) and warps.
        launches: forward and backward, once they were asked for.
    """

    table: Tensor
    work: Tensor
    places: tuple[tuple[int, int, int], ...]
    weights: int
    channels: int
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    config: Config = USUAL
    launches: dict[bool, Launch] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, sources: Sequence[Source], config: Config = USUAL) -> Batch:
        """The table for pairs whose tensors `layout` accepts, on the device of the first."""
        tiles = tiles_of(config)
        places, weights, channels = arrange(sources)
        rows: list[list[int]] = []
        work: list[int] = []
        for n, s in enumerate(sources):
            shape = layout(s)
            assert shape is not None
            i, j, k = shape
            c = s.mean.numel()
            addresses = [0 if t is None else t.data_ptr() for t in s.tensors]
            kind = tile_kind(s.weight, shape, tiles)
            (eps,) = struct.unpack("q", struct.pack("d", s.eps))
            rows.append([*addresses, *places[n], c, j, i, k, kind, len(work), eps])
            work += [n] * cdiv(c, tiles[kind][0])
        first = sources[0]
        device = first.weight.device

        def tables() -> tuple[Tensor, Tensor]:
            table = torch.tensor(rows, dtype=torch.int64).to(device)
            return table, torch.tensor(work, dtype=torch.int32).to(device)

        return cls(
            *lasting(device, tables), places, weights, channels,
            (first.weight.dtype, affine_dtype(sources), first.mean.dtype), config,
        )  # fmt: skip

    def launch(self, backward: bool) -> Launch:
        """`fold_kernel` or `fold_gradient_kernel` over all programs; made once for many steps."""
        if backward in self.launches:
            return self.launches[backward]
        wide = torch.float64 in self.dtypes
        kernel = fold_gradient_kernel if backward else fold_kernel
        made = self.launches[backward] = Launch(
            kernel, (self.work.numel(),), (self.channels,) if backward else (),
            self.config.num_warps,
            W=_TYPES[self.dtypes[0]], G=_TYPES[self.dtypes[1]], S=_TYPES[self.dtypes[2]],
            ACC=tl.float64 if wide else tl.float32, VEC=16 // self.dtypes[0].itemsize,
            TILE_C=self.config.block_c, TILE_M=self.config.block_p,
        )  # fmt: skip
        return made


_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def arrange(sources: Sequence[Source]) -> tuple[tuple[tuple[int, int, int], ...], int, int]:
    """`Batch.places`, and the elements of the two buffers."""
    places: list[tuple[int, int, int]] = []
    weights = channels = 0
    for s in sources:
        c = s.mean.numel()
        b_at = cdiv(weights + s.weight.numel(), ALIGN) * ALIGN
        places.append((weights, b_at, channels))
        weights = cdiv(b_at + c, ALIGN) * ALIGN
        channels += cdiv(c, ALIGN) * ALIGN
    return tuple(places), weights, channels


def affine_dtype(sources: Sequence[Source]) -> torch.dtype:
    """The dtype of gammas and betas; that of the statistics where there are none."""
    found = (t.dtype for s in sources for t in s[4:6] if t is not None)
    return next(found, sources[0].mean.dtype)


def layout(source: Source) -> tuple[int, int, int] | None:
    """``(i, j, k)`` of a weight in memory order ``[groups, i, j, k]``, or None if it has none.

    Channel ``g * j + n`` is at ``[g, :, n, :]``. A layer with a row per channel has one i.
    """
    w, groups = source.weight, source.groups
    last = w.dim() in (4, 5) and w.is_contiguous(
        memory_format=torch.channels_last if w.dim() == 4 else torch.channels_last_3d
    )
    if not w.numel() or not (w.is_contiguous() or last):
        return None
    if not groups:
        return 1, w.shape[0], w.numel() // w.shape[0]
    inputs, outputs, kernel = w.shape[0] // groups, w.shape[1], w[0, 0].numel()
    return (inputs, outputs, kernel) if w.is_contiguous() else (inputs * kernel, outputs, 1)


def tiles_of(config: Config) -> tuple[tuple[int, int], ...]:
    """Kinds of tiles, channels by elements of a row: any layout; short rows; long rows."""
    c, m = config.block_c, config.block_p
    return (c, m), (c, m), (c // 4, 4 * m)


def tile_kind(
    weight: Tensor, shape: tuple[int, int, int], tiles: Sequence[tuple[int, int]] = tiles_of(USUAL)
) -> int:
    """Which of the tiles; those of rows need every row to start at a multiple of 16 bytes."""
    i, _, k = shape
    if i != 1 or k * weight.element_size() % 16 or weight.data_ptr() % 16:
        return 0
    return 1 if k <= tiles[1][1] else 2


@triton.jit
def _address(row, COLUMN: tl.constexpr, T: tl.constexpr):
    return tl.load(row + COLUMN).to(tl.pointer_type(T))


@triton.jit
def _vector(row, COLUMN: tl.constexpr, c, C, T: tl.constexpr, ACC: tl.constexpr):
    """A vector of a channel block; 0 where its address is 0."""
    there = (c < C) & (tl.load(row + COLUMN) != 0)
    return tl.load(_address(row, COLUMN, T) + c, mask=there, other=0.0).to(ACC)


@triton.jit
def _scales(row, c, C, G: tl.constexpr, S: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr):
    """1 / sqrt(var + eps), the scale, and bias - mean."""
    eps = tl.load(row + 15).to(tl.float64, bitcast=True).to(ACC)
    rstd = 1.0 / tl.sqrt(_vector(row, 3, c, C, S, ACC) + eps)
    gamma = _vector(row, 4, c, C, G, ACC)
    gamma = tl.where(tl.load(row + 4) == 0, 1.0, gamma)
    return rstd, rstd * gamma, _vector(row, 1, c, C, W, ACC) - _vector(row, 2, c, C, S, ACC)


@triton.jit
def _extents(row, VEC: tl.constexpr, ROWS: tl.constexpr):
    """Channels, and j, i, k of `layout`; rows have one i, and VEC divides their k."""
    J = tl.load(row + 10).to(tl.int32)
    I = tl.load(row + 11).to(tl.int32)  # noqa: E741
    K = tl.load(row + 12).to(tl.int32)
    if ROWS:
        K = K // VEC * VEC
    return tl.load(row + 9).to(tl.int32), J, I, K


@triton.jit
def _offsets(c, m, J, I, K, ROWS: tl.constexpr):  # noqa: E741
    """Where the elements of a tile lie, int64. Divisions are of int32, which need no subroutine."""
    wide = tl.cast(K, tl.int64)
    if ROWS:
        return c[:, None] * wide + m[None, :]
    else:
        start = (c // J) * (J * wide) * I + (c % J) * wide
        return start[:, None] + ((m // K) * (J * wide) + m % K)[None, :]


@triton.jit
def _weight(row, W: tl.constexpr, ROWS: tl.constexpr):
    """Where a weight begins. A cast from an integer hides from the compiler what divides it, so an
    aligned one is given as a distance from the table, which is aligned too."""
    if ROWS:
        anchor = row.to(tl.pointer_type(W), bitcast=True)
        VEC: tl.constexpr = 128 // W.primitive_bitwidth
        return anchor + (tl.load(row) - row.to(tl.int64)) // 16 * VEC
    else:
        return _address(row, 0, W)


@triton.jit
def _fold(
    row, block, out_ptr,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
    W: tl.constexpr, G: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    C, J, I, K = _extents(row, VEC, ROWS)  # noqa: E741
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    _, scale, shift = _scales(row, c, C, G, S, W, ACC)
    bias = shift * scale + _vector(row, 5, c, C, G, ACC)
    tl.store(out_ptr + tl.load(row + 7) + c, bias.to(W), mask=c < C)
    w_ptr = _weight(row, W, ROWS)
    folded_ptr = out_ptr + tl.load(row + 6) // 16 * 16
    for m0 in range(0, I * K, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        at = _offsets(c, m, J, I, K, ROWS)
        valid = (c < C)[:, None] & (m < I * K)[None, :]
        w = tl.load(w_ptr + at, mask=valid, other=0.0).to(ACC)
        tl.store(folded_ptr + at, (w * scale[:, None]).to(W), mask=valid)


@triton.jit
def fold_kernel(
    table_ptr,  # [pairs, WIDTH] int64
    work_ptr,  # [programs] int32
    out_ptr,  # all w' and b', out
    W: tl.constexpr,  # dtypes: weights and biases
    G: tl.constexpr,  # gamma and beta
    S: tl.constexpr,  # statistics
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_M: tl.constexpr,
):
    """Weight and bias of one channel block of one pair."""
    row = table_ptr + tl.load(work_ptr + tl.program_id(0)).to(tl.int64) * 16
    block = tl.program_id(0) - tl.load(row + 14).to(tl.int32)
    kind = tl.load(row + 13)
    if kind == 2:
        _fold(row, block, out_ptr, TILE_C // 4, TILE_M * 4, True, W, G, S, ACC, VEC)
    elif kind == 1:
        _fold(row, block, out_ptr, TILE_C, TILE_M, True, W, G, S, ACC, VEC)
    else:
        _fold(row, block, out_ptr, TILE_C, TILE_M, False, W, G, S, ACC, VEC)


@triton.jit
def _fold_gradient(
    row, grads, block, out_ptr, affine_ptr, CHANNELS,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
    W: tl.constexpr, G: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    C, J, I, K = _extents(row, VEC, ROWS)  # noqa: E741
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    rstd, scale, shift = _scales(row, c, C, G, S, W, ACC)
    db = _vector(grads, 1, c, C, W, ACC)
    w_ptr = _weight(row, W, ROWS)
    dy_ptr = _weight(grads, W, ROWS)
    dw_ptr = out_ptr + tl.load(row + 6) // 16 * 16
    there = tl.load(grads) != 0
    total = tl.zeros([BLOCK_C], ACC)
    for m0 in range(0, I * K, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        at = _offsets(c, m, J, I, K, ROWS)
        valid = (c < C)[:, None] & (m < I * K)[None, :]
        w = tl.load(w_ptr + at, mask=valid, other=0.0).to(ACC)
        dy = tl.load(dy_ptr + at, mask=valid & there, other=0.0).to(ACC)
        tl.store(dw_ptr + at, (dy * scale[:, None]).to(W), mask=valid)
        total += tl.sum(moments.settled(w * dy, C + I > 0), 1)
    tl.store(out_ptr + tl.load(row + 7) + c, (db * scale).to(W), mask=c < C)
    affine_ptr += tl.load(row + 8)
    tl.store(affine_ptr + c, (rstd * (total + shift * db)).to(G), mask=c < C)
    tl.store(affine_ptr + CHANNELS + c, db.to(G), mask=c < C)


@triton.jit
def fold_gradient_kernel(
    table_ptr,  # [pairs, WIDTH] int64
    work_ptr,  # [programs] int32
    grads_ptr,  # [pairs, 2] int64: addresses of the gradients of w' and b', or 0
    out_ptr,  # all dw and dbias, out, where w' and b' lie in the forward's
    affine_ptr,  # [2, CHANNELS] dgamma and dbeta, out
    CHANNELS,
    W: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_M: tl.constexpr,
):
    """All gradients of one channel block of one pair."""
    pair = tl.load(work_ptr + tl.program_id(0)).to(tl.int64)
    row = table_ptr + pair * 16
    grads = grads_ptr + pair * 2
    block = tl.program_id(0) - tl.load(row + 14).to(tl.int32)
    kind = tl.load(row + 13)
    if kind == 2:
        _fold_gradient(
            row, grads, block, out_ptr, affine_ptr, CHANNELS,
            TILE_C // 4, TILE_M * 4, True, W, G, S, ACC, VEC,
        )  # fmt: skip
    elif kind == 1:
        _fold_gradient(
            row, grads, block, out_ptr, affine_ptr, CHANNELS,
            TILE_C, TILE_M, True, W, G, S, ACC, VEC,
        )  # fmt: skip
    else:
        _fold_gradient(
            row, grads, block, out_ptr, affine_ptr, CHANNELS,
            TILE_C, TILE_M, False, W, G, S, ACC, VEC,
        )  # fmt: skip
