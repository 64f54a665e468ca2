"""Benchmarks: parity gate, figures, tables, plots."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import harness, report, runner
from benchmarks.ops import OPS, load
from benchmarks.ops import gyroscope_baselines as baselines
from tests.conftest import REPOSITORY
from timo.ops import dispatch

CPU = torch.device("cpu")
SHAPE = (1, 2, 20, 2, 8)


def run(problem, **options):
    rows = runner.run(
        "gyroscope_attention", SHAPE, torch.float32, CPU, problem, budget=0.0, **options
    )
    return {(r["name"], r["direction"]): r for r in runner.compare(list(rows))}


@pytest.fixture
def problem():
    return load("gyroscope_attention").problem(SHAPE, torch.float32, CPU)


def test_registry():
    """Every op has a benchmark of its name."""
    assert set(OPS) == {op for op in dispatch.OPS if not op.endswith("_backward")}
    for op in OPS:
        module = load(op)
        sizes = {len(shape) for shape in (*module.SHAPES, *module.CPU_SHAPES)}
        assert sizes == {len(module.LAYOUT.split(","))}
    with pytest.raises(ValueError, match="op is 'mean'; it must be one of"):
        load("mean")


def test_the_folder_works_under_both_names():
    """As `benchmarks` in the tree and as `timo.benchmarks` in an installation."""
    for path in (REPOSITORY / "benchmarks").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.startswith(("from benchmarks", "import benchmarks")), path


@pytest.mark.parametrize("op", OPS)
def test_every_implementation_passes_the_gate(op):
    module = load(op)
    for dtype, T in ((torch.float32, 3), (torch.bfloat16, 3), (torch.float32, 1)):
        frames = {"B": 2, "T": T, "C": 3, "H": 70, "W": 33, "h": 5, "w": 3, "factor": 4}
        sizes = frames if "C" in module.LAYOUT else {"B": 2, "T": T, "N": 33, "H": 2, "D": 16}
        problem = module.problem([sizes[x] for x in module.LAYOUT.split(",")], dtype, CPU)
        names = [n for n in problem.calls if "compiled" not in n]
        for row in runner.run(op, SHAPE, dtype, CPU, problem, names=names, budget=0.0):
            assert row["parity"] or row["name"] in problem.forward_only, row


def test_figures_of_a_row(problem):
    rows = run(problem, names=["reference", "direct", "factored"])
    row = rows["reference", "forward"]
    assert row["parity"] and row["seconds"]["median"] > 0
    assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
    assert row["seconds"]["cpu"] > 0 and row["seconds"]["runs"] >= 3
    assert row["of_floor"] == pytest.approx(max(row["of_matmul"], row["of_copy"]))
    B, T, N, H, D = SHAPE
    flop = 2 * B * N * N * H * D * (1 + T)
    assert row["flop_rate"] == pytest.approx(flop / row["seconds"]["median"])
    assert row["speedup"]["baseline"][0] == "direct"
    ratio = rows["direct", "forward"]["seconds"]["median"] / row["seconds"]["median"]
    assert row["speedup"]["baseline"][1] == pytest.approx(ratio)
    assert row["speedup"]["best other"][0] in ("direct", "factored")
    assert "best other" not in rows["direct", "forward"]["speedup"]
    assert rows["reference", "both"]["seconds"]["peak_bytes"] is not None


def off_by_little(calls, name, change):
    right = calls[name]
    calls[name] = lambda: (change(right()[0]),)


@pytest.mark.parametrize("wrong", ["reference", "direct"])
def test_a_red_gate_takes_time_and_speed_up_away(problem, wrong):
    off_by_little(problem.calls, wrong, lambda out: out * 1.001)
    rows = run(problem, names=["reference", "direct", "factored"])
    for direction in runner.DIRECTIONS:
        row = rows[wrong, direction]
        assert not row["parity"] and row["seconds"] is None and row["speedup"] == {}
        assert row["flop_rate"] is None and row["of_floor"] is None
        assert row["note"].startswith("wrong output: number 0: error")
        for name in {"reference", "direct", "factored"} - {wrong}:
            base = rows[name, direction]["speedup"]["baseline"][0]
            assert base == ("direct" if wrong == "reference" else "factored")
    text = report.markdown({}, list(rows.values()))
    line = next(x for x in text.splitlines() if x.startswith(f"| forward | {wrong} |"))
    assert "wrong output" in line and "×" not in line and "ms" not in line


def test_a_wrong_gradient_takes_the_forward_time_away_too(problem):
    off_by_little(problem.calls, "direct", lambda out: 2 * out - out.detach())
    rows = run(problem, names=["reference", "direct"])
    assert rows["direct", "forward"]["seconds"] is None
    assert rows["direct", "both"]["note"].startswith("wrong gradient: number 0")


def test_a_result_that_is_not_a_number_is_wrong():
    got, exact = torch.tensor([1.0, torch.nan]), torch.ones(2, dtype=torch.float64)
    assert runner.disagreement([got], [exact], torch.float32)
    assert not runner.disagreement([exact.float()], [exact], torch.float32)
    zero = torch.zeros(2, dtype=torch.float64)
    noise = torch.full((2,), 1e-6)
    assert not runner.disagreement([exact, noise], [exact, zero], torch.float32)
    assert runner.disagreement([exact, noise * 1e3], [exact, zero], torch.float32)
    ids = torch.tensor([1, 2])
    assert "differs in 1 places" in runner.disagreement([ids + ids // 2], [ids], torch.float32)


def test_failures_and_gaps_say_why(problem):
    def broken():
        raise RuntimeError("no kernel image\nand more")

    problem.calls["broken"] = broken
    rows = run(problem, names=["broken"], directions=("forward",))
    assert rows["broken", "forward"]["note"] == "RuntimeError: no kernel image"
    late = run(problem, names=["reference"], deadline=0.0)
    assert late["reference", "both"]["note"] == "the time for this run was over"


def test_direct_form_is_left_out_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(harness, "available_memory", lambda device: 1e4)
    problem = load("gyroscope_attention").problem(SHAPE, torch.float32, CPU)
    assert "needs about" in problem.skipped["direct-compiled"]
    assert set(problem.backends) & set(problem.skipped) == set()
    enough = baselines.direct_bytes(SHAPE)[0] * 1.2
    monkeypatch.setattr(harness, "available_memory", lambda device: enough)
    problem = load("gyroscope_attention").problem(SHAPE, torch.float32, CPU)
    assert "direct" not in problem.skipped and "needs about" in problem.forward_only["direct"]


@pytest.mark.parametrize("name", ["sdpa-flash", "sdpa-efficient", "sdpa-cudnn"])
def test_kernels_of_gpus_are_called_as_they_are_declared(name):
    """Names, order and shapes of arguments and results, without a GPU and without values."""
    B, T, N, H, D = 2, 10, 64, 4, 32
    shapes = [(B, T, N, H, D)] * 3 + [(B, N, H, D)] * 2 + [(B, T, N, H)]
    with FakeTensorMode():
        leaves = [torch.empty(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
        out = baselines.implementations("cuda")[name](*leaves)
        grads = torch.autograd.grad(out, leaves, torch.empty_like(out))
    assert out.shape == shapes[0] and [g.shape for g in grads] == shapes


def test_flex_attention_is_composed_rightly(problem):
    """Not compiled and without gradient, it runs on CPUs too."""
    leaves = [x.detach() for x in problem.leaves]
    problem.calls["flex"] = lambda: (baselines.composed(baselines._flex, 8, *leaves),)
    row = run(problem, names=["flex"], directions=("forward",))["flex", "forward"]
    assert row["parity"], row["note"]


def test_peak_memory():
    size = 64 << 20
    peak = harness.peak_memory(lambda: torch.ones(size, dtype=torch.uint8).add_(1), CPU)
    if peak is None:
        pytest.skip("this system does not tell")
    assert size * 0.9 < peak < size * 1.5
    assert harness.peak_memory(lambda: None, CPU) < size / 10


def test_environment():
    record = harness.environment(CPU)
    assert record["cpu"] and record["torch"] == torch.__version__ and record["threads"] >= 1
    assert "device" in record and "commit" in record


def test_files(problem, tmp_path):
    rows = list(run(problem, names=["reference", "direct", "triton"]).values())
    paths = report.write(tmp_path, {"cpu": "some"}, rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ops.json", "ops.md", "ops.png"]
    assert paths == [tmp_path / name for name in ("ops.json", "ops.md", "ops.png")]
    record = json.loads(paths[0].read_text())
    assert len(record["rows"]) == 9 and record["environment"] == {"cpu": "some"}
    text = paths[1].read_text()
    assert "## gyroscope_attention, B=1, T=2, N=20, H=2, D=8, float32" in text
    assert "not run: `triton`, forward, backward, both: " in text
    assert paths[2].read_bytes()[:4] == b"\x89PNG"


def test_nothing_half_written(tmp_path):
    path = tmp_path / "ops.json"
    path.write_text("before")
    with pytest.raises(TypeError):
        report.write_json(path, {"rows": object()})
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_durations():
    given = (2.0, 0.5, 0.0123, 3e-5, 1234.0)
    assert [*map(report.duration, given)] == ["2.00 s", "500 ms", "12.3 ms", "30.0 µs", "1234 s"]


def test_the_yardstick_is_the_faster_product(monkeypatch):
    """What the models' products are measured by: on AMD they do not go through `@` in float32."""
    seconds = iter([2.0, 1.0, 3.0])

    def timed(steps, device, budget):
        (step,) = steps
        assert step(None).shape == (1024, 1024)
        return [harness.Timing(next(seconds), 0.0, 0.0, 3)]

    monkeypatch.setattr(harness, "_time", timed)
    assert harness.matmul_rate(CPU, torch.float32) == 2 * 1024**3 / 1.0
    assert harness.matmul_rate(CPU, torch.bfloat16) == 2 * 1024**3 / 3.0
