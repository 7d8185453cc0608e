"""What machine code says of a kernel, read with the disassembler that comes with Triton: on any machine, for Hopper."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
RESULTS = Path(__file__).parent / "results"
# What is counted, by prefix of the instruction; the longest that fits counts.
INSTRUCTIONS = (
    "HGMMA", "QGMMA", "HMMA", "QMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDG.E.128", "LDG", "STG.E.128", "STG", "LDL",
    "STL", "F2F.BF16",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What the machine code of one variant says."""

    kernel: str
    variant: str
    registers: int
    shared: int  # bytes, of a block
    spills: int  # bytes of stack
    blocks: int  # that an SM of sm_90 holds at once
    instructions: Mapping[str, int]
    flow: str = ""  # what ``machine_flow`` reads, in words

    def line(self) -> str:
        counts = " ".join(f"{name}:{count}" for name, count in self.instructions.items())
        return (
            f"{self.kernel:<24} regs {self.registers:>3}  shared {self.shared:>6}  spills {self.spills}  "
            f"blocks/SM {self.blocks:>2}  {counts}  {self.flow + '  ' if self.flow else ''}| {self.variant}"
        )


def blocks_per_sm(registers: int, shared: int, warps: int) -> int:
    """How many blocks an SM of sm_90 holds: 64 Ki registers given out by 256 a warp, 64 warps, 32 blocks, 228 KiB with
    1 KiB a block.
    """
    per_warp = -(-registers * 32 // 256) * 256
    return min(32, 64 // warps, 65536 // (per_warp * warps), (228 << 10) // (shared + 1024))


def tool(name: str, *args: str, cwd: Path | None = None) -> str:
    """What one of ``TOOLS`` prints."""
    return subprocess.run([str(TOOLS / name), *args], capture_output=True, text=True, check=True, cwd=cwd).stdout


def count_instructions(code: str) -> dict[str, int]:
    """How many of each of ``INSTRUCTIONS`` a listing of nvdisasm has."""
    counts: Counter[str] = Counter()
    for word in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE):
        name = next((prefix for prefix in INSTRUCTIONS if word.startswith(prefix)), None)
        if name in ("LDG", "STG") and ".128" in word:
            name += ".E.128"
        if name is not None:
            counts[name] += 1
    return {name: counts[name] for name in INSTRUCTIONS if name in counts}


def read_usage(listing: str) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL from what cuobjdump says of one kernel."""
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", listing)}


def differs(stored: Path, report: Callable[[], list[str]], write: bool) -> bool:
    """Print a report. Store it if ``write``, otherwise say whether it is another than the stored one."""
    text = "\n".join(report()) + "\n"
    print(text, end="")
    if write:
        stored.write_text(text)
    elif not stored.exists() or stored.read_text() != text:
        print(f"differs from {stored}: if that is meant, store it with --write", file=sys.stderr)
        return True
    return False
