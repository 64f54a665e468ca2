"""Finds `wgmma` descriptors that ptxas takes from a register which holds something else.

A descriptor of shared memory is made of constants, the number of the warp and the address of shared
memory; a kernel's parameters never enter one. In machine code of ptxas 12.8 for sm_90a they
sometimes do: a register that was to be copied from another keeps a stride it held before, and the
product reads what happens to lie there. Of 600 compiled variants of the spatial kernels one was so,
for validity by position, 17 dates and head dimension 8.
"""

import re
import subprocess
import tempfile
from pathlib import Path

INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)\s+(.*?);")
UNIFORM = re.compile(r"\bUR(\d+)\b")


def foreign_descriptors(disassembly: str) -> list[str]:
    """Products (HGMMA) of an sm_90a kernel, in order of address, one of whose descriptors derives
    from a parameter of the kernel or was never written.
    """
    foreign, found = set(range(63)), []
    for name, operands in INSTRUCTION.findall(disassembly):
        if name.startswith("HGMMA"):
            first = int(re.search(r"gdesc\[UR(\d+)\]", operands)[1])
            # Descriptors of the left and the right operand; the left one may be in registers.
            left = re.match(r"R\d+, gdesc", operands) is not None
            if foreign & set(range(first if left else first + 2, first + 4)):
                found.append(f"{name} {operands}")
            continue
        target, _, sources = operands.partition(",")
        if not re.fullmatch(r"UR\d+", target):
            continue
        count = 2 if ".64" in name or "WIDE" in name else 1  # registers of an operand
        targets, read = (
            {int(n) + i for n in UNIFORM.findall(text) for i in range(count)}
            for text in (target, sources)
        )
        if name.startswith("ULDC") or (read & foreign and not name.startswith(("R2UR", "S2UR"))):
            foreign |= targets
        else:
            foreign -= targets
    return found


def disassemble(cubin: bytes, tool: str) -> str:
    """Of a compiled kernel, by nvdisasm."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout
