"""The suite turns red for every fault of tests/mutations.py, planted in a copy of the package.

A few faults run with the suite; TIMO_MUTATIONS=all (`make mutations`) plants all of them.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.mutations import MUTANTS, SAMPLE, Mutant

CHOSEN = [m for m in MUTANTS if os.environ.get("TIMO_MUTATIONS") == "all" or m.name in SAMPLE]


@pytest.fixture(scope="session")
def copy(tmp_path_factory) -> Path:
    """The package and its tests, with the compiled module, in a folder of their own."""
    root = tmp_path_factory.mktemp("mutated")
    leave = shutil.ignore_patterns("__pycache__")
    for name in ("timo", "kernels", "benchmarks", "csrc", "tests"):
        shutil.copytree(REPOSITORY / name, root / name, symlinks=True, ignore=leave)
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    return root


def sources(root: Path, file: str) -> set[str]:
    """What is compiled anew for a change of `file`: itself, or whatever includes it."""
    if not file.endswith(".h"):
        return {file}
    name = f'#include "{file.removeprefix("csrc/")}"'
    users = [path for path in root.glob("csrc/cpu/*") if name in path.read_text()]
    return {s for path in users for s in sources(root, str(path.relative_to(root)))}


def build(root: Path, mutant: Mutant) -> None:
    """Compile what the fault is in, without optimisation, and link it with the other objects."""
    recipes = sorted(REPOSITORY.glob("build/obj-*/build.ninja"), key=os.path.getmtime)
    if not recipes:
        pytest.skip("no objects of the extension: python setup.py build_ext --inplace")
    text = recipes[-1].read_text()
    compiler, linker = re.findall(r"^rule (?:cxx|link)\n  command = (.*)$", text, re.M)
    objects = {
        source: out for out, source in re.findall(r"^build (\S+): \w+ (\S+\.c\w+)$", text, re.M)
    }
    for name in sources(root, mutant.file):
        out = objects[str(REPOSITORY / name)] = str(root / Path(name).with_suffix(".o").name)
        command = compiler.replace(str(REPOSITORY / "csrc"), str(root / "csrc")) + " -O0"
        command = command.replace("$in", str(root / name)).replace("$out", out)
        subprocess.run(command, shell=True, check=True)
    module = next((root / "timo").glob("_C*.so"))
    command = linker.replace("$in", " ".join(objects.values())).replace("$out", str(module))
    subprocess.run(command, shell=True, check=True)


def run(root: Path, selection: tuple[str, ...]) -> subprocess.CompletedProcess:
    """pytest with "NAME=value" put into its environment and the rest as its arguments."""
    own = dict(x.split("=", 1) for x in selection if x.startswith("T"))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON", "TIMO"))}
    kept |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [x for x in selection if not x.startswith("T")]
    return subprocess.run(command, cwd=root, env=kept | own, capture_output=True, text=True)


@pytest.mark.parametrize("selection", dict.fromkeys(m.tests for m in CHOSEN), ids=" ".join)
def test_without_a_fault_the_tests_pass(selection, copy):
    done = run(copy, selection)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("mutant", CHOSEN, ids=lambda m: m.name)
def test_fault_is_found(mutant: Mutant, copy):
    path = copy / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} has changed: {mutant.old!r}"
    module = next((copy / "timo").glob("_C*.so"), None)
    try:
        path.write_text(text.replace(mutant.old, mutant.new))
        if mutant.file.startswith("csrc/cpu"):
            build(copy, mutant)
        done = run(copy, mutant.tests)
        # 1: tests failed. Below 0: the process crashed, as a wrong address may have it.
        assert done.returncode == 1 or done.returncode < 0, (
            f"the fault survives (pytest returned {done.returncode}):\n{done.stdout[-3000:]}"
        )
    finally:
        path.write_text(text)
        if mutant.file.startswith("csrc/cpu"):
            shutil.copy(REPOSITORY / "timo" / module.name, module)
