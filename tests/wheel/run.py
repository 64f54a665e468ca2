"""Install a wheel into an environment of its own and run smoke.py there, outside the tree.

Usage: python tests/wheel/run.py build/wheel/timo-*.whl
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from timo.ops import dispatch

ROOT = Path(__file__).resolve().parents[2]


def main(wheel: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", Path(wheel).resolve()], check=True)
        cuda = "yes" if dispatch.compiled().has_cuda else "no"  # as the build of the repository
        smoke = Path(__file__).with_name("smoke.py")
        subprocess.run([python, "-I", smoke, cuda], check=True, cwd=folder)


if __name__ == "__main__":
    main(sys.argv[1])
