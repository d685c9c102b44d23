"""Places in tensors of more than 2^31 positions, which no test machine holds."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tritonnorm.kernels import _moments as moments
from tritonnorm.kernels import _tile as tile


@triton.jit
def origins(
    chunk_ptr,  # [] int32
    out_ptr,  # [2] int64: first sample and position of the chunk
    P,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    n0, p0 = tile.chunk_origin(tl.load(chunk_ptr), P, BLOCK_N, BLOCK_P, CHANNELS_LAST)
    tl.store(out_ptr, tl.cast(n0, tl.int64))
    tl.store(out_ptr + 1, tl.cast(p0, tl.int64))


@pytest.mark.parametrize("positions", [1000, 2**31 - 1, 2**31 + 64, 2**36])
@pytest.mark.parametrize("channels_last", [True, False])
def test_where_a_chunk_begins(positions: int, channels_last: bool) -> None:
    per_sample = triton.cdiv(positions, 256)
    for chunk in (0, per_sample // 2, per_sample - 1):
        out = torch.zeros(2, dtype=torch.int64)
        origins[(1,)](torch.tensor(chunk, dtype=torch.int32), out, positions, 2, 256, channels_last)
        assert out.tolist() == [0, 256 * chunk]


@triton.jit
def are_there(out_ptr, N, C, P):
    tl.store(out_ptr, moments.exist(N, C, P).to(tl.int32))


@pytest.mark.parametrize("positions", [1, 2**31 - 8, 2**31, 2**40])
def test_what_the_compiler_cannot_know_is_true(positions: int) -> None:
    out = torch.zeros(1, dtype=torch.int32)
    are_there[(1,)](out, 64, 2048, positions)
    assert out.item() == 1
