"""Reading machine code in the order in which it runs: listings written by hand."""

from __future__ import annotations

from nemo_engine.benchmarks.machine_flow import barriers, named_registers, read_flow


def listing(text: str) -> str:
    """Instructions, one a line, as nvdisasm prints them; what ends in a colon is a label."""
    lines = []
    for index, line in enumerate(text.strip().splitlines()):
        line = line.strip()
        lines.append(line if line.endswith(":") else f"        /*{16 * index:04x}*/  {line} ;")
    return "\n".join(lines)


def test_accesses_before_the_wait_are_found_on_every_way() -> None:
    """Through a branch that goes around the wait, out of line; not behind it, nor where nothing leads."""
    code = listing("""
        LDG.E.64 R2, desc[UR4][R2.64]
        @P0 BRA `(.L_2)
        @!P1 EXIT
        ACQBULK
        LDG.E R4, desc[UR4][R4.64]
        STG.E.128 desc[UR4][R4.64], R8
        EXIT
        .L_2:
        UTMALDG.2D [UR8], [UR6], desc[UR10]
        BRA `(.L_3)
        LDG.E R9, desc[UR4][R4.64]
        .L_3:
        RED.E.ADD.STRONG.GPU desc[UR4][R2.64], R5
        ACQBULK
        LDGSTS.E.BYPASS.128 [R3], desc[UR4][R4.64]
        EXIT
    """)
    assert dict(read_flow(code).early) == {"UTMALDG": 1, "LDG": 1, "RED": 1}
    assert "early UTMALDG:1,LDG:1,RED:1  roles -" in read_flow(code).words()


def test_a_target_of_reconvergence_is_no_branch() -> None:
    code = listing("""
        BSSY B0, `(.L_2)
        ACQBULK
        BSYNC B0
        .L_2:
        STG.E desc[UR4][R4.64], R8
        EXIT
    """)
    assert dict(read_flow(code).early) == {}


def test_branches_with_a_predicate_go_both_ways() -> None:
    for branch in ("@P1 BRA P0, `(.L_1)", "BRA UP0, `(.L_1)", "BRA.DIV UR4, `(.L_1)", "@P0 BRA.U.ANY `(.L_1)"):
        code = listing(f"{branch}\nLDG.E R0, desc[UR4][R2.64]\nEXIT\n.L_1:\nSTG.E desc[UR4][R2.64], R0\nEXIT")
        assert dict(read_flow(code).early) == {"LDG": 1, "STG": 1}, branch


def test_exponentials_count_between_products_and_their_wait() -> None:
    product = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR40], R24, gsb0"
    code = listing(f"""
        MUFU.EX2 R1, R1
        {product}
        WARPGROUP.DEPBAR.LE gsb0, 0x1
        MUFU.EX2 R2, R2
        @P0 MUFU.EX2 R3, R3
        MUFU.RCP R3, R3
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        MUFU.EX2 R2, R2
        {product}
        WARPGROUP.DEPBAR.LE gsb0, 0x0
    """)
    flow = read_flow(code)
    assert (flow.waits, flow.exponentials) == (3, (2, 0))


def test_registers_of_each_role() -> None:
    code = listing("""
        @P0 BRA `(.L_1)
        USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8
        HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR12].tnspB, R24
        EXIT
        .L_1:
        USETMAXREG.DEALLOC.CTAPOOL 0x28
        IMAD.WIDE R6, R2, 0x2, R4
        EXIT
    """)
    assert read_flow(code).roles == ((8, 40), (156, 232))


def test_operands_of_several_registers_are_counted_whole() -> None:
    for instruction, registers in {
        "IADD3 R4, R7, R5, RZ": 8,
        "LDG.E.128 R8, desc[UR4][R2.64]": 12,
        "LDG.E R2, desc[UR4][R12.64+0x10]": 14,
        "STG.E.64 desc[UR4][R2.64], R20": 22,
        "STS.128 [R30], R8": 31,
        "LDSM.16.M88.4 R16, [R3]": 20,
        "STSM.16.M88.4 [R3], R16": 20,
        "HMMA.16816.F32 R4, R8, R12, R4": 14,
        "QGMMA.64x96x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24": 72,
    }.items():
        assert named_registers(listing(instruction)) == registers, instruction


def test_barriers_of_a_kernel() -> None:
    note = """
	.section	.nv.info.{name},"",@"SHT_CUDA_INFO"
	.sectionflags	@""
	//----- nvinfo : EIATTR_NUM_BARRIERS
	.align		4
        /*0040*/ 	.byte	0x02, 0x4c
        /*0042*/ 	.byte	0x{count}
	.zero		1
	.section	.text.{name}
"""
    both = note.format(name="first", count="10") + note.format(name="second", count="02")
    assert [barriers(both, name) for name in ("first", "second", "third")] == [16, 2, 0]
