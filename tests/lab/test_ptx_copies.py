"""Asynchronous copies to shared memory: what arrives when, and what must not be done before."""

from __future__ import annotations

import pytest
import torch

from bench.lab.ptx.cache import SECTOR, Cache
from bench.lab.ptx.instructions import steps_of
from bench.lab.ptx.memory import MemoryFault
from bench.lab.ptx.parse import parse
from tests.lab.ptx_text import at, launch

COMMIT, WAIT, ALL = "cp.async.commit_group;", "cp.async.wait_group 0;", "cp.async.wait_all;"
BARRIER = "bar.sync 0;"


def begin(size: int = 4, more: str = "", to: int = 0, away: int = 0, how: str = "ca") -> str:
    """Every thread copies what lies at %rd20 to its place."""
    cache, _, hint = how.partition(".")
    opcode = ".".join(filter(None, ["cp.async", cache, "shared.global", hint]))
    return f"{opcode} [ %r10 + {to} ], [ %rd20 + {away} ], {size:#x}{more};"


def places(size: int = 4) -> str:
    """%r10 and %rd20, a thread's place in shared memory and in the first tensor; %r12, in shared
    memory that of a thread in the other of two warps."""
    return f"""{at(1, size, 20)} mul.lo.s32 %r10, %r1, {size};
    xor.b32 %r11, %r1, 32; mul.lo.s32 %r12, %r11, {size};"""


