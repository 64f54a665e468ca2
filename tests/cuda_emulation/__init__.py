"""The CUDA kernels, compiled for the CPU by g++ and cuda_runtime.h, as a module like `timo._C`.

Its functions `<op>_cpu` run the kernels of csrc/cuda on tensors of the CPU. What it cannot show is
speed, registers, and what depends on threads that run at the same time.
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import re
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

from tests.conftest import REPOSITORY

HERE = Path(__file__).resolve().parent
BUILD = REPOSITORY / "build" / "cuda-emulation"
KERNELS = sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu"))
BINDINGS = [REPOSITORY / "csrc" / name for name in ("bind.cpp", "bind_units.cpp")]
# Kernels are checked for addresses that are not aligned, indices beyond arrays and overflow; a
# failed check is an illegal instruction, which cuda_runtime.h turns into an exception.
CHECKS = (
    "-fsanitize=alignment,bounds,signed-integer-overflow,shift,integer-divide-by-zero "
    "-fsanitize-undefined-trap-on-error"
)
# Without fortified functions, on by default in some distributions: they end at a jump off a stack.
FLAGS = (
    "-std=c++17 -O1 -U_FORTIFY_SOURCE -fPIC -fvisibility=hidden -Wall -Wextra -Wno-unknown-pragmas"
)
ORDERS = ("forward", "reverse", "shuffled")


def rewritten(text: str) -> str:
    """A .cu file as C++: launches and dynamic shared memory are calls into cuda_runtime.h."""
    text = re.sub(
        r"extern __shared__ ([\w ]+) (\w+)\[\];",
        r"auto* \2 = static_cast<\1*>(cuda_emulation::dynamic_shared());",
        text,
    )
    text = re.sub(
        r"(\w+(?:<[^<>;]*>)?)\s*<<<(.*?)>>>", r"cuda_emulation::configure(\1, \2)", text, flags=re.S
    )
    assert "<<<" not in text and "extern __shared__" not in text
    return text


def compile_unit(source: Path, headers: str) -> Path:
    """Object of a source, made once for each state of the source and all headers."""
    import pybind11

    text, flags = source.read_text(), FLAGS
    if source.suffix == ".cu":
        text, flags = rewritten(text), f"{FLAGS} {CHECKS}"
    state = hashlib.sha256("\n".join((text, headers, flags)).encode()).hexdigest()[:16]
    out = BUILD / f"{source.name}-{state}.o"
    if out.exists():
        return out
    for old in BUILD.glob(f"{source.name}-*"):
        old.unlink()
    made = out.with_suffix(".cpp")
    made.write_text(f'#line 1 "{source.relative_to(REPOSITORY)}"\n{text}')
    folders = (
        HERE, REPOSITORY / "csrc", REPOSITORY / "csrc/cuda", pybind11.get_include(),
        sysconfig.get_paths()["include"],
    )  # fmt: skip
    run(*flags.split(), *(f"-I{folder}" for folder in folders), "-c", made, "-o", out)
    return out


def run(*arguments: str | Path) -> None:
    """The compiler; its result, the last argument, is there whole or not at all."""
    *others, out = arguments
    part = Path(f"{out}.part")
    done = subprocess.run([compiler(), *others, part], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    part.rename(out)


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def link(*sources: Path) -> Path:
    """Shared library of sources, of which only those are compiled that have changed."""
    BUILD.mkdir(parents=True, exist_ok=True)
    csrc = REPOSITORY / "csrc"
    headers = sorted((*HERE.glob("*.h"), *csrc.glob("*.h"), *csrc.glob("cuda/*.h")))
    text = "\n".join(path.read_text() for path in headers)
    with (BUILD / "lock").open("w") as lock:  # test processes run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        objects = [compile_unit(source, text) for source in sources]
        state = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()[:16]
        library = BUILD / f"{sources[-1].stem}-{state}.so"
        if not library.exists():
            for old in BUILD.glob(f"{sources[-1].stem}-*.so"):
                old.unlink()
            run("-shared", "-Wl,-Bsymbolic", *objects, "-o", library)
        return library


@cache
def load() -> ModuleType:
    """The module; its attributes are those of `timo._C` built without CUDA."""
    library = link(*KERNELS, *BINDINGS, HERE / "module.cpp")
    spec = importlib.util.spec_from_file_location("tests.cuda_emulation._C", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def set_order(order: str) -> None:
    """Order in which blocks and threads run."""
    ctypes.CDLL(load().__file__).cuda_emulation_order(ORDERS.index(order))
