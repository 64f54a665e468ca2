"""Everything that needs a GPU, in one command: build, parity, sanitizer, benchmarks.

Usage: python -m benchmarks.gpu --out FOLDER [--minutes 9.5] [--steps build,parity,...]
           [--tests EXPRESSION]
Writes parity.json (which backend passed on which capability; the evidence that `auto` follows
once it is committed under benchmarks/results), ops.json, ops.md, ops.png, the
like for pretraining and the encoder, and log.txt, each as soon as there is something to write.
Pretraining and the encoder run on the kernels whether or not there is evidence, unless
TIMO_BACKEND says otherwise. Without a GPU it says so and succeeds.
"""

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import zip_longest
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from . import harness, report, runner
from .ops import OPS, load

STEPS = ("build", "parity", "sanitizer", "benchmarks", "encoder", "pretraining")
# Of the time that is left when a step begins, it may take this share.
SHARE = {"build": 0.4, "parity": 0.55, "sanitizer": 0.25, "benchmarks": 0.6, "encoder": 0.2}
KERNELS = "cuda,triton,cpp,reference"  # what TIMO_BACKEND is for whole models
SHORTEST = 10.0  # seconds that a command gets at least
TIMED_OUT = 124


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=9.5, help="time for all steps together")
    parser.add_argument("--steps", default=",".join(STEPS), help="which of them, in their order")
    parser.add_argument(
        "--tests", help="of parity only these, as pytest's -k; results of others stay"
    )
    options = parser.parse_args()
    steps = options.steps.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"--steps names {sorted(unknown)}; known are {', '.join(STEPS)}")
    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device, so there is nothing to measure here.")
        print("On a machine with one: make gpu PYTHON=python3 OUT=results")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    device = torch.device("cuda", torch.cuda.current_device())
    result = 0
    for step in (s for s in STEPS if s in steps):
        left = end - time.monotonic()
        last = not set(STEPS[STEPS.index(step) + 1 :]) & set(steps)
        limit = left - 20 if last else left * SHARE[step]
        say(f"{step}: at most {limit:.0f} s")
        chosen = (options.tests,) if step == "parity" else ()
        code = globals()[step](options.out, device, limit, *chosen)
        say(f"{step}: {'ok' if code == 0 else f'exit code {code}'}")
        if step == "build" and code:
            return code
        result = result or code
    return result


def build(out: Path, device: torch.device, limit: float) -> int:
    """The compiled module, for this GPU alone unless TIMO_CUDA_ARCHS asks for others."""
    major, minor = torch.cuda.get_device_capability(device)
    arch = f"{major}{minor}{'a' if major == 9 else ''}"
    code = run(
        out, limit, sys.executable, "setup.py", "-q", "build_ext", "--inplace",
        TIMO_CUDA_ARCHS=os.environ.get("TIMO_CUDA_ARCHS", arch),
    )  # fmt: skip
    importlib.invalidate_caches()  # timo.kernels may be there only now
    return code


def parity(out: Path, device: torch.device, limit: float, tests: str | None = None) -> int:
    """Tests of the ops that run on the GPU; what passed is the evidence that `auto` follows.

    Of some `tests` alone, earlier results of other ops stay if machine and commit are the same.
    """
    there = out / "parity.xml"
    there.unlink(missing_ok=True)
    chosen = "(cuda or triton) and not emulated" + (f" and ({tests})" if tests else "")
    # Each holds a context on the GPU and compiles kernels.
    workers = ["-n", str(min(16, os.cpu_count() or 1)), "--dist", "worksteal"]
    workers = workers if importlib.util.find_spec("xdist") else []
    code = run(
        out, limit, sys.executable, "-m", "pytest", "tests/ops", "-k", chosen,
        f"--junitxml={there.resolve()}", "--durations=15", *workers, OMP_NUM_THREADS="1",
    )  # fmt: skip
    complete = code in (0, 1) and there.exists()
    record: dict[str, Any] = {
        "environment": harness.environment(device),
        "complete": complete,
        "passed": passed(there) if complete else {},
        "cases": cases(there) if there.exists() else {},
    }
    before = out / "parity.json"
    if tests and before.exists():
        earlier = json.loads(before.read_text())
        if earlier["environment"] == record["environment"]:
            record["complete"] &= earlier["complete"]
            for key in ("passed", "cases"):
                record[key] = earlier[key] | record[key]
    report.write_json(before, record)
    there.unlink(missing_ok=True)  # log.txt has what failed
    for proof, (good, bad) in record["cases"].items():
        say(f"  {proof}: {good} passed, {bad} did not")
    return code