@pytest.mark.parametrize("wait", [COMMIT + WAIT, ALL])
@pytest.mark.parametrize(
    ("size", "how"), [(4, "ca"), (8, "ca"), (16, "ca"), (16, "cg"), (16, "cg.L2::128B")]
)
def test_values_arrive(size: int, how: str, wait: str) -> None:
    """Two warps copy, and each reads what the other has copied."""
    source = torch.arange(64 * size).remainder(251).to(torch.uint8).reshape(64, size)
    out, words = torch.empty_like(source), ", ".join(f"%r{20 + i}" for i in range(size // 4))
    kind = {4: "b32", 8: "v2.b32", 16: "v4.b32"}[size]
    launch(
        f"""{places(size)} {begin(size, how=how)} {wait} {BARRIER}
        ld.shared.{kind} {{{words}}}, [%r12];
        {at(2, size, 21)} st.global.{kind} [%rd21], {{{words}}};""",
        *(source, out),
        threads=64,
        shared=64 * size,
    )
    assert torch.equal(out, source.roll(32, 0))


def test_zeros_for_what_is_not_read() -> None:
    """Each thread reads a byte more than the one before, up to all 16."""
    source, out = torch.ones(32, 16, dtype=torch.uint8), torch.empty(32, 16, dtype=torch.uint8)
    counts = launch(
        f"""{places(16)} min.u32 %r13, %r1, 16;
        {begin(16, ", %r13")} {ALL} ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r10];
        {at(2, 16, 21)} st.global.v4.b32 [%rd21], {{%r20, %r21, %r22, %r23}};""",
        *(source, out),
        shared=512,
    )
    assert torch.equal(out, (torch.arange(16) < torch.arange(32)[:, None]).to(torch.uint8))
    read = {("ld", size): size for size in range(1, 16)}
    assert counts.moved == {("st", 16): 512, ("ld", 16): 16 * 16} | read


@pytest.mark.parametrize(("more", "read"), [(", %r13", 7), (", 0", 0)])
def test_what_is_not_read_may_lie_anywhere(more: str, read: int) -> None:
    source, out = torch.ones(7, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    counts = launch(
        f"""{places()} setp.lt.u32 %p1, %r1, 7; selp.b32 %r13, 4, 0, %p1;
        {begin(more=more)} {ALL} ld.shared.b32 %r14, [%r10];
        {at(2, 4, 21)} st.global.b32 [%rd21], %r14;""",
        *(source, out),
        shared=128,
    )
    assert out.tolist() == [1] * read + [0] * (32 - read)
    assert (counts.requests["ld", 4], counts.moved["ld", 4]) == (read > 0, 4 * read)


@pytest.mark.parametrize("guard", ["@%p1", "@!%p2", "@%p2 bra OVER;"])
def test_threads_that_copy_nothing(guard: str) -> None:
    """Their places are as before, and may be used, wherever they would copy from."""
    source, out = torch.ones(7, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    counts = launch(
        f"""{places()} setp.lt.u32 %p1, %r1, 7; setp.ge.u32 %p2, %r1, 7;
        {guard} {begin()}
        OVER:
        @%p2 st.shared.b32 [%r10], %r1;
        {ALL} ld.shared.b32 %r14, [%r10];
        {at(2, 4, 21)} st.global.b32 [%rd21], %r14;""",
        *(source, out),
        shared=128,
    )
    assert out.tolist() == [1] * 7 + list(range(7, 32))
    assert counts.moved["ld", 4] == 28


def shared_memory(*parts: str) -> torch.Tensor:
    """Two warps; each thread has a word of the source, a 1, that is returned."""
    source = torch.ones(64, dtype=torch.int32)
    launch(places() + "\n".join(parts), source, threads=64, shared=256)
    return source


READ, OWN = "ld.shared.b32 %r14, [%r12];", "ld.shared.b32 %r14, [%r10];"
WRITE, OVER = "st.shared.b32 [%r10], %r1;", "st.shared.b32 [%r12], %r1;"
ONE, DIFFERENT = "mov.b32 %r10, 0;", "st.global.b32 [%rd20], %r1;"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((begin(), COMMIT, OWN), "has not arrived"),
        ((begin(), COMMIT, BARRIER, READ), "has not arrived"),
        ((begin(), WAIT, OWN), "has not arrived"),
        ((begin(), WAIT, COMMIT, OWN), "has not arrived"),
        ((begin(), COMMIT, WAIT, READ), "reads what another wrote"),
        ((begin(), COMMIT, BARRIER, WAIT, READ), "reads what another wrote"),
        ((begin(), ALL, OVER), "writes what another wrote"),
        ((WRITE, BARRIER, READ, begin()), "writes what another read"),
        ((OVER, begin()), "writes what another wrote"),
        ((begin(), COMMIT, WRITE), "writes where a copy is on its way"),
        ((begin(), BARRIER, OVER), "writes where a copy is on its way"),
        ((begin(), COMMIT, begin()), "writes where a copy is on its way"),
        ((DIFFERENT, ONE, begin(), ALL), "different values to one place"),
    ],
)
def test_races(parts: tuple[str, ...], message: str) -> None:
    with pytest.raises(MemoryFault, match=message):
        shared_memory(*parts)


@pytest.mark.parametrize(
    "parts",
    [
        (begin(), COMMIT, WAIT, OWN, begin(), ALL),
        (begin(), ALL, BARRIER, READ, BARRIER, begin(), ALL, BARRIER, READ),
        (OVER, BARRIER, begin()),
        (WRITE, begin(), ALL, WRITE, OWN),
        (ONE, begin(), ALL),
    ],
)
def test_no_race(parts: tuple[str, ...]) -> None:
    shared_memory(*parts)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (begin(away=4), "4 bytes at .* in no tensor: 0 bytes"),
        (begin(away=-4), "in no tensor"),
        (begin(away=2), "4 bytes is not aligned"),
        (begin(8), "8 bytes is not aligned"),
        (begin(more=", 5"), "a copy of 4 bytes reads more"),
        (begin(to=4), "byte 256 of 256 bytes of shared memory"),
        (begin(to=2), "shared memory is accessed by 4 bytes at 0x2"),
    ],
)
def test_copies_that_must_not_be(part: str, message: str) -> None:
    with pytest.raises(MemoryFault, match=message):
        shared_memory(part)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("newest", range(4))
