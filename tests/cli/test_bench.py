"""`timo bench` as a user runs it, on tiny shapes."""

import json
import sys

import pytest
import torch

from timo.benchmarks.ops import load
from timo.cli import main

TINY = ("gyroscope_attention", "--shape", "1,2,20,2,8", "--seconds", "0.01", "--device", "cpu")


def run(*arguments) -> int:
    return main(["bench", *map(str, arguments)])


def test_table_and_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    out = tmp_path / "new" / "folder"
    names = ("--backend", "reference,direct,triton")
    assert run(*TINY, *names, "--dtype", "float64", "--out", out) == 0
    said = capsys.readouterr().out
    assert "B=1, T=2, N=20, H=2, D=8, float64" in said and "not run: `triton`" in said
    assert sorted(p.name for p in out.iterdir()) == ["ops.json", "ops.md", "ops.png"]
    record = json.loads((out / "ops.json").read_text())
    assert record["environment"]["torch"] == torch.__version__
    timed = {(r["name"], r["direction"]) for r in record["rows"] if r["seconds"]}
    assert len(timed) == 6
    assert "| forward | reference |" in (out / "ops.md").read_text()


def test_without_rich(capsys, monkeypatch):
    for name in ("rich", "rich.progress", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(*TINY, "--backend", "reference", "--direction", "forward") == 0
    said = capsys.readouterr().out
    assert "| forward | reference |" in said and "backward" not in said


def test_a_wrong_backend_has_no_time_and_is_an_error(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    module = load("gyroscope_attention")
    monkeypatch.setattr(module, "gyroscope_attention", broken(module.gyroscope_attention))
    names = ("--backend", "cpp,reference,direct", "--direction", "forward")
    if "cpp" not in module.problem((1, 2, 20, 2, 8), torch.float32, torch.device("cpu")).backends:
        pytest.skip("timo._C is not built")
    assert run(*TINY, *names) == 1
    lines = capsys.readouterr().out.splitlines()
    wrong = next(line for line in lines if "cpp" in line)
    assert "wrong" in wrong and "×" not in wrong
    right = next(line for line in lines if "reference" in line)
    assert "×" in right and "wrong" not in right


def broken(function):
    def call(*arguments, backend):
        out = function(*arguments, backend=backend)
        return out if backend == "reference" else out * 1.01

    return call


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("mean",), "op is 'mean'; it must be one of"),
        (("temporal_median", "--shape", "1,2"), "shape is '1,2'; temporal_median needs B,T,N,H,D"),
        (("temporal_median", "--shape", "1,0,2,2,2"), "numbers of at least 1"),
        (("--shape", "1,2,3,4,5"), "shape needs one op"),
        (("--dtype", "int8"), "dtype is 'int8'; it must be one of float16"),
        (("--device", "tpu"), "device is 'tpu'; it must be cpu"),
        (("--device", "cuda:99"), "device is 'cuda:99'; torch sees"),
        ((*TINY, "--backend", "fast"), "backend names fast; there are cpp,"),
        (("--direction", "up"), r"direction names ['up']; it must be among forward"),
        (("gather_units", "--shape", "1,1,1,8,8", "--direction", "both"), "has no gradient"),
        (("--seconds", "0"), "seconds is 0.0; it must be more than 0"),
        (("--out", __file__), "it must be a folder"),
    ],
)
def test_errors(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
