"""Instructions and bytes of loops, read out of machine code."""

from __future__ import annotations

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


def test_a_turn_takes_the_shortest_way() -> None:
    """The addition that a branch skips is not of every turn."""
    assert loops(SASS) == (Loop(instructions=5, bytes=32, inner=True),)
    assert loops(SASS.replace("@!P0 BRA 0x40", "NOP")) == (Loop(5, 32, True),)
    assert loops(SASS.replace("@!P0 BRA 0x40", "FADD R7, R7, R7")) == (Loop(6, 32, True),)


def test_code_without_a_loop() -> None:
    lines = [f"        /*{16 * i:04x}*/  LDG.E.128 R4, [R2.64] ;" for i in range(9)]
    assert loops("\n".join(lines)) == (Loop(9, 144, False),)
    assert loops("\n".join(lines[:7])) == ()


def test_bits() -> None:
    assert [access_bits(m) for m in (".E.128", ".E.U16", ".E.64", ".E")] == [128, 16, 64, 32]
