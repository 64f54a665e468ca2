"""Registers, shared memory and spills of every CUDA kernel, from the reports that a build keeps.

Usage: python -m tests.cuda_resources  -> writes tests/cuda_resources.json from build/obj-*-cuda
after `TIMO_CUDA=1 python setup.py build_ext --inplace`.
"""

import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_suffix(".json")
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def reports() -> list[Path]:
    """What ptxas said of each source, beside its object; of the newest build."""
    folders = sorted(ROOT.glob("build/obj-*-cuda"), key=lambda p: p.stat().st_mtime)
    return sorted(folders[-1].glob("*.ptxas")) if folders else []


def stale(paths: list[Path]) -> bool:
    """Whether a CUDA source has changed since the last of the reports."""
    sources = [*ROOT.glob("csrc/cuda/*"), ROOT / "csrc/ops.h"]
    return max(p.stat().st_mtime for p in sources) > max(p.stat().st_mtime for p in paths)


def measured(paths: list[Path]) -> dict[str, dict[str, dict[str, int]]]:
    """{kernel: {architecture: {registers, shared, spills}}}; shared memory is the static part."""
    entries = [m for path in paths for m in ENTRY.finditer(path.read_text())]
    names = readable([m["name"] for m in entries])
    table: dict[str, dict[str, dict[str, int]]] = {}
    for name, m in zip(names, entries):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        table.setdefault(name, {})[m["arch"]] = {
            "registers": int(m["registers"]),
            "shared": int(shared[1]) if shared else 0,
            "spills": int(m["stores"]) + int(m["loads"]),
        }
    return {name: dict(sorted(table[name].items())) for name in sorted(table)}


def readable(names: list[str]) -> list[str]:
    """Mangled names as `kernel<types>`."""
    said = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = [re.sub(r"\(anonymous namespace\)::|timo::|unsigned ", "", name) for name in said]
    return [re.sub(r"^void |\(.*$", "", name) for name in names]


def nvcc_release(paths: list[Path]) -> str:
    """Release of the compiler that made the reports, as "13.0"."""
    (release,) = {re.search(r"release ([\d.]+)", path.read_text())[1] for path in paths}
    return release


if __name__ == "__main__":
    found = reports()
    record = {"nvcc": nvcc_release(found), "kernels": measured(found)}
    # One line an architecture.
    text = re.sub(r"\{\s+(\"registers[^}]*?)\s+\}", r"{\1}", json.dumps(record, indent=1))
    TABLE.write_text(re.sub(r",\s+(?=\"(shared|spills))", ", ", text) + "\n")
