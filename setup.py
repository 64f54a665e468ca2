"""Build of `timo._C`: pybind11 without torch headers, with CUDA where nvcc and its library are.

Environment: TIMO_CUDA=1 makes it an error if they are missing, TIMO_CUDA=0 leaves CUDA out;
TIMO_CUDA_ARCHS lists architectures, by default those of "80;90a;100;120+PTX" that nvcc knows;
CXX (a gcc), MAX_JOBS as usual.
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


def find_cuda() -> tuple[str, Path] | None:
    """nvcc and the folder of its static runtime library."""
    wanted = os.environ.get("TIMO_CUDA", "auto")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc")
    nvcc = next((c for c in candidates if c and os.path.exists(c)), None)
    roots = (*([Path(nvcc).resolve().parent.parent] if nvcc else []), Path("/usr/local/cuda"))
    folders = [root / lib for root in roots for lib in ("lib64", "lib")]
    folders.append(Path("/usr/lib/x86_64-linux-gnu"))
    library = next((f for f in folders if (f / "libcudart_static.a").exists()), None)
    if nvcc and library:
        return nvcc, library
    missing = f"{nvcc} has no libcudart_static.a beside it" if nvcc else "no nvcc was found"
    if wanted == "1":
        raise SystemExit(f"TIMO_CUDA=1 but {missing}: set CUDA_HOME, or TIMO_CUDA=0")
    print(f"timo: CUDA left out ({missing})", flush=True)
    return None


def gencode(nvcc: str) -> str:
    archs = os.environ.get("TIMO_CUDA_ARCHS", "").split(";")
    if archs == [""]:
        listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
        known = {line.removeprefix("compute_") for line in listed.split()}
        archs = [a for a in ("80", "90a", "100", "120+PTX") if re.match(r"\d+", a)[0] in known]
    flags = []
    for arch in archs:
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

        nvcc, cudart = find_cuda() or (None, None)
        if nvcc:
            print(f"timo: CUDA with {nvcc}", flush=True)
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
                f"{tool} -MD -MF $out.d {NVCC_FLAGS} {gencode(nvcc)} {include} "
                "-c $in -o $out 2>> $out.ptxas || (cat $out.ptxas; exit 1)",
                "  depfile = $out.d\n  deps = gcc",
            ]
            folder = shlex.quote(f"-L{cudart}")
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
