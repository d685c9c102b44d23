"""Instructions, bytes and waits of loops, read out of machine code."""

from __future__ import annotations

import pytest

from tritonnorm.tune.loops import Loop, access_bits, loops

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P0 BRA 0x40 ;
        /*0030*/                   FADD R9, R9, R9 ;
        /*0040*/                   FADD R8, R8, R4 ;
        /*0050*/                   STG.E.128 [R2.64], R8 ;
        /*0060*/               @P1 BRA 0x10 ;
        /*0070*/                   LDG.E.U16 R4, [R2.64] ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90 ;
        /*00a0*/                   NOP ;
"""


def code(*lines: str) -> str:
    return "\n".join(f"  /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines))


def turn(*lines: str) -> Loop:
    """A loop of these instructions and of two stores, which wait for nothing."""
    stores = ["STG.E.128 desc[UR4][R40.64], R44"] * 2
    (found,) = loops(code(*lines, *stores, "@P0 BRA 0x0"))
    assert found.inner and found.instructions == len(lines) + 3
    return found


def test_a_turn_takes_the_shortest_way() -> None:
    """The addition that a branch skips is not of every turn."""
    assert loops(SASS) == (Loop(instructions=5, bytes=32, loaded=16, waits=1, inner=True),)
    assert loops(SASS.replace("@!P0 BRA 0x40", "NOP")) == (Loop(5, 32, 16, 1, True),)
    assert loops(SASS.replace("@!P0 BRA 0x40", "FADD R7, R7, R7")) == (Loop(6, 32, 16, 1, True),)


def test_code_without_a_loop() -> None:
    lines = [f"LDG.E.128 R{4 * i}, [R40.64]" for i in range(9)]
    assert loops(code(*lines)) == (Loop(9, 144, 144, 0, False),)
    assert loops(code(*lines, "FADD R1, R1, R32")) == (Loop(10, 144, 144, 1, False),)
    assert loops(code(*lines[:7])) == ()


def test_bits() -> None:
    assert [access_bits(m) for m in (".E.128", ".E.U16", ".E.64", ".E")] == [128, 16, 64, 32]


FIRST, SECOND = "LDG.E.128 R4, desc[UR4][R20.64]", "@P1 LDG.E.64 R8, desc[UR4][R22.64+0x10]"
ADD_FIRST, ADD_SECOND = "FADD R0, R0, R7.reuse", "FADD R1, R1, -R9"


def test_loads_that_are_used_together_are_waited_for_once() -> None:
    found = turn(FIRST, SECOND, ADD_FIRST, ADD_SECOND)
    assert (found.waits, found.loaded, found.bytes) == (1, 24, 56)
    assert turn(ADD_FIRST, ADD_SECOND, FIRST, SECOND).waits == 1  # by the next turn


def test_loads_that_are_used_one_by_one_are_waited_for_one_by_one() -> None:
    assert turn(FIRST, ADD_FIRST, SECOND, ADD_SECOND).waits == 2
    # The second arrives with the first, the third does not.
    third = ("LDG.E R12, desc[UR4][R24.64]", ADD_SECOND, "FADD R1, R1, R12")
    assert turn(FIRST, SECOND, ADD_FIRST, *third).waits == 2


def test_turns_that_load_ahead() -> None:
    """Around loops a value may never be used; in a loop its register is loaded again."""
    assert turn(ADD_FIRST, SECOND, ADD_SECOND, FIRST).waits == 2  # the first turn only once
    assert turn(FIRST).waits == 1
    assert turn(FIRST, SECOND).waits == 1


@pytest.mark.parametrize(
    ("line", "waits"),
    [
        ("STG.E.128 desc[UR4][R30.64], R12", 1),  # of something else
        ("STG.E.128 desc[UR4][R30.64], R4", 2),
        ("STG.E.128 desc[UR4][R30.64], R1", 2),  # to R4
        ("STG.E.64 desc[UR4][R30.64], R2", 1),  # to R3
        ("STG.E.128 desc[UR4][R6.64], R12", 2),
        ("STG.E.128 [R3.64], R12", 2),  # R3 and R4
        ("STG.E desc[UR6][R8.64], R12", 1),
        ("STS.128 [R3], R12", 1),
        ("LDG.E.U16 R3, desc[UR4][R30.64]", 1),
        ("LDG.E.ENL2.256 R12, R1, desc[UR4][R30.64]", 2),
        ("LDS.64 R3, [R30]", 2),
        ("IMAD.MOV.U32 R5, RZ, RZ, R30", 2),  # overwritten
        ("ULEA UR4, UR5, UR6, 0xc", 1),  # R4 is no uniform register
    ],
)
def test_what_waits_for_a_load(line: str, waits: int) -> None:
    """Between the first load and the second: what needs a register of the first."""
    assert turn(FIRST, line, SECOND, ADD_SECOND).waits == waits


def test_loads_of_a_meeting() -> None:
    meeting = FIRST.replace(".128", ".128.STRONG.GPU")
    found = turn(meeting, ADD_FIRST)
    assert (found.waits, found.loaded, found.bytes) == (0, 0, 48)
    assert turn(meeting, ADD_FIRST, SECOND, ADD_SECOND).waits == 1


COPIES = (
    "LDGSTS.E.BYPASS.128 [R20+0x800], desc[UR4][R22.64], !P4",
    "@!P2 LDGSTS.E [R21], desc[UR4][R24.64], P0",
)


@pytest.mark.parametrize(
    ("left", "groups", "waits"),
    [(0, 1, 1), (1, 1, 1 / 2), (3, 1, 1 / 4), (4, 1, 1 / 5), (3, 2, 1 / 2), (10, 2, 1 / 6)],
)
def test_a_pipelined_loop(left: int, groups: int, waits: float) -> None:
    """A turn waits until that many groups are left, and starts one or two for a later turn."""
    copies = COPIES if groups == 1 else (COPIES[0], "LDGDEPBAR", COPIES[1])
    found = turn(f"DEPBAR.LE SB0, {left:#x}", "LDS.128 R4, [R20]", *copies, "LDGDEPBAR")
    assert found.waits == pytest.approx(waits)
    assert (found.loaded, found.bytes) == (20, 52)


def test_copies_that_a_turn_waits_for_itself() -> None:
    assert turn(*COPIES, "LDGDEPBAR", "DEPBAR.LE SB0, 0x0").waits == 1
    assert turn(*COPIES, "LDGDEPBAR", "DEPBAR.LE SB0, 0x1").waits == 1 / 2
    assert turn(*COPIES, "DEPBAR.LE SB0, 0x0").waits == 0  # of no group
    assert turn("LDGDEPBAR", "DEPBAR.LE SB0, 0x0").waits == 0  # an empty group


def test_copies_arrive_with_loads() -> None:
    """Those before a load that a turn waits for; not those after it."""
    assert turn(*COPIES, "LDGDEPBAR", FIRST, ADD_FIRST, "DEPBAR.LE SB0, 0x0").waits == 1
    assert turn(*COPIES, FIRST, ADD_FIRST, "LDGDEPBAR", "DEPBAR.LE SB0, 0x0").waits == 1
    assert turn(FIRST, ADD_FIRST, *COPIES, "LDGDEPBAR", "DEPBAR.LE SB0, 0x0").waits == 2


def test_loops_that_never_wait() -> None:
    """Nor repeat themselves, as their groups grow in number."""
    assert turn(*COPIES, "LDGDEPBAR").waits == 0
