"""What `make gpu` makes of a test report: only what ran and passed throughout is evidence."""

import subprocess
import sys

from benchmarks import gpu

MODULE = """
import pytest
from timo.ops.{op} import FORWARD
BACKEND, DEVICE = "triton", "cuda"

@pytest.mark.parametrize("backend, device", [("cuda", "cuda"), ("cpp", "cpu")])
def test_parity(backend, device):
    assert backend == "cuda"  # what runs on the CPU is no evidence for a GPU, nor against one

def test_more():
    {more}
"""


def test_evidence(tmp_path):
    folder = tmp_path / "tests" / "ops"
    folder.mkdir(parents=True)
    (folder / "conftest.py").write_text("from tests.ops.conftest import evidence\n")
    ends = {"temporal_median": "pass", "gather_units": "assert False",
            "scatter_units": "pytest.skip('cannot')"}  # fmt: skip
    for op, more in ends.items():
        (folder / f"test_{op}.py").write_text(MODULE.format(op=op, more=more))
    path = tmp_path / "parity.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={path}"]
    done = subprocess.run([*command, folder], capture_output=True, text=True)
    assert path.exists(), done.stdout + done.stderr
    assert gpu.cases(path) == {
        "gather_units cuda": [1, 0],
        "gather_units triton": [0, 1],
        "scatter_units cuda": [1, 0],
        "scatter_units triton": [0, 1],
        "temporal_median cuda": [1, 0],
        "temporal_median triton": [1, 0],
    }
    assert gpu.passed(path) == {
        "gather_units": ["cuda"],
        "scatter_units": ["cuda"],
        "temporal_median": ["cuda", "triton"],
    }


def test_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "none")])
    assert gpu.main() == 0 and not (tmp_path / "none").exists()
    assert "no CUDA device" in capsys.readouterr().out
