"""What a kernel's machine code does in the order in which it runs: what is reached before the wait for the kernel
before, what the exponentials of a loop overlap with, and how many registers each role of a block uses. Read from a
listing of nvdisasm for sm_90; standard library only.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping

# Global memory by any way; what reads or writes it before the kernel before has ended is listed.
GLOBAL = ("UTMALDG", "UTMASTG", "UBLKCP", "LDGSTS", "LDG", "STG", "LD", "ST", "ATOMG", "ATOM", "RED")
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);", re.MULTILINE)
_SIZES = {"64": 2, "96": 3, "128": 4}


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a listing."""

    is_conditional: bool
    name: str
    operands: str

    @property
    def target(self) -> str | None:
        """The label that it may go to."""
        match = re.search(r"`\((\S+?)\)", self.operands)
        return match[1] if match else None

    @property
    def highest_register(self) -> int:
        """The highest general register that it reads or writes, -1 if none.

        Operands of several registers are counted whole.
        """
        highest = -1
        for index, operand in enumerate(self.operands.split(",")):
            for number, suffix in re.findall(r"\bR(\d+)((?:\.64)?)", operand):
                highest = max(highest, int(number) + self._width(index, suffix == ".64") - 1)
        return highest

    def _width(self, operand: int, is_address: bool) -> int:
        """Registers of the operand at this place."""
        if is_address:
            return 2
        words = self.name.split(".")
        if words[0] in ("HGMMA", "QGMMA"):
            columns = int(words[1].split("x")[1])
            return 4 if operand == 1 else columns // 2
        if words[0] == "HMMA":
            return (4, 4, 2, 4)[operand] if operand < 4 else 1
        if words[0] in ("LDSM", "STSM"):
            return {"2": 2, "4": 4}.get(words[-1], 1) if operand == (words[0] == "STSM") else 1
        size = next((_SIZES[word] for word in words if word in _SIZES), 1)
        if words[0] in ("LDG", "LDS", "LDC", "LD", "ATOM", "ATOMG"):
            return size if operand == 0 else 1
        if words[0] in ("STG", "STS", "ST"):
            return size if operand == 1 else 1
        if words[0] == "IMAD" and "WIDE" in words:
            return 2 if operand in (0, 3) else 1
        return 1


@dataclasses.dataclass(frozen=True, slots=True)
class Flow:
    """What ``read_flow`` finds out."""

    waits: int  # for products of a warpgroup
    exponentials: tuple[int, ...]  # between the last products and the wait for all of them, of each such wait
    early: Mapping[str, int]  # accesses to global memory that are reached without a wait for the kernel before
    roles: tuple[tuple[int, int], ...]  # (registers used, registers had) after each setmaxnreg, fewest first

    def words(self) -> str:
        """As in a line of the report."""
        early = ",".join(f"{name}:{count}" for name, count in self.early.items())
        exponentials = ",".join(map(str, self.exponentials))
        roles = ",".join(f"{used}/{had}" for used, had in self.roles)
        return f"waits {self.waits}  exps {exponentials or '-'}  early {early or '-'}  roles {roles or '-'}"


def read_flow(code: str) -> Flow:
    """``code``: one kernel's part of a listing, from its first label on."""
    instructions, labels = _parse(code)
    names = [each.name for each in instructions]
    is_wait = [name.startswith("WARPGROUP.DEPBAR") for name in names]
    exponentials = []
    if any(name.startswith("MUFU.EX2") for name in names):
        for index in (i for i, waits in enumerate(is_wait) if waits and "0x0" in instructions[i].operands):
            products = max((i for i in range(index) if names[i].startswith(("HGMMA", "QGMMA"))), default=index)
            exponentials.append(sum(name.startswith("MUFU.EX2") for name in names[products:index]))
    early: Counter[str] = Counter()
    for index in _reached(instructions, labels, 0, stop="ACQBULK"):
        word = names[index].split(".")[0]
        if word in GLOBAL:
            early[word] += 1
    roles = []
    for index, name in enumerate(names):
        if name.startswith("USETMAXREG"):
            had = int(instructions[index].operands.split(",")[-1], 16)
            after = _reached(instructions, labels, index + 1, stop="USETMAXREG")
            roles.append((1 + max(instructions[i].highest_register for i in after), had))
    return Flow(
        waits=sum(is_wait),
        exponentials=tuple(exponentials),
        early={name: early[name] for name in GLOBAL if early[name]},
        roles=tuple(sorted(roles, key=lambda role: role[1])),
    )


def barriers(listing: str, symbol: str) -> int:
    """Named barriers of a block, from the notes (.nv.info) on a kernel in the whole listing; 0 where they say
    nothing.
    """
    notes = re.search(rf"\.section\s+\.nv\.info\.{re.escape(symbol)},(.*?)(?=\n\s*\.section\s|\Z)", listing, re.DOTALL)
    match = re.search(
        r"EIATTR_NUM_BARRIERS\s.*?0x02, 0x4c\s.*?\.byte\s+0x([0-9a-f]+)", notes[1] if notes else "", re.DOTALL
    )
    return int(match[1], 16) if match else 0


def named_registers(code: str) -> int:
    """One more than the highest register that a kernel's code names."""
    return 1 + max((each.highest_register for each in _parse(code)[0]), default=-1)


def _parse(code: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"(\S+):\s*$", line):
            labels[label[1]] = len(instructions)
        elif match := _LINE.match(line):
            instructions.append(Instruction(match[2] is not None, match[3], match[4]))
    return instructions, labels


def _reached(instructions: list[Instruction], labels: Mapping[str, int], start: int, stop: str) -> Iterable[int]:
    """Indices of the instructions that may run after ``start`` without one named ``stop`` before them."""
    seen: set[int] = set()
    open_ends = [start]
    while open_ends:
        index = open_ends.pop()
        while index < len(instructions) and index not in seen:
            each = instructions[index]
            if each.name.startswith(stop):
                break
            seen.add(index)
            if each.target is not None and each.name.startswith(("BRA", "CALL", "WARPSYNC")):
                open_ends.append(labels[each.target])
            if _ends(each):
                break
            index += 1
    return seen


def _ends(each: Instruction) -> bool:
    """Whether what follows in the listing is not what runs after it."""
    if each.is_conditional:
        return False
    if each.name == "BRA":  # of a predicate among its operands it may go on
        return re.search(r"\bU?P\d", each.operands.split("`")[0]) is None
    return each.name in ("EXIT", "KILL") or each.name.startswith("RET")
