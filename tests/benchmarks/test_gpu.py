"""What `make gpu` makes of a test report: only what ran and passed throughout is evidence."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.ops import load

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

SEVERAL = """
BACKEND, DEVICE, PROVES = "triton", "cuda", ("masked_pixel_loss", "temporal_median")

def test_both():
    pass
"""


def test_evidence(tmp_path):
    folder = tmp_path / "tests" / "ops"
    folder.mkdir(parents=True)
    (folder / "conftest.py").write_text("from tests.ops.conftest import evidence\n")
    (folder / "test_several.py").write_text(SEVERAL)
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
        "masked_pixel_loss triton": [1, 0],
        "scatter_units cuda": [1, 0],
        "scatter_units triton": [0, 1],
        "temporal_median cuda": [1, 0],
        "temporal_median triton": [2, 0],
    }
    assert gpu.passed(path) == {
        "gather_units": ["cuda"],
        "masked_pixel_loss": ["triton"],
        "scatter_units": ["cuda"],
        "temporal_median": ["cuda", "triton"],
    }


def test_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "none")])
    assert gpu.main() == 0 and not (tmp_path / "none").exists()
    assert "no CUDA device" in capsys.readouterr().out


REPORT = """<testsuites><testsuite><testcase><properties>
<property name="proves" value="temporal_median triton"/>
</properties></testcase></testsuite></testsuites>"""


@pytest.mark.parametrize("code, passed", [(0, {"temporal_median": ["triton"]}), (124, {})])
def test_a_run_that_was_cut_off_proves_nothing(tmp_path, monkeypatch, code, passed):
    def run(out, limit, *command, **variables):
        (out / "parity.xml").write_text(REPORT)
        return code

    monkeypatch.setattr(gpu, "run", run)
    assert gpu.parity(tmp_path, torch.device("cpu"), 1.0) == code
    record = json.loads((tmp_path / "parity.json").read_text())
    assert record["passed"] == passed and record["complete"] == (code == 0)
    assert record["cases"] == {"temporal_median triton": [1, 0]}


def test_results_of_other_ops_stay(tmp_path, monkeypatch):
    def run(out, limit, *command, **variables):
        there.append(command[command.index("-k") + 1])
        (out / "parity.xml").write_text(REPORT.replace("temporal_median", ops[len(there) - 1]))
        return 0

    there, ops = [], ("temporal_median", "gather_units", "scatter_units")
    monkeypatch.setattr(gpu, "run", run)
    for tests in (None, "gather", None):
        gpu.parity(tmp_path, torch.device("cpu"), 1.0, tests)
        record = json.loads((tmp_path / "parity.json").read_text())
        passed = ops[: len(there)] if tests else ops[len(there) - 1 : len(there)]
        assert record["passed"] == dict.fromkeys(passed, ["triton"])
    assert there[1] == f"{there[0]} and (gather)"


def test_commands_end_in_time_and_are_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SHORTEST", 0.1)
    assert gpu.run(tmp_path, 0.2, sys.executable, "-c", "while True: pass") == 124
    assert gpu.run(tmp_path, 60, sys.executable, "-c", "print(5 * 5); exit(3)") == 3
    assert "25\nexit 3\n" in (tmp_path / "log.txt").read_text()


def test_benchmarks_write_as_they_go(tmp_path, monkeypatch):
    """On a CPU the same code; without time there are no rows."""
    monkeypatch.setattr(gpu, "OPS", ("temporal_median",))
    monkeypatch.setattr(load("temporal_median"), "SHAPES", [(1, 2, 3, 1, 8)])
    assert gpu.benchmarks(tmp_path, torch.device("cpu"), 600.0) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ops.json", "ops.md", "ops.png"]
    assert gpu.benchmarks(tmp_path, torch.device("cpu"), 0.0) == 0
    assert json.loads((tmp_path / "ops.json").read_text())["rows"] == []
