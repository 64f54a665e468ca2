"""Everything that needs a GPU, in one command: build, parity, sanitizer, benchmarks.

Usage: python -m benchmarks.gpu --out FOLDER
Writes parity.json (which backend passed on which capability; the evidence that `auto` follows
once it is committed under benchmarks/results), ops.json and log.txt. Without a GPU it says so
and succeeds.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from . import harness
from .ops import temporal_median

BENCHMARKS = [temporal_median]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device, so there is nothing to measure here.")
        print("On a machine with one: make gpu PYTHON=python3 OUT=results")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    failed = run(log, sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    if failed:
        return failed
    device = torch.device("cuda")
    parity = run(log, sys.executable, "-m", "pytest", "tests/ops", f"--junitxml={out}/parity.xml")
    record = {"environment": harness.environment(device), "passed": passed(out / "parity.xml")}
    write(out / "parity.json", record)
    if sanitizer := shutil.which("compute-sanitizer"):
        command = [sanitizer, "--error-exitcode=9", sys.executable, "-m", "pytest", "tests/ops"]
        parity |= run(log, *command, "-k", "parity and cuda and position")
    rows = [row for module in BENCHMARKS for row in module.rows(device)]
    write(out / "ops.json", {"environment": harness.environment(device), "rows": rows})
    for row in rows:
        seconds = row["seconds"]["median"] * 1e6 if row["seconds"] else float("nan")
        print(f"{row['op']} {row['shape']} {row['name']}: {seconds:.1f} us, "
              f"{row['of_floor'] or 0:.0%} of the floor")  # fmt: skip
    return parity


def run(log: Path, *command) -> int:
    """Run a command from the repository's root, its output shown and kept."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=harness.ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(done.stdout[-3000:])
    with log.open("a") as file:
        file.write(f"$ {' '.join(map(str, command))}\n{done.stdout}\nexit {done.returncode}\n")
    return done.returncode


def passed(report: Path) -> dict[str, list[str]]:
    """Backends of each op all of whose parity cases on a CUDA device ran and passed."""
    from xml.etree import ElementTree

    outcome: dict[tuple[str, str], bool] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        op = case.get("classname").rsplit(".", 1)[-1].removeprefix("test_")
        for backend in ("triton", "cuda"):
            if f"{backend}-cuda-" in case.get("name"):
                good = not any(child.tag in ("failure", "error", "skipped") for child in case)
                outcome[op, backend] = outcome.get((op, backend), True) and good
    ops = sorted({op for op, _ in outcome})
    return {op: [b for b in ("triton", "cuda") if outcome.get((op, b))] for op in ops}


def write(path: Path, record: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
