"""The machine that runs PTX: threads, programs, shared memory, and faults that it must see."""

from __future__ import annotations

import pytest
import torch

from bench.lab.ptx.instructions import steps_of
from bench.lab.ptx.memory import MemoryFault
from bench.lab.ptx.parse import parse
from tests.lab.ptx_text import at, launch


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("bfly.b32 %r11, %r10, 5, 31", [i ^ 5 for i in range(32)]),
        ("idx.b32 %r11, %r10, 3, 31", [3] * 32),
        ("up.b32 %r11, %r10, 2, 0", [max(i - 2, i if i < 2 else 0) for i in range(32)]),
        ("down.b32 %r11, %r10, 2, 31", [i + 2 if i < 30 else i for i in range(32)]),
        ("bfly.b32 %r11, %r10, 3, 0x1c1f", [i ^ 3 for i in range(32)]),  # in fours
    ],
)
def test_shuffles(mode: str, expected: list[int]) -> None:
    out = torch.empty(64, dtype=torch.int32)
    body = f"mov.b32 %r10, %r1; shfl.sync.{mode}, -1; {at(1, 4, 20)} st.global.b32 [%rd20], %r11;"
    launch(body, out, threads=64)
    assert out.tolist() == expected + [32 + e for e in expected]


def test_reduced_over_a_warp() -> None:
    out = torch.empty(64, dtype=torch.int32)
    body = f"redux.sync.add.s32 %r11, %r1, -1; {at(1, 4, 20)} st.global.b32 [%rd20], %r11;"
    launch(body, out, threads=64)
    assert out.tolist() == [496] * 32 + [496 + 1024] * 32


@pytest.mark.parametrize("across", ["", ".trans"])
def test_matrices(across: str) -> None:
    """stmatrix, then single loads; and ldmatrix, which undoes it."""
    out, again = torch.empty(32, 2, dtype=torch.int16), torch.empty(32, dtype=torch.int32)
    body = f"""
    mul.lo.s32 %r10, %r1, 2; add.s32 %r11, %r10, 1; shl.b32 %r12, %r11, 16; or.b32 %r13, %r10, %r12;
    and.b32 %r14, %r1, 7; shl.b32 %r15, %r14, 4; mov.b32 %r16, memory; add.s32 %r17, %r16, %r15;
    stmatrix.sync.aligned.m8n8.x1{across}.shared.b16 [%r17], {{%r13}};
    bar.sync 0;
    shl.b32 %r18, %r1, 2; add.s32 %r19, %r16, %r18; ld.shared.b32 %r20, [%r19];
    {at(1, 4, 20)} st.global.b32 [%rd20], %r20;
    ldmatrix.sync.aligned.m8n8.x1{across}.shared.b16 {{%r21}}, [%r17];
    {at(2, 4, 21)} st.global.b32 [%rd21], %r21;"""
    launch(body, out, again, shared=128)
    matrix = torch.arange(64, dtype=torch.int16).reshape(8, 8)
    assert torch.equal(out.reshape(8, 8), matrix.T if across else matrix)
    lanes = torch.arange(32, dtype=torch.int32)
    assert torch.equal(again, 2 * lanes | (2 * lanes + 1) << 16)


def test_threads_that_part() -> None:
    """Each counts to its own number, odd ones by another way; after that all meet at a barrier."""
    out = torch.empty(64, dtype=torch.int32)
    launch(
        f"""
        mov.b32 %r10, 0; mov.b32 %r11, 0;
        and.b32 %r12, %r1, 1; setp.eq.b32 %p1, %r12, 0;
        @%p1 bra EVEN;
        mul.lo.s32 %r11, %r1, 100;
        bra.uni TOGETHER;
        EVEN:
        LOOP:
        setp.ge.s32 %p2, %r10, %r1;
        @%p2 bra TOGETHER;
        add.s32 %r10, %r10, 1; add.s32 %r11, %r11, 3;
        bra.uni LOOP;
        TOGETHER:
        bar.sync 0;
        {at(1, 4, 20)} st.global.b32 [%rd20], %r11;""",
        out,
        threads=64,
    )
    assert out.tolist() == [100 * i if i % 2 else 3 * i for i in range(64)]


def test_a_barrier_where_threads_have_parted() -> None:
    with pytest.raises(MemoryFault, match="have parted"):
        launch(
            "setp.lt.s32 %p1, %r1, 7; @%p1 bra A; bar.sync 0; A:\nmov.b32 %r5, 0;", torch.empty(1)
        )


