"""The ahead-of-time gate: parsing of disassembly and reports, and blocks per multiprocessor."""

import pytest

from bench.aot.binary import OPCODE, access_bytes, amd_figures, products_in_flight, usage_of
from bench.aot.occupancy import blocks_per_multiprocessor


def test_disassembly_gives_opcodes_and_access_widths() -> None:
    code = """
    .L_x_1:
        /*1a40*/              @!P0 STL.128 [R1+0x8], R4 ;
        /*1a50*/                   LDL.LU R2, [R1] ;
        /*1a60*/             @!UPT UTMALDG.2D [UR8], [UR4], desc[URZ] ;
        /*1a70*/              @P1  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4].tnspB, R24 ;
                                   LDL.64 R2, [R1+0x10] ;
        /* 0x000fe200078e00ff */
    """
    opcodes = OPCODE.findall(code)
    assert [name for name, _ in opcodes] == ["STL", "LDL", "UTMALDG", "HGMMA", "LDL"]
    assert [access_bytes(suffixes) for name, suffixes in opcodes if name in ("STL", "LDL")] == [16, 4, 8]
    assert access_bytes(".U8") == 1 and access_bytes("") == 4


def test_products_that_run_into_the_next_iteration_are_in_flight_together() -> None:
    code = """
    .L_x_1:
        /*0010*/                   HGMMA.64x32x16.F32.BF16 R88, gdesc[UR12], RZ, !UPT ;
        /*0020*/                   HGMMA.64x32x16.F32.BF16 R88, gdesc[UR12], R88, gsb0 ;
        /*0030*/                   MUFU.EX2 R1, R2 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/                   MUFU.EX2 R3, R4 ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, R104, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0070*/              @!P0 BRA `(.L_x_1) ;
        /*0080*/                   MUFU.EX2 R5, R6 ;
        /*0090*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00a0*/                   MUFU.RCP R5, R6 ;
    .L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
    """
    assert products_in_flight(code) == (2, 2)
    assert products_in_flight(code.replace("@!P0 BRA `(.L_x_1)", "NOP")) == (1, 2)
    assert products_in_flight(code.replace("0x0", "0x1", 1)) == (3, 3)
    assert products_in_flight("") == (0, 0)


def test_usage_of_a_report_without_the_kernel_raises() -> None:
    assert usage_of(" Function f:\n  REG:174 STACK:8 LOCAL:0 CONSTANT[0]:424\n")["STACK"] == 8
    with pytest.raises(ValueError, match="no resource usage"):
        usage_of("Resource usage:\n")


def test_amd_figures_of_an_assembly_follow_its_metadata() -> None:
    text = """
\tv_mfma_f32_32x32x8_bf16 a
\tglobal_atomic_add_f32 v
  - .agpr_count:     4
    .group_segment_fixed_size: 256
    .private_segment_fixed_size: 12
    .sgpr_count:     62
    .sgpr_spill_count: 3
    .vgpr_count:     126
    .vgpr_spill_count: 2
"""

    class Metadata:
        shared, num_warps = 1024, 8

    assert amd_figures("gfx942", text, Metadata) == {
        "registers": 126,
        "spill_bytes": 8,
        "local_bytes": 12,
        "shared_bytes": 1280,
        "warps": 8,
        "blocks": 2,
        "instructions": {"MFMA": 1, "atomics": 1},
        "scalar_registers": 62,
        "scalar_spills": 3,
    }


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "columns", "expected"),
    [
        ("sm_90", 4, 128, 0, 0, 4),  # 65,536 registers
        ("sm_90", 4, 129, 0, 0, 3),  # come in eights
        ("sm_90", 8, 255, 0, 0, 1),
        ("sm_90", 12, 168, 200 * 1024, 0, 1),
        ("sm_90", 4, 16, 0, 0, 16),  # 2,048 threads
        ("sm_90", 1, 16, 0, 0, 32),  # 32 blocks
        ("sm_90", 4, 64, 113 * 1024, 0, 2),  # a kibibyte a block is the system's
        ("sm_90", 4, 64, 113 * 1024 + 1, 0, 1),
        ("sm_90", 4, 64, 227 * 1024, 0, 1),
        ("sm_90", 4, 64, 227 * 1024 + 1, 0, 0),
        ("sm_80", 4, 64, 163 * 1024, 0, 1),
        ("sm_80", 4, 64, 163 * 1024 + 1, 0, 0),
        ("sm_90", 32, 128, 0, 0, 0),  # 1,024 threads of 128 registers are twice too many
        ("sm_100", 4, 64, 1024, 256, 2),
        ("gfx942", 4, 128, 0, 0, 4),
        ("gfx942", 4, 512, 32 * 1024, 0, 1),
        ("gfx942", 4, 64, 32 * 1024, 0, 2),
        ("gfx942", 4, 64, 64 * 1024 + 1, 0, 0),
    ],
)
def test_blocks_per_multiprocessor_of_registers_and_shared_memory(
    target: str, warps: int, registers: int, shared: int, columns: int, expected: int
) -> None:
    fits = blocks_per_multiprocessor(
        target, warps=warps, registers=registers, shared_bytes=shared, tensor_memory_columns=columns
    )
    assert fits == expected
