"""The idealized cache: what it loads, what it writes back, and when."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.lab.ptx.cache import SECTOR, Cache
from tests.lab.ptx_text import at, launch

Access = tuple[int, bool]  # a sector, and whether it is written


def moved(size: int, accesses: Sequence[Access]) -> tuple[int, int]:
    cache = Cache(size * SECTOR)
    for sector, store in accesses:
        cache.access([sector], store)
    cache.flush()
    return cache.loaded // SECTOR, cache.stored // SECTOR


@pytest.mark.parametrize(
    ("accesses", "expected"),
    [
        ([(1, False), (1, False)], (1, 0)),
        ([(1, True), (1, True), (1, False)], (0, 1)),
        ([(1, False), (1, True)], (1, 1)),
        ([(1, False), (2, False), (3, False), (1, False)], (4, 0)),
        ([(1, False), (2, False), (1, False), (3, False), (1, False)], (3, 0)),
        ([(1, True), (2, False), (3, False), (1, True)], (2, 2)),
    ],
)
def test_two_sectors(accesses: list[Access], expected: tuple[int, int]) -> None:
    assert moved(2, accesses) == expected


@given(st.integers(1, 6), st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1))
def test_bounds(size: int, accesses: list[Access]) -> None:
    """What was never written is loaded at least once, what was written goes back; a cache that
    holds all does no more, and a larger one never loads more."""
    loaded, stored = moved(size, accesses)
    first = dict(reversed(accesses))
    least = sum(not store for store in first.values()), len({s for s, store in accesses if store})
    assert loaded >= least[0] and stored >= least[1]
    assert moved(len(first), accesses) == least
    assert moved(size + 1, accesses)[0] <= loaded


def test_what_is_marked_leaves_first() -> None:
    """A second pass in reverse finds all that was read, but for the place the output takes."""

    def loaded(evict_first: bool) -> int:
        cache = Cache(100 * SECTOR)
        cache.access(range(99), store=False)
        for sector in reversed(range(99)):
            cache.access([sector], store=False)
            cache.access([1000 + sector], store=True, evict_first=evict_first)
        return cache.loaded // SECTOR

    assert (loaded(True), loaded(False)) == (99, 99 + 49)


@pytest.mark.parametrize("policy", ["evict_first", "evict_normal"])
def test_a_hint_in_a_program(policy: str) -> None:
    """64 numbers, written over one sector that stays: 7 of 8 sectors make room, or fill it."""
    out = torch.zeros(64, dtype=torch.int32)
    body = f"""
    createpolicy.fractional.L2::{policy}.b64 %rd10, 1.0;
    {at(1, 4, 20)} st.global.L1::evict_first.L2::cache_hint.b32 [%rd20], %r1, %rd10;"""
    cache = Cache(2 * SECTOR)
    cache.access([1], store=False)
    launch(body, out, threads=64, cache=cache)
    cache.access([1], store=False)
    assert cache.loaded // SECTOR == (1 if policy == "evict_first" else 2)
    assert cache.flush() == cache.loaded + 64 * 4
    assert out.tolist() == list(range(64))
