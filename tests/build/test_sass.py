"""The check of machine code for operands that are overwritten finds them, along every path."""

from __future__ import annotations

import pytest

from tests.build.sass import overwritten_operands, parse

PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR8].tnspB, R24, gsb0 ;"
OTHER = "HGMMA.64x128x16.F32.BF16 R88, gdesc[UR20], R88, gsb0 ;"
WRITE = "F2FP.BF16.F32.PACK_AB R154, R89, R88 ;"


def listing(*instructions: str) -> str:
    return "\n".join(f"        /*{16 * place:04x}*/  {text}" for place, text in enumerate(instructions))


@pytest.mark.parametrize(
    "instructions",
    [
        (PRODUCT, WRITE, "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"),
        (PRODUCT, "LDS.128 R152, [R3] ;", "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"),
        (PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;", WRITE),
        (PRODUCT, "@P0 BRA 0x30 ;", "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", WRITE, "EXIT ;"),
        (WRITE, PRODUCT, "@!P1 BRA 0x0 ;", "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "EXIT ;"),
    ],
)
def test_an_operand_that_is_overwritten_is_found(instructions: tuple[str, ...]) -> None:
    assert list(overwritten_operands(parse(listing(*instructions))))


@pytest.mark.parametrize(
    "instructions",
    [
        (PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", WRITE),
        (PRODUCT, OTHER, "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;", WRITE),
        (PRODUCT, "F2FP.BF16.F32.PACK_AB R156, R153, R152 ;", "STS.128 [R152], R152 ;", "EXIT ;", WRITE),
        (WRITE, OTHER, WRITE, "EXIT ;"),
    ],
)
def test_other_registers_and_later_writes_are_fine(instructions: tuple[str, ...]) -> None:
    assert not list(overwritten_operands(parse(listing(*instructions))))
