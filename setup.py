"""Build of `timo._C`: pybind11 without torch headers, with CUDA where nvcc is found.

Environment: TIMO_CUDA=1 makes a missing nvcc an error, TIMO_CUDA=0 leaves CUDA out;
TIMO_CUDA_ARCHS lists architectures ("80;90a;100;120+PTX"); CXX (a gcc), MAX_JOBS as usual.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine() in ("x86_64", "AMD64")  # elsewhere the reference runs, and Triton
CXX_FLAGS = "-O3 -std=c++17 -fPIC -fopenmp -fvisibility=hidden -Wall -Wextra"
NVCC_FLAGS = (
    "-O3 -std=c++17 -lineinfo --expt-relaxed-constexpr -Xptxas -v "
    "-Xcompiler -fPIC,-fvisibility=hidden"
)


# Packages that lie beside timo/ in the repository. A build in place links them into timo/, so that
# the tree can be used without being installed.
FOLDERS = {"timo.kernels": "kernels", "timo.benchmarks": "benchmarks"}


def find_nvcc() -> str | None:
    wanted = os.environ.get("TIMO_CUDA", "auto")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc")
    nvcc = next((c for c in candidates if c and os.path.exists(c)), None)
    if nvcc is None and wanted == "1":
        raise SystemExit("TIMO_CUDA=1 but no nvcc was found: set CUDA_HOME, or TIMO_CUDA=0")
    return nvcc


def cudart_folder(nvcc: str) -> Path:
    roots = (Path(nvcc).resolve().parent.parent, Path("/usr/local/cuda"))
    folders = [root / lib for root in roots for lib in ("lib64", "lib")]
    found = next((f for f in folders if (f / "libcudart_static.a").exists()), None)
    if found is None:
        raise SystemExit(
            f"{nvcc} has no libcudart_static.a beside it: set TIMO_CUDA=0 to build without"
        )
    return found


def gencode() -> str:
    flags = []
    for arch in os.environ.get("TIMO_CUDA_ARCHS", "80;90a;100;120+PTX").split(";"):
        number = arch.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


class BuildWithNinja(build_ext):
    """Compile .cpp and .cu side by side; objects stay in build/, so rebuilds are incremental."""

    def run(self):
        super().run()
        if self.inplace:
            for name, folder in FOLDERS.items():
                link = ROOT / name.replace(".", "/")
                if not link.exists():
                    link.symlink_to(Path("..", folder))

    def build_extension(self, ext):
        import ninja
        import pybind11

        nvcc = find_nvcc()
        print(f"timo: CUDA {'with ' + nvcc if nvcc else 'left out (no nvcc)'}", flush=True)
        variant = f"obj-{sys.implementation.cache_tag}-{'cuda' if nvcc else 'cpu'}"
        objects = ROOT / "build" / variant
        objects.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folders = (pybind11.get_include(), sysconfig.get_paths()["include"], ROOT / "csrc")
        include = " ".join(shlex.quote(f"-I{folder}") for folder in folders)
        cxx = os.environ.get("CXX", "g++")
        define = "-DTIMO_CUDA" if nvcc else ""
        rules = [
            "ninja_required_version = 1.5",
            "rule cxx",
            f"  command = {cxx} -MMD -MF $out.d {CXX_FLAGS} {define} {include} -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc",
        ]
        libraries = "-lpthread"
        if nvcc:
            # ptxas reports registers and spills into a file that the tests read.
            tool = shlex.quote(nvcc)
            rules += [
                f"rule nvcc\n  command = {tool} --version > $out.ptxas && "
                f"{tool} -MD -MF $out.d {NVCC_FLAGS} {gencode()} {include} "
                "-c $in -o $out 2>> $out.ptxas || (cat $out.ptxas; exit 1)",
                "  depfile = $out.d\n  deps = gcc",
            ]
            folder = shlex.quote(f"-L{cudart_folder(nvcc)}")
            libraries = f"{folder} -lcudart_static -lrt -ldl -lpthread"
        built = []
        for source in ext.sources:
            rule = "nvcc" if source.endswith(".cu") else "cxx"
            if rule == "nvcc" and not nvcc:
                continue
            built.append(escaped(objects / (source.replace("/", "_") + ".o")))
            rules.append(f"build {built[-1]}: {rule} {escaped(ROOT / source)}")
        rules += [
            f"rule link\n  command = {cxx} -shared -fopenmp -Wl,-Bsymbolic $in -o $out {libraries}",
            f"build {escaped(target)}: link {' '.join(built)}",
            f"default {escaped(target)}\n",
        ]
        (objects / "build.ninja").write_text("\n".join(rules))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(objects), "-j", jobs]
        subprocess.run(command, check=True)


def escaped(path: Path) -> str:
    """As ninja reads it."""
    return re.sub(r"[$ :]", r"$\g<0>", str(path))


def sources() -> list[str]:
    found = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


setup(
    packages=sorted({*find_packages(include=["timo", "timo.*"]), *FOLDERS, "timo.benchmarks.ops"}),
    package_dir=FOLDERS,
    ext_modules=[Extension("timo._C", sources())] if X86 else [],
    cmdclass={"build_ext": BuildWithNinja},
)
