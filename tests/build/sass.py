"""Hazards of warpgroup products (HGMMA) in the assembly that cuobjdump prints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_FROM_REGISTERS = re.compile(r"R\d+, R(\d+), gdesc")
_DESTINATION = re.compile(r"(?:(?:PT|P\d), )?R(\d+)\b")
# Their first register is read, or they have no result in general registers.
_WITHOUT_RESULT = (
    "ST|BAR|SYNCS|BRA|EXIT|RET|CALL|NOP|WARP|UTMA|MEMBAR|FENCE|BSSY|BSYNC|ISETP|FSETP|PLOP3|VOTE|USETMAX|HGMMA|RED|R2UR"
)
_MOST_GROUPS = 4  # of products under way that are told apart


@dataclass(frozen=True, slots=True)
class Instruction:
    """predicate: what it runs under, "" if always. name: with its modifiers, such as "LDS.64"."""

    address: int
    predicate: str
    name: str
    arguments: str

    @property
    def written(self) -> range:
        """Numbers of the general registers that it writes; those of HGMMA, which come later, are left out."""
        match = _DESTINATION.match(self.arguments)
        if match is None or re.match(_WITHOUT_RESULT, self.name):
            return range(0)
        width = 4 if ".128" in self.name else 2 if ".64" in self.name or ".WIDE" in self.name else 1
        return range(int(match[1]), int(match[1]) + (2 if self.name == "CS2R" else width))

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        match = re.search(r"0x([0-9a-f]+)$", self.arguments) if self.name.startswith("BRA") else None
        return int(match[1], 16) if match is not None else None

    @property
    def ends_the_path(self) -> bool:
        """Nothing runs after it."""
        never = self.name.startswith(("EXIT", "RET")) or (self.name == "BRA" and self.arguments.startswith("0x"))
        return never and not self.predicate


def parse(listing: str) -> list[Instruction]:
    """The instructions of one kernel."""
    return [
        Instruction(int(match[1], 16), match[2] or "", match[3], match[4]) for match in _INSTRUCTION.finditer(listing)
    ]


def overwritten_operands(code: list[Instruction]) -> Iterator[str]:
    """Instructions that write registers of an operand A before the product that reads them has been waited for.

    The products read them until they are done, whatever the compiler takes for free in the meantime.
    """
    places = {instruction.address: index for index, instruction in enumerate(code)}
    for index, product in enumerate(code):
        match = _FROM_REGISTERS.match(product.arguments) if product.name.startswith("HGMMA") else None
        if match is None:
            continue
        operand = range(int(match[1]), int(match[1]) + 4)
        for later in _before_the_wait(code, places, index):
            if set(later.written) & set(operand):
                yield f"{later.address:#x} {later.name} {later.arguments}: an operand of {product.address:#x}"


def _before_the_wait(code: list[Instruction], places: dict[int, int], product: int) -> Iterator[Instruction]:
    """Everything that may run after a product until it is done, along all paths."""
    # Groups of products that began after the product's own, which has not ended yet at -1.
    paths = [(product + 1, 0 if "gsb0" in code[product].arguments else -1)]
    seen: set[tuple[int, int]] = set()
    while paths:
        index, groups = paths.pop()
        while index < len(code) and (index, groups) not in seen:
            seen.add((index, groups))
            instruction = code[index]
            yield instruction
            if instruction.name == "WARPGROUP.DEPBAR.LE" and groups >= int(instruction.arguments.split("0x")[1], 16):
                break
            if instruction.name.startswith("HGMMA") and "gsb0" in instruction.arguments:
                groups = min(groups + 1, _MOST_GROUPS)
            if instruction.target in places:
                paths.append((places[instruction.target], groups))
            if instruction.ends_the_path:
                break
            index += 1