def test_the_newest_groups_stay_on_their_way(newest: int, place: int) -> None:
    """Three groups, the last of two copies."""
    source, out = torch.arange(32, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    first, second, third, fourth = (begin(to=128 * i) for i in range(4))
    body = f"""{places()} {first} {COMMIT} {second} {COMMIT} {third} {fourth} {COMMIT}
    cp.async.wait_group {newest}; ld.shared.b32 %r14, [%r10+{128 * place}];
    {at(2, 4, 21)} st.global.b32 [%rd21], %r14;"""
    if min(place, 2) < 3 - newest:
        launch(body, source, out, shared=512)
        assert torch.equal(out, source)
    else:
        with pytest.raises(MemoryFault, match="has not arrived"):
            launch(body, source, out, shared=512)


@pytest.mark.parametrize(
    "wait",
    [
        f"@%p1 {COMMIT} cp.async.wait_group 1;",
        f"@%p1 {WAIT}",
        f"@!%p1 bra OVER; {ALL} OVER:",
    ],
)
def test_each_thread_waits_for_its_own(wait: str) -> None:
    """Threads below 7 do, the others not before they all do, when nothing arrives twice."""
    body = f"setp.lt.u32 %p1, %r1, 7; {begin()} {COMMIT} {wait}"
    after = f"@%p1 {WRITE} {ALL} {OWN} st.global.b32 [%rd20], %r14;"
    assert shared_memory(body, "@%p1 " + OWN, after).tolist() == [*range(7), *[1] * 57]
    with pytest.raises(MemoryFault, match="has not arrived"):
        shared_memory(body, "@!%p1 " + OWN)


def test_programs_that_part_with_copies_on_their_way() -> None:
    """Every third waits for both of its groups at once, the others for one after the other."""
    source, out = torch.arange(5 * 64).int(), torch.empty(5 * 64, dtype=torch.int32)
    launch(
        f"""mul.lo.s32 %r10, %r1, 4; mad.lo.s32 %r1, %r2, 64, %r1; {at(1, 4, 20)} {at(2, 4, 21)}
        {begin()} {COMMIT} {begin(to=128, away=128)} {COMMIT}
        rem.u32 %r11, %r2, 3; setp.eq.b32 %p1, %r11, 0;
        @%p1 bra ONCE;
        cp.async.wait_group 1; {OWN} st.global.b32 [%rd21], %r14;
        {WAIT} ld.shared.b32 %r14, [%r10+128]; st.global.b32 [%rd21+128], %r14;
        bra.uni END;
        ONCE:
        {WAIT} {OWN} ld.shared.b32 %r15, [%r10+128];
        st.global.b32 [%rd21], %r14; st.global.b32 [%rd21+128], %r15;
        END:""",
        *(source, out),
        grid=5,
        shared=256,
    )
    assert torch.equal(out, source)


def test_counts() -> None:
    """Of two warps, one reads all of its 16 bytes a thread, the other every second 16 bytes."""
    source = torch.zeros(100 * 16 + 32, dtype=torch.uint8)
    source = source[-source.data_ptr() % 32 :]
    cache = Cache(1 << 20)
    counts = launch(
        f"""{places(16)} setp.lt.u32 %p1, %r1, 32; and.b32 %r13, %r1, 1;
        setp.eq.b32 %p2, %r13, 0; or.pred %p3, %p1, %p2; selp.b32 %r14, 16, 0, %p3;
        {begin(16, ", %r14")} {ALL}""",
        source,
        threads=64,
        shared=1024,
        cache=cache,
    )
    key = ("ld", 16)
    assert (counts.requests, counts.moved) == ({key: 2}, {key: 48 * 16})
    assert counts.sectors == {key: 32}
    assert cache.loaded == 32 * SECTOR


@pytest.mark.parametrize("more", ["", ", 4"])
@pytest.mark.parametrize("policy", ["evict_first", "evict_normal"])
def test_a_hint(policy: str, more: str) -> None:
    """Eight sectors are copied over one that stays, or not."""
    source, cache = torch.zeros(64, dtype=torch.int32), Cache(2 * SECTOR)
    cache.access([1], store=False)
    launch(
        f"""createpolicy.fractional.L2::{policy}.b64 %rd10, 1.0;
        {places()} {begin(more=more + ", %rd10", how="ca.L2::cache_hint")}""",
        source,
        threads=64,
        shared=256,
        cache=cache,
    )
    before = cache.loaded
    cache.access([1], store=False)
    assert cache.loaded - before == (0 if policy == "evict_first" else SECTOR)


@pytest.mark.parametrize(
    "text",
    [
        "cp.async.bulk.commit_group",
        "cp.async.mbarrier.arrive.shared.b64 [%r1]",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%r1], [%r1], %r1",
    ],
)
def test_what_is_not_understood(text: str) -> None:
    with pytest.raises(NotImplementedError, match="line 4: cp"):
        steps_of(parse(f".entry k()\n{{\n .reg .b32 %r<9>;\n {text};\n}}"))
