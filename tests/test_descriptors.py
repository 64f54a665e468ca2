"""The search for wrong descriptors finds the fault it was made for."""

from tests.descriptors import foreign_descriptors

# As ptxas 12.8 wrote it: UR8 still holds a stride, where a copy of UR22 is wanted.
WRONG = """
        /*0020*/                   UMOV UR7, URZ ;
        /*0030*/                   S2UR UR24, SR_CgaCtaId ;
        /*0710*/                   ULDC UR8, c[0x0][0x29c] ;
        /*49a0*/                   UIADD3 UR6, UR24, 0x7000, URZ ;
        /*4a00*/                   USHF.R.U32.HI UR6, URZ, 0x4, UR6 ;
        /*4a40*/                   USGXT.U32 UR22, UR6, 0xe ;
        /*49c0*/                   UIADD3 UR8, UP0, UR8, 0x2, URZ ;
        /*4a20*/                   UIADD3.X UR7, UR7, -0x7fffffe0, URZ, UP0, !UPT ;
        /*4eb0*/                   UMOV UR6, UR8 ;
        /*78a0*/                   ULOP3.LUT UR4, UR24, 0x3fff, URZ, 0xc0, !UPT ;
        /*7910*/                   UMOV UR5, URZ ;
        /*7920*/                   UIADD3.64 UR4, UR4, 0x2, URZ ;
        /*7930*/              @!P0 HGMMA.64x32x16.F32 R56, gdesc[UR4], R56, gsb0 ;
        /*7940*/                   HGMMA.64x32x16.F32 R72, R112, gdesc[UR20].tnspB, R72, gsb0 ;
"""


def test_a_descriptor_that_derives_from_a_parameter():
    assert [line.split(",")[1].strip() for line in foreign_descriptors(WRONG)] == [
        "gdesc[UR4]", "R112",
    ]  # fmt: skip
    right = WRONG.replace("UR8, UP0, UR8", "UR8, UP0, UR22").replace("UR20", "UR4")
    assert foreign_descriptors(right) == []
    assert len(foreign_descriptors(right.replace("UMOV UR5, URZ", "ULDC UR5, c[0x0][0x210]"))) == 1


def test_a_left_operand_in_registers_has_no_descriptor():
    line = "/*7940*/ HGMMA.64x32x16.F32 R72, R112, gdesc[UR4].tnspB, R72, gsb0 ;"
    setup = "/*0010*/ UMOV UR6, URZ ;\n/*0020*/ UMOV UR7, URZ ;\n"
    assert foreign_descriptors(setup + line) == []
    assert foreign_descriptors(setup + line.replace("R112, ", "")) != []