def sanitizer(out: Path, device: torch.device, limit: float) -> int:
    """A part of the parity tests under compute-sanitizer, with every block allocated apart."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(tool):
        say("  compute-sanitizer was not found: skipped")
        return 0
    code = run(
        out, limit, tool, "--error-exitcode=9", sys.executable, "-m", "pytest", "tests/ops", "-x",
        "-p", "no:cacheprovider", "-k", "test_parity and position and cuda",
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )  # fmt: skip
    return 0 if code == TIMED_OUT else code  # what it had time for was clean


def benchmarks(out: Path, device: torch.device, limit: float) -> int:
    """The registry in bfloat16: the most telling shapes first, compiled baselines last."""
    deadline = time.monotonic() + limit - 30  # nothing is begun in the last half minute
    environment, dtype = harness.environment(device), torch.bfloat16
    shapes = [[(op, shape) for shape in load(op).SHAPES] for op in OPS]
    turns = [case for turn in zip_longest(*shapes) for case in turn if case]
    rows: list[dict] = []
    for compiled in (False, True):
        for op, shape in turns:
            if time.monotonic() > deadline:
                say("  the time is over: what follows was left out")
                break
            problem = load(op).problem(shape, dtype, device)
            names = [*problem.calls, *problem.skipped]
            names = [name for name in dict.fromkeys(names) if ("compiled" in name) == compiled]
            for row in runner.run(
                op, shape, dtype, device, problem, names=names, budget=0.2, deadline=deadline
            ):
                rows.append(row)
                say(f"  {' '.join(report.cells(row | {'speedup': {}})[:3])}  {op} {shape}")
            del problem
            torch.cuda.empty_cache()
            report.write(out, environment, rows, plot=False)
    report.write(out, environment, rows)
    wrong = [row for row in rows if row["ours"] and (row["note"] or "").startswith("wrong")]
    return 1 if wrong else 0


def encoder(out: Path, device: torch.device, limit: float) -> int:
    """Forward and backward of base at 512 x 512 and 38 dates, with and without checkpointing."""
    return models(out, limit, "encoder")


def pretraining(out: Path, device: torch.device, limit: float) -> int:
    """Steps of tiny and base, the fast path against the dense form."""
    return models(out, limit, "pretraining", "--models", "timo_base,timo_tiny", "--compile")


def models(out: Path, limit: float, module: str, *options: str) -> int:
    """A benchmark of whole models in a process of its own; rows stay if time runs out."""
    command = (sys.executable, "-m", f"benchmarks.{module}", "--out", out.resolve(), *options)
    code = run(out, limit, *command, TIMO_BACKEND=os.environ.get("TIMO_BACKEND", KERNELS))
    return 0 if code == TIMED_OUT and (out / f"{module}.json").exists() else code


def run(out: Path, limit: float, *command, **variables: str) -> int:
    """Run a command from the repository's root; its output goes to log.txt, its end is shown."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    log = out / "log.txt"
    with log.open("a") as file:
        file.write(f"$ {' '.join(map(str, command))}\n")
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command, cwd=harness.ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(max(SHORTEST, limit))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest still writes its report
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            code = TIMED_OUT
        file.write(f"exit {code}\n")
    with log.open() as file:
        file.seek(start)
        say(file.read()[-1500:])
    return code


def passed(path: Path) -> dict[str, list[str]]:
    """Backends of each op whose tests on a GPU ran and passed, all of them."""
    proven: dict[str, list[str]] = {}
    for proof, (_, bad) in cases(path).items():
        op, backend = proof.split()
        proven.setdefault(op, []).extend([] if bad else [backend])
    return proven


def cases(path: Path) -> dict[str, list[int]]:
    """ "op backend": tests that passed, and that did not, of a JUnit report.

    Tests say what they are evidence for in a property (tests/ops/conftest.py).
    """
    counts: dict[str, list[int]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        bad = any(child.tag in ("failure", "error", "skipped") for child in case)
        for item in case.iter("property"):
            if item.get("name") == "proves":
                counts.setdefault(item.attrib["value"], [0, 0])[bad] += 1
    return dict(sorted(counts.items()))


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