MEET = """
    mov.b32 %r10, 1; setp.eq.b32 %p1, %r1, 0;
    @%p1 atom.global.gpu.acq_rel.add.u32 %r11, [%rd1], %r10;
    WAIT:
    ld.global.acquire.gpu.b32 %r12, [%rd1];
    setp.lt.u32 %p2, %r12, {programs};
    @%p2 bra WAIT;
"""


def test_programs_that_meet() -> None:
    """Every program writes only after all have arrived."""
    arrived, out = torch.zeros(1, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    body = MEET.format(programs=5) + f"{at(2, 4, 20)} st.global.b32 [%rd20], %r12;"
    launch(body, arrived, out, grid=5)
    assert arrived.item() == 5 and out.tolist() == [5] * 32


def test_programs_that_wait_for_ever() -> None:
    with pytest.raises(RuntimeError, match="wait for ever"):
        launch(MEET.format(programs=6), torch.zeros(1, dtype=torch.int32), grid=5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{at(1, 4, 20)} st.global.b32 [%rd20+4], %r1;", "4 bytes at .* in no tensor: 0 bytes"),
        (f"{at(1, 4, 20)} ld.global.b32 %r9, [%rd20+-4];", "in no tensor"),
        (f"{at(1, 4, 20)} ld.global.v2.b32 {{%r8, %r9}}, [%rd20];", "8 bytes is not aligned"),
        (f"{at(1, 2, 20)} ld.global.b32 %r9, [%rd20];", "4 bytes is not aligned"),
        ("st.shared.b32 [memory+64], %r1;", "byte 64 of 64 bytes of shared memory"),
    ],
)
def test_accesses_that_must_not_be(body: str, message: str) -> None:
    with pytest.raises(MemoryFault, match=message):
        launch(body, torch.zeros(32, dtype=torch.int32), shared=64)


def shared_memory(*parts: str) -> None:
    """Two warps; each has a word of its own, %r12, and the other's, %r13; %r10 is its number."""
    before = """shr.u32 %r10, %r1, 5; xor.b32 %r11, %r10, 1;
    shl.b32 %r12, %r10, 2; shl.b32 %r13, %r11, 2;"""
    launch(before + "\n".join(parts), torch.empty(1), threads=64, shared=16)


WRITE, READ, BARRIER = "st.shared.b32 [%r12], %r10;", "ld.shared.b32 %r14, [%r13];", "bar.sync 0;"
OVER, SAME = "st.shared.b32 [%r13], %r10;", "mov.b32 %r15, 7; st.shared.b32 [memory], %r15;"
APART = "mov.b32 %r15, memory; st.shared.b32 [%r15], %r10;"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((WRITE, READ), "reads what another wrote"),
        ((WRITE, BARRIER, READ, WRITE), "writes what another read"),
        ((WRITE, OVER), "writes what another wrote"),
        ((APART,), "different values to one place"),
        (("mov.b32 %r15, memory; st.shared.b32 [%r15], %r1;",), "different values to one place"),
    ],
)
def test_races(parts: tuple[str, ...], message: str) -> None:
    with pytest.raises(MemoryFault, match=message):
        shared_memory(*parts)


@pytest.mark.parametrize(
    "parts",
    [
        (WRITE, BARRIER, READ, BARRIER, OVER),
        (SAME, SAME),
        (WRITE, "ld.shared.b32 %r14, [%r12];", WRITE),
    ],
)
def test_no_race(parts: tuple[str, ...]) -> None:
    shared_memory(*parts)


def test_counts() -> None:
    """Two warps read 16 bytes a thread in a row, and write every eighth word."""
    source, out = torch.zeros(64, 4, dtype=torch.int32), torch.zeros(512, dtype=torch.int32)
    counts = launch(
        f"""{at(1, 16, 20)} ld.global.v4.b32 {{%r8, %r9, %r10, %r11}}, [%rd20];
        {at(2, 32, 21)} st.global.b32 [%rd21], %r8;""",
        *(source, out),
        threads=64,
    )
    key, other = ("ld", 16), ("st", 4)
    assert counts.requests == {key: 2, other: 2}
    assert counts.moved == {key: 1024, other: 256}
    assert counts.sectors[other] == 64
    if source.data_ptr() % 32 == 0:
        assert counts.sectors[key] == 32


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, "no .entry"),
        (".entry k()\n{\n ???;\n}", ValueError, "line 3 is not understood"),
        (
            ".entry k()\n{\n .reg .b32 %r<9>;\n tex.2d %r1, %r2;\n}",
            NotImplementedError,
            "line 4: tex",
        ),
        (".entry k()\n{\n .reg .b32 %r<9>;\n call f, %r1;\n}", NotImplementedError, "line 4: call"),
    ],
)
def test_what_is_not_understood(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        steps_of(parse(text))
